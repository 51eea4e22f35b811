# What Slurm does with this job at the moment, in one word: restarted (it has put the job back
# itself), cancelled, preempted, timeout, running, or unknown.
fate() {
  local job restarts reason asked grace
  job=$(scontrol show job --oneliner "$THIS_JOB") || { echo unknown; return; }
  of() { grep -o " $1=[^ ]*" <<<"$job" | head -n 1 | cut -d= -f2-; }
  restarts=$(of Restarts) reason=$(of Reason) asked=$(of PreemptTime)
  # It is kept over a restart; a preemption of an earlier attempt is none of this one.
  if [[ "$asked" != [0-9]* || "$asked" < "$(of StartTime)" ]]; then asked=; fi
  if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
    echo restarted
    return
  fi
  case "$(of JobState)" in
  PENDING | REQUEUED | REQUEUE_FED | REQUEUE_HOLD | SPECIAL_EXIT) echo restarted ;;
  PREEMPTED) echo preempted ;;
  TIMEOUT) echo timeout ;;
  CANCELLED | DEADLINE | REVOKED) echo cancelled ;;
  COMPLETING) # of a job that is being ended: why is not in the state
    if [ "$reason" = TimeLimit ] || [ "$(seconds "$(of RunTime)")" -ge "$(seconds "$(of TimeLimit)")" ]; then
      echo timeout
    elif [ -z "$asked" ]; then
      echo cancelled
    elif [[ ! "$asked" < "$(of EndTime)" ]]; then
      echo preempted
    else # by the preemption when its grace is over, else by scancel
      grace=$(scontrol show partition --oneliner "$(of Partition)" | grep -o ' GraceTime=[0-9]*' | cut -d= -f2)
      if [ "$(date +%s)" -ge $(($(date -d "$asked" +%s) + ${grace:-0})) ]; then echo preempted; else echo cancelled; fi
    fi
    ;;
  *) if [ -n "$asked" ]; then echo preempted; else echo running; fi ;;
  esac
}
# [DAYS-]HH:MM:SS in seconds; words such as UNLIMITED are more than any job has.
seconds() {
  local days=0 time=$1 hours minutes rest
  [[ "$time" =~ ^([0-9]+-)?[0-9]+(:[0-9]+){2}$ ]] || { echo 9999999999; return; }
  if [[ "$time" = *-* ]]; then days=${time%%-*} time=${time#*-}; fi
  IFS=: read -r hours minutes rest <<<"$time"
  echo $((10#$days * 86400 + 10#$hours * 3600 + 10#$minutes * 60 + 10#$rest))
}
# Puts the job back into the queue; Slurm then ends this attempt.
BACK=''
put_back() { # WHY
  local try
  if [ "${SLURM_RESTART_COUNT:-0}" -ge {{max_restarts}} ]; then
    say "$1; it was put back {{max_restarts}} times (max_restarts) and is not again"
    return
  fi
  say "$1: put back into the queue"
  for try in 1 2 3 4 5; do # the controller may be busy
    if scontrol requeue "$THIS_JOB" || [ "$(fate)" = restarted ]; then
      BACK=yes
      return
    fi
    sleep $((try * 5))
  done
  say "error: Slurm does not put it back; submit it again to go on"
}
# The end of this attempt. A job comes back when it was preempted, when its time was over, when this
# script was asked to stop, or when a rank was killed; never when it was cancelled.
finish() { # CODE
  trap : USR1 TERM # until it is decided
  echo "$1" >"$LOGS/exit_code"
  say "ended with code $1"
  case "$1" in
  85 | 137 | 138 | 143) [ -n "$BACK" ] || decide "$1" ;; # 138, 143: it came before Python could listen
  esac
  if [ -n "$BACK" ]; then
    trap - USR1 TERM
    sleep 120
  fi
  exit "$1"
}
decide() { # CODE
  local now kills
  now=$(fate)
  kills=$(cat "$JOB"/attempt_*/exit_code | grep -cx 137)
  case "$now:$1" in
  restarted:*) say "Slurm has put it back already" ;;
  cancelled:*) say "it was cancelled: not put back" ;;
  preempted:*) put_back preempted ;;
  timeout:*) put_back "its time was over" ;;
  *:137)
    if [ "$kills" -le {{max_kills}} ]; then
      put_back "a rank was killed ($kills of {{max_kills}} times that are allowed, max_kills)"
    else
      say "a rank was killed, and {{max_kills}} times before (max_kills): not put back; does it need more memory?"
    fi
    ;;
  *) if [ -n "$ASKED" ]; then put_back "asked to stop ($ASKED)"; else
    say "the ranks were told to stop, and not by Slurm: not put back; submit it again to go on"
  fi ;;
  esac
}
