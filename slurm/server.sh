
# The last nodes of the job run the server, with one task each; it ends with the job.
SERVER_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n {{server_nodes}} | head -n 1)
SERVER=$(scontrol show node --oneliner "$SERVER_NODE" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
export SERVER
srun --nodes={{server_nodes}} --ntasks={{server_nodes}} --relative={{nodes}} --output="$LOGS/server_%t.log" \
  {{server_command}} &
