# A rank without its GPU ends with an error.
export RLPROMPT_GPUS_PER_NODE={{gpus_per_node}}
# Less memory lost between blocks of changing sizes.
[ -n "${PYTORCH_CUDA_ALLOC_CONF:-}" ] || export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# A collective that fails or hangs ends its rank, and what it did last is in the rank's log.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Compiled kernels on a local disk: locks and renames of network file systems are slow, or fail.
if [ -z "${TRITON_CACHE_DIR:-}" ]; then
  export TRITON_CACHE_DIR=${TMPDIR:-/tmp}/rlprompt_triton_$(id -u)_$SLURM_JOB_ID
fi
