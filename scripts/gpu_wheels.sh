#!/usr/bin/env bash
# Collects wheels of what a machine with a GPU and no network lacks, for scripts/gpu_check.sh.
#
#   bash scripts/gpu_wheels.sh DIR [PACKAGE ...]
#
# DIR gets, in the versions of constraints.txt, the packages below or those named. Pure Python is
# taken wherever there is such a wheel; pydantic_core is compiled, for CPython 3.12 on x86-64 Linux
# (RLPROMPT_WHEELS_PYTHON=3.11 chooses another Python). Large or compiled packages that such an image
# brings along (torch, triton, transformers, numpy, pyarrow, ...) are left out: see the list at the
# end. More than 40 MB together is an error.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT
readonly MOST=$((40 * 1000 * 1000))
readonly WANTED=(
  annotated-types datasets dill gguf multiprocess pydantic pydantic_core starlette trl
  typing-inspection uvicorn
)
readonly LEFT_OUT=(
  torch triton transformers tokenizers safetensors peft accelerate numpy scipy pandas pyarrow
  matplotlib huggingface_hub typer rich httpx h11 PyYAML Jinja2 pytest pytest-timeout pytest-xdist
)

if (($# == 0)) || [[ "$1" == -* ]]; then
  echo "usage: bash scripts/gpu_wheels.sh DIR [PACKAGE ...]" >&2
  exit 2
fi
FOLDER="$1"; shift
PACKAGES=("$@")
((${#PACKAGES[@]})) || PACKAGES=("${WANTED[@]}")
if compgen -G "$FOLDER/*.whl" >/dev/null; then
  echo "error: $FOLDER holds wheels already, and two versions of a package stop the installation; name an empty folder" >&2
  exit 2
fi
PYTHON="${RLPROMPT_PYTHON:-}"
if [[ -z "$PYTHON" ]]; then
  PYTHON="$(command -v python3 || true)"
  VENV="${RLPROMPT_VENV:-$ROOT/.venv}"
  [[ -x "$VENV/bin/python" ]] && PYTHON="$VENV/bin/python"
fi
VERSION="${RLPROMPT_WHEELS_PYTHON:-3.12}"

PINNED=()
for package in "${PACKAGES[@]}"; do
  if ! line="$(grep -i "^${package//[-_]/[-_]}==" "$ROOT/constraints.txt")"; then
    echo "error: constraints.txt has no $package; name a package of it" >&2
    exit 2
  fi
  PINNED+=("$line")
done

PLATFORMS=()
for each in manylinux_2_28 manylinux_2_17 manylinux2014; do PLATFORMS+=(--platform "${each}_x86_64"); done
mkdir -p "$FOLDER"
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version "$VERSION" --implementation cp "${PLATFORMS[@]}" -d "$FOLDER" "${PINNED[@]}"

TOTAL="$(cat "$FOLDER"/*.whl | wc -c)"
for wheel in "$FOLDER"/*.whl; do
  kind="compiled for CPython $VERSION, x86-64"
  [[ "$wheel" == *-none-any.whl ]] && kind="pure Python"
  printf '%9d  %s (%s)\n' "$(wc -c <"$wheel")" "$(basename "$wheel")" "$kind"
done
printf '%9d  bytes together\n' "$TOTAL"
printf 'left out, expected there: %s\n' "${LEFT_OUT[*]}"
if ((TOTAL > MOST)); then
  echo "error: that is more than $MOST bytes; name fewer packages" >&2
  exit 1
fi
