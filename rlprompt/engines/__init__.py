"""Rollout engines: queries in, completions with token ids and sampling log-probabilities out."""
