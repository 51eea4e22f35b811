#!/usr/bin/env bash
# Make .venv and install rlprompt into it; when nothing has changed since last time, do nothing.
#
#   bash scripts/setup.sh [--cuda BUILD] [EXTRAS]
#
# EXTRAS   extras of pyproject.toml with commas, e.g. wandb,deepspeed
# BUILD    of torch: auto (the default: with CUDA where nvidia-smi finds a GPU, else for the CPU; a
#          build with CUDA that is there already stays), cpu, pypi (PyPI's own, with the CUDA of its
#          release), or a CUDA version such as cu130. A login node of a cluster often has no GPU: name
#          the build that the compute nodes need. What is there in another build is replaced.
#
# RLPROMPT_VENV    the environment's folder, from the repository's root (default: .venv)
# RLPROMPT_PYTHON  the interpreter to make it with (default: the first one found that fits)
#
# Needs no root and installs nothing outside the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly MIN_MINOR=11
readonly VENV="${RLPROMPT_VENV:-.venv}"
readonly STAMP="$VENV/.rlprompt-setup"
readonly CPU_INDEX="https://download.pytorch.org/whl/cpu"
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

fits() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $MIN_MINOR))" 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n "${RLPROMPT_PYTHON:-}" ]]; then
    fits "$RLPROMPT_PYTHON" ||
      die "RLPROMPT_PYTHON=$RLPROMPT_PYTHON is no Python >= 3.$MIN_MINOR; point it at one."
    command -v "$RLPROMPT_PYTHON"
    return
  fi
  for candidate in python3 python3.11 python3.12 python3.13 python; do
    if fits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "no Python >= 3.$MIN_MINOR on PATH; install one or set RLPROMPT_PYTHON to it."
}

make_venv() {
  if [[ -x "$VENV/bin/python" ]]; then
    fits "$VENV/bin/python" ||
      die "$VENV has no working Python >= 3.$MIN_MINOR; delete it, or set RLPROMPT_VENV to another folder."
    return
  fi
  [[ ! -e "$VENV" ]] || die "$VENV exists and is no environment; move it, or set RLPROMPT_VENV."
  local python
  python="$(find_python)"
  say "making $VENV with $("$python" --version) ($python)"
  if ! "$python" -m venv "$VENV"; then
    rm -rf "$VENV"
    die "$python cannot make environments; install its venv module (Debian: python3-venv)."
  fi
}

# Twice quiet: errors only. Once would leave a warning per package where an index lacks it.
pip_install() { "$VENV/bin/python" -m pip install -qq -c constraints.txt "$@"; }

offered() { pip_install --dry-run --no-deps "$@" >/dev/null 2>&1; }

installed() {
  "$VENV/bin/python" -c \
    "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))" "$1" 2>/dev/null || true
}

# Whether the torch that is there is of the build that is asked for; `cpu` and `auto` differ only in
# what they think of a CUDA build on a machine without a GPU.
right_build() { # BUILD VERSION
  local local_part=""
  [[ "$2" != *+* ]] || local_part="${2#*+}"
  case "$1" in
    auto) [[ "$local_part" != cpu ]] || ! has_gpu ;;
    pypi) [[ "$local_part" != cpu ]] ;;
    cpu) [[ "$local_part" == cpu ]] || { [[ -z "$local_part" ]] && ! built_with_cuda; } ;;
    *) [[ "$local_part" == "$1" ]] || { [[ -z "$local_part" ]] && [[ "$(built_with_cuda)" == "$1" ]]; } ;;
  esac
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# Prints the CUDA of the torch that is there, such as cu130; fails where it has none.
built_with_cuda() {
  sed -n "s/^cuda[^=]*= '\([0-9]*\)\.\([0-9]*\).*/cu\1\2/p" \
    "$VENV"/lib/python3*/site-packages/torch/version.py 2>/dev/null | grep .
}

# For pip, V+cpu is as good as V: what is replaced has to be said.
put_torch() { # REQUIREMENT [OPTIONS]
  [[ -z "${replaces:-}" ]] || pip_install --force-reinstall --no-deps "$@"
  pip_install "$@"
}

install_named_build() { # VERSION BUILD
  local index=(--extra-index-url "https://download.pytorch.org/whl/$2" --retries 1 --timeout 20)
  say "installing torch $1 (--cuda $2)"
  if offered "torch==$1+$2"; then
    put_torch "torch==$1+$2"
  elif offered "torch==$1+$2" "${index[@]}"; then
    put_torch "torch==$1+$2" "${index[@]}"
  else
    die "no torch $1+$2 is offered here nor at ${index[1]}; try --cuda pypi, or another version of CUDA."
  fi
}

# The default build of torch on PyPI carries several GB of CUDA libraries. Where they would be of no
# use, take the CPU build: from the sources pip is set up with, or else from PyTorch's own index.
install_torch() { # BUILD
  local replaces="" version present cpu_index=(--extra-index-url "$CPU_INDEX" --retries 1 --timeout 20)
  version="$(sed -n 's/^torch==//p' constraints.txt)"
  present="$(installed torch)"
  if [[ "${present%%+*}" == "$version" ]] && right_build "$1" "$present"; then
    say "torch $present is there already"
    return
  fi
  if [[ "${present%%+*}" == "$version" ]]; then
    say "torch $present is there, and another build is wanted: replacing it"
    replaces=yes
  fi
  if [[ "$1" == cu* ]]; then
    install_named_build "$version" "$1"
  elif [[ "$1" == pypi ]]; then
    say "installing torch $version (--cuda pypi: the default build)"
    put_torch "torch==$version"
  elif [[ "$(uname -s)" != Linux ]]; then
    say "installing torch $version ($(uname -s): the default build)"
    put_torch "torch==$version"
  elif [[ "$1" == auto ]] && has_gpu; then
    say "installing torch $version (NVIDIA GPU found: the CUDA build)"
    put_torch "torch==$version"
  else
    if [[ "$1" == cpu ]]; then
      say "installing torch $version (--cuda cpu: the CPU build)"
    else
      say "installing torch $version (no NVIDIA GPU on this machine: the CPU build)"
      say "  where the nodes that train have GPUs, run this again with --cuda cu130, or what they need"
    fi
    if offered "torch==$version+cpu"; then
      say "  it comes from pip's configured sources"
      put_torch "torch==$version+cpu"
    elif offered "torch==$version+cpu" "${cpu_index[@]}"; then
      say "  it comes from $CPU_INDEX"
      put_torch "torch==$version+cpu" "${cpu_index[@]}"
    else
      say "  found no CPU build here nor at $CPU_INDEX: installing the default build (several GB)"
      put_torch "torch==$version"
    fi
  fi
}

# Everything that decides what an install does; the path is in it because the install is editable.
fingerprint() { { pwd; cat pyproject.toml constraints.txt scripts/setup.sh; } | cksum | tr ' ' '-'; }

# Sorted, comma-separated union of the arguments.
union() { printf '%s\n' "$@" | tr ',' '\n' | tr -d ' ' | sed '/^$/d' | sort -u | paste -sd, -; }

require_known() { # EXTRAS: pip only warns of an extra that does not exist
  local extra
  for extra in $(tr ',' ' ' <<<"$1"); do
    grep -q "^$extra = \[" pyproject.toml || die "there is no extra '$extra' in pyproject.toml."
  done
}

main() {
  local wanted="" key before="" extras build=auto
  while (($#)); do
    case "$1" in
      --cuda) build="${2:?--cuda needs auto, cpu, pypi or a version such as cu130}"; shift ;;
      --cuda=*) build="${1#--cuda=}" ;;
      -*) die "there is no option '$1'; see the head of scripts/setup.sh." ;;
      *) [[ -z "$wanted" ]] || die "give EXTRAS once, with commas: '$wanted,$1'."; wanted="$1" ;;
    esac
    shift
  done
  [[ "$build" =~ ^(auto|cpu|pypi|cu[0-9]{2,3})$ ]] ||
    die "--cuda is '$build'; give auto, cpu, pypi or a version such as cu130."
  require_known "$wanted"
  key="$(fingerprint)"
  if [[ -f "$STAMP" && -x "$VENV/bin/python" ]] && fits "$VENV/bin/python"; then
    before="$(sed -n 2p "$STAMP")"
    extras="$(union "$before" "$wanted")"
    if [[ "$(sed -n 1p "$STAMP")" == "$key" && "$extras" == "$before" ]] &&
      right_build "$build" "$(installed torch)"; then
      say "$VENV is up to date (extras: ${before:-none})"
      return
    fi
  fi
  SECONDS=0
  make_venv
  rm -f "$STAMP"
  extras="$(union "$before" "$wanted")"
  install_torch "$build"
  say "installing rlprompt${extras:+[$extras]} at the versions of constraints.txt (takes minutes)"
  pip_install -e ".${extras:+[$extras]}" ||
    die "pip could not install rlprompt${extras:+[$extras]}; its message is above."
  printf '%s\n%s\n' "$key" "$extras" >"$STAMP"
  say "done in ${SECONDS} s: torch $(installed torch), transformers $(installed transformers)," \
    "$("$VENV/bin/python" -m pip list --format=freeze | wc -l) packages," \
    "$(du -sh "$VENV" | cut -f1) in $VENV"
}

main "$@"
