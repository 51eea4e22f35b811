#!/usr/bin/env bash
# A private Slurm on this machine: real daemons, several nodes on 127.0.0.N, pretended GPUs.
#
#   bash scripts/slurm_local.sh up DIR [NODES]     start it (default: 2 nodes); then
#   export SLURM_CONF=DIR/slurm.conf               for sbatch, squeue, rlprompt submit
#   bash scripts/slurm_local.sh down DIR           cancel its jobs and stop its own daemons
#
# Needs root and the Debian packages slurm-wlm and munge. Everything it writes is below DIR, which
# should be short (a socket's path has about 100 characters) and new. RLPROMPT_SLURM_PORT moves the
# ports of the controller and of the nodes after it. Exit code 3: Slurm cannot run here, and why.
#
# Partition `main` is preempted, with a requeue, by partition `urgent`, and so is `cheap`, whose jobs
# are cancelled.
set -euo pipefail

readonly PORT="${RLPROMPT_SLURM_PORT:-16917}"
readonly WAIT_TENTHS=150

cannot() { printf 'slurm_local: %s\n' "$*" >&2; exit 3; }

require() {
  [[ $EUID == 0 ]] || cannot "needs root"
  local command
  for command in munged slurmctld slurmd sbatch squeue; do
    command -v "$command" >/dev/null ||
      cannot "no $command here: apt-get install slurm-wlm munge"
  done
}

# A zombie that nobody reaps still answers `kill -0`, but it has no executable any more.
alive() { readlink "/proc/$1/exe" >/dev/null 2>&1; }

write_configuration() { # DIR NODES
  local dir="$1" nodes="$2" host memory cpus i
  host="$(hostname -s)"
  cpus="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # nproc tells OpenMP's share where it is set
  memory="$(awk '/^MemTotal/ { print int($2 / 1024 * 0.9) }' /proc/meminfo)"
  {
    cat <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Until a credential expires, 120 s by default, a requeued job does not start again.
AuthInfo=socket=$dir/run/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmdLogFile=$dir/log/slurmd.%n.log
SlurmdSpoolDir=$dir/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/finished_jobs.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
# The batch script, too, gets its --signal when its job is preempted.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
GresTypes=gpu
KillWait=10
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=15
MailProg=/bin/true
CONF
    for ((i = 1; i <= nodes; i++)); do
      echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.$i Port=$((PORT + i)) CPUs=$cpus" \
        "RealMemory=$memory Gres=gpu:2 State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE PriorityTier=1" \
      "PreemptMode=REQUEUE GraceTime=20"
    echo "PartitionName=cheap Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=1" \
      "PreemptMode=CANCEL GraceTime=3"
    echo "PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=10"
  } >"$dir/slurm.conf"
  echo "NodeName=n[1-$nodes] Name=gpu File=$dir/dev/gpu[0-1]" >"$dir/gres.conf"
  # slurmd 22.05 looks for cgroups, and ends without them, though no cgroup plugin is in use.
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
}

start_daemons() { # DIR NODES
  local dir="$1" nodes="$2" i
  mkdir -p "$dir"/{run,state,spool,log,dev}
  chmod 0755 "$dir" "$dir/run"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  for i in 0 1; do
    mknod "$dir/dev/gpu$i" c 1 3 || cannot "no device files can be made in $dir"
  done
  write_configuration "$dir" "$nodes"
  export SLURM_CONF="$dir/slurm.conf"
  # --force: else no socket below a folder that others cannot search, such as pytest's.
  munged --force --num-threads=2 --key-file="$dir/munge.key" --socket="$dir/run/munge.sock" \
    --pid-file="$dir/run/munged.pid" --log-file="$dir/log/munged.log" \
    --seed-file="$dir/run/munge.seed" 2>"$dir/log/munged.err" ||
    cannot "munged does not start: $(tail -n 1 "$dir/log/munged.err")"
  slurmctld -c -f "$SLURM_CONF" 2>>"$dir/log/start.err" || cannot "slurmctld does not start"
  for ((i = 1; i <= nodes; i++)); do
    slurmd -N "n$i" -f "$SLURM_CONF" 2>>"$dir/log/start.err" || cannot "slurmd does not start"
  done
}

idle_nodes() { sinfo --noheader --Node --partition=main --states=idle -o %N 2>/dev/null | wc -l; }

up() { # DIR NODES
  local dir nodes="$2" i
  require
  dir="$(realpath -m "$1")"
  [[ ! -e "$dir/slurm.conf" ]] || cannot "$dir holds a cluster already; stop it and delete it"
  trap "down $(printf %q "$dir")" EXIT
  start_daemons "$dir" "$nodes"
  for ((i = 0; i < WAIT_TENTHS; i++)); do
    [[ "$(idle_nodes)" != "$nodes" ]] || break
    sleep 0.1
  done
  if [[ "$(idle_nodes)" != "$nodes" ]]; then
    tail -n 5 "$dir"/log/slurm*.log >&2
    cannot "the nodes did not come up: $(sinfo --noheader -R 2>&1 | head -n 1)"
  fi
  trap - EXIT
  echo "$nodes nodes are idle; export SLURM_CONF=$dir/slurm.conf"
}

down() { # DIR
  local dir pid file i running pids=()
  dir="$(realpath -m "$1")"
  if [[ -e "$dir/slurm.conf" ]] && command -v scancel >/dev/null; then
    SLURM_CONF="$dir/slurm.conf" timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
    sleep 0.3
  fi
  for file in "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid" "$dir/run/munged.pid"; do
    [[ -s "$file" ]] || continue
    pid="$(<"$file")"
    pids+=("$pid")
    kill "$pid" 2>/dev/null || true
  done
  for ((i = 0; i < WAIT_TENTHS; i++)); do
    running=0
    for pid in "${pids[@]}"; do
      ! alive "$pid" || running=1
    done
    ((running)) || return 0
    sleep 0.1
  done
  printf 'slurm_local: a daemon of %s does not stop (%s)\n' "$dir" "${pids[*]}" >&2
  return 1
}

case "${1:-}" in
  up) up "${2:?up needs a folder}" "${3:-2}" ;;
  down) down "${2:?down needs a folder}" ;;
  *)
    printf 'usage: bash scripts/slurm_local.sh up DIR [NODES] | down DIR\n' >&2
    exit 2
    ;;
esac
