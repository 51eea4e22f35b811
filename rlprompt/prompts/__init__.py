"""Representations of a learned system prompt; each makes a `PrefixKV`."""
