
# A server loads for minutes; what it is asked before would count as its failures.
{{python}} -m rlprompt.slurm.readiness --server "$SERVER" --seconds {{server_wait_s}} --process "$SERVER_STEP" -- "$@" &
WAITING=$!
await "$WAITING"
CODE=$?
WAITING=
[ -z "$ASKED" ] || finish 85
if [ "$CODE" -ne 0 ]; then
  tail -n 5 "$LOGS"/server_*.log
  finish 1
fi
