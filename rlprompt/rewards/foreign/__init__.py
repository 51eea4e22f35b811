"""Reward functions of other libraries."""
