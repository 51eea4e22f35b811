"""The parts of `benchmarks/gpu_check.py`: what is run at first contact with a GPU."""
