"""Jobs on a Slurm cluster: what is asked of it, the scripts, the queue, and how jobs fare."""
