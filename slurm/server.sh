
# The last nodes of the job run the server, with one task each; it ends with the job.
SERVER_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n {{server_nodes}} | head -n 1)
SERVER=$(address_of "$SERVER_NODE")
# A proxy of the site is not asked for what runs in this job.
no_proxy=${no_proxy:-${NO_PROXY:-}}
no_proxy="${no_proxy:+$no_proxy,}$SERVER,$SERVER_NODE"
case "$SERVER" in *:*) SERVER="[$SERVER]" no_proxy="$no_proxy,$SERVER" ;; esac # IPv6, as in an address of the web
export no_proxy NO_PROXY="$no_proxy"
export SERVER RLPROMPT_SERVER="$SERVER"
srun --nodes={{server_nodes}} --ntasks={{server_nodes}} --relative={{nodes}} --output="${LOGS//%/%%}/server_%t.log" \
  {{srun_arguments}} \
  {{server_command}} &
SERVER_STEP=$!
