#!/usr/bin/env bash
# Set up, lint, type-check and test. Exits non-zero when any of them fails.
#
#   bash scripts/test.sh [--fast | --check] [PYTEST ARGUMENTS]
#
#   --fast    leave out the tests marked slow and those that need the model (under three minutes)
#   --check   lint and types only
#
# PYTEST ARGUMENTS come after ours and so override them, e.g. `-n 0 -x tests/rewards`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV="${RLPROMPT_VENV:-.venv}"
readonly BIN="$VENV/bin"

MODE=full
case "${1:-}" in
  --fast | --check) MODE="${1#--}"; shift ;;
esac

# Nothing in the tests may wait for a hub or talk to a tracker's server.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
# Two workers with one thread each: tests are many and small, so cores are better spent on workers
# than on threads, and one thread makes reductions add up in the same order on every machine.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
WORKERS=2

FAILED=()
check() { # run a check; remember a failure and go on, so that one run shows everything
  printf '\n== %s\n' "$*"
  "$BIN/python" -m "$@" || FAILED+=("$*")
}

bash scripts/setup.sh dev

check ruff check .
check ruff format --check .
check mypy # the folders that pyproject.toml names

if [[ "$MODE" != check ]]; then
  MARKS="not gpu and not multi_gpu"
  if nvidia-smi -L >/dev/null 2>&1; then
    MARKS="" # tests for several devices skip themselves where there is one
    WORKERS=0 # the device is one
  else
    printf '\nno NVIDIA GPU: tests marked gpu and multi_gpu are left out\n'
  fi
  if [[ "$MODE" == fast ]]; then
    MARKS="not slow and not model and not gpu and not multi_gpu"
  else
    "$BIN/rlprompt" model fetch smollm2-135m
  fi
  # A worker that dies ends the run: xdist would give its tests to a new one and often wait for ever.
  check pytest -n "$WORKERS" --dist loadfile --max-worker-restart 0 -m "$MARKS" -ra --durations=10 "$@"
fi

if ((${#FAILED[@]})); then
  printf '\nfailed: %s\n' "${FAILED[@]}" >&2
  exit 1
fi
