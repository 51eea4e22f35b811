
# The last nodes of the job run the server, with one task each; it ends with the job.
SERVER_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n {{server_nodes}} | head -n 1)
SERVER=$(scontrol show node --oneliner "$SERVER_NODE" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export SERVER
# A proxy of the site is not asked for what runs in this job.
no_proxy=${no_proxy:-${NO_PROXY:-}}
no_proxy="${no_proxy:+$no_proxy,}$SERVER"
export no_proxy NO_PROXY="$no_proxy"
srun --nodes={{server_nodes}} --ntasks={{server_nodes}} --relative={{nodes}} --output="$LOGS/server_%t.log" \
  {{server_command}} &
