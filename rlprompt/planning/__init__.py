"""What a run needs on how many GPUs."""
