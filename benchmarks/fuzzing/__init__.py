"""Hostile inputs by category, for benchmarks/fuzz.py."""
