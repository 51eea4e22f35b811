"""Rewards that are rules."""
