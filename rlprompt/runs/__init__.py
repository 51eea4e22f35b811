"""The life of a run: state, checkpoints, budget, guards, its folder."""
