"""Searchers: they find a prompt from outputs and scores alone, without a gradient."""
