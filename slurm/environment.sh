# Slurm hands what follows to the tasks, also where the site or --export=NONE says otherwise.
export SLURM_EXPORT_ENV=ALL
# What is set already stays. One team of threads per rank, no larger than its share of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$((${SLURM_CPUS_ON_NODE:-1} / {{ranks_per_node}} > 0 ? ${SLURM_CPUS_ON_NODE:-1} / {{ranks_per_node}} : 1))}}
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1} PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
# Shards, sockets and log files: the usual 1024 descriptors are few.
HARD=$(ulimit -Hn)
if [ "$HARD" = unlimited ] || [ "$HARD" -gt 65536 ]; then HARD=65536; fi
[ "$(ulimit -Sn)" = unlimited ] || [ "$(ulimit -Sn)" -ge "$HARD" ] || ulimit -Sn "$HARD"
{{gpu_environment}}
