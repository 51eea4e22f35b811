#!/usr/bin/env bash
# From nothing to a learned system prompt: install, fetch the default model, train, show before/after.
#
#   bash scripts/quickstart.sh [--force]
#
# A finished run in runs/quickstart is shown again instead of repeated, an interrupted one is resumed;
# --force deletes it and trains anew. RLPROMPT_VENV and RLPROMPT_CACHE move the environment and models.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RECIPE=recipes/concise/smollm2_grpo.yaml
readonly RUN=runs/quickstart
readonly VENV="${RLPROMPT_VENV:-.venv}"
readonly RLPROMPT="$VENV/bin/rlprompt"

FORCE=no
case "${1:-}" in
  "") ;;
  --force) FORCE=yes ;;
  *) printf 'usage: bash scripts/quickstart.sh [--force]\n' >&2; exit 2 ;;
esac

TIMES=()
phase() { # NAME COMMAND...: run the command and keep its time
  local name="$1" start=$SECONDS
  shift
  printf '\n== %s\n' "$name"
  "$@"
  TIMES+=("$(printf '%6d s  %s' $((SECONDS - start)) "$name")")
}

is_finished() { # a run that a signal stopped has a summary too
  [[ -f "$RUN/summary.json" ]] && "$VENV/bin/python" - "$RUN/summary.json" <<'PY'
import json
import sys

from rlprompt.runs.stop_reason import StopReason

reason = StopReason.parse(json.load(open(sys.argv[1], encoding="utf-8")).get("stopped_because"))
sys.exit(reason is None or not reason.is_complete)
PY
}

show_results() {
  printf '%s holds a finished run; its results again (--force trains anew):\n\n' "$RUN"
  "$VENV/bin/python" - "$RUN/summary.json" <<'PY'
import json
import sys

summary = json.load(open(sys.argv[1], encoding="utf-8"))
rows = {
    "base (no system prompt)": "heldout_reward_before",
    "hand-written prompt": "heldout_reward_handwritten",
    "learned prompt": "heldout_reward_after",
}
print((summary.get("verdict") or {}).get("sentence", ""))
print("validation reward")
for label, key in rows.items():
    value = summary.get(key)
    print(f"  {label:<24}" + ("-" if value is None else f"{value:.3f}"))
print(f"{summary.get('steps')} steps in {summary.get('seconds', 0):.0f} s")
PY
}

train() {
  if [[ "$FORCE" == yes ]]; then
    rm -rf "$RUN"
  fi
  if is_finished; then
    show_results
  elif [[ -n "$(ls -A "$RUN/checkpoints" 2>/dev/null)" ]]; then
    printf '%s was interrupted; resuming it (--force trains anew).\n' "$RUN"
    "$RLPROMPT" train "$RECIPE" --output "$RUN" --resume
  else
    # Whatever lies here ended before its first checkpoint.
    rm -rf "$RUN"
    "$RLPROMPT" train "$RECIPE" --output "$RUN"
  fi
}

phase "install" bash scripts/setup.sh
phase "doctor" "$RLPROMPT" doctor
phase "fetch the model" "$RLPROMPT" model fetch smollm2-135m
phase "train" train

cat <<EOF

The learned prompt is $RUN/artifact, the report $RUN/report.html. Try:
  $RLPROMPT chat $RUN/artifact --compare
  $RLPROMPT train recipes/persona/smollm2_grpo.yaml --output runs/persona
  bash scripts/test.sh --fast

Time:
EOF
printf '%s\n' "${TIMES[@]}"
printf '%6d s  in all\n' "$SECONDS"
