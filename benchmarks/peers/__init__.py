"""The sides of a comparison, each a process of its own (`worker.py` has what they share)."""
