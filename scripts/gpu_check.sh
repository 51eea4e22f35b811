#!/usr/bin/env bash
# What the first minutes on a GPU should show, in under nine of them; nothing is downloaded.
#
#   bash scripts/gpu_check.sh --output DIR [--wheels DIR] [--model DIR] [--dry-run] [--only PART ...]
#
#   --output DIR   gets gpu_check.json, summary.md, log.txt and pictures
#   --wheels DIR   wheels of packages that are missing here (scripts/gpu_wheels.sh collects them)
#   --model DIR    a folder of SmolLM2-135M; without one, random weights of its shape
#   --dry-run      everything on the CPU with tiny shapes: tries this script, measures nothing
#   --only PART    some parts only; `--help` of benchmarks/gpu_check.py lists them
#
# It needs no installation of rlprompt: a Python with torch, transformers and Triton is enough. Which
# Python: $RLPROMPT_PYTHON, else the environment of scripts/setup.sh where there is one, else python3.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
readonly ROOT

WHEELS=""
REST=()
while (($#)); do
  case "$1" in
    --wheels) [[ $# -ge 2 ]] || { echo "error: --wheels needs a folder" >&2; exit 2; }
      WHEELS="$2"; shift 2 ;;
    --wheels=*) WHEELS="${1#--wheels=}"; shift ;;
    *) REST+=("$1"); shift ;;
  esac
done

PYTHON="${RLPROMPT_PYTHON:-}"
if [[ -z "$PYTHON" ]]; then
  PYTHON="$(command -v python3 || true)"
  VENV="${RLPROMPT_VENV:-$ROOT/.venv}"
  [[ -x "$VENV/bin/python" ]] && PYTHON="$VENV/bin/python"
fi
[[ -n "$PYTHON" ]] || { echo "error: no python3 here; name one in RLPROMPT_PYTHON" >&2; exit 2; }

export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n "$WHEELS" ]]; then
  compgen -G "$WHEELS/*.whl" >/dev/null || {
    echo "error: $WHEELS holds no wheels; run \`bash scripts/gpu_wheels.sh $WHEELS\` where there is a network" >&2
    exit 2
  }
  SITE="$(mktemp -d)"
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --root-user-action ignore --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$ROOT:$SITE${PYTHONPATH#"$ROOT"}"
fi
"$PYTHON" "$ROOT/benchmarks/gpu_check.py" "${REST[@]}"
