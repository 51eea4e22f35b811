"""Evaluation suites: what a learned prompt does, where, and at what price."""
