"""Rewards in threads and processes, with a time limit."""
