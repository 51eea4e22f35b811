"""Algorithms: where their samples come from, and a per-token signal."""
