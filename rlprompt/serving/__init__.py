"""Prompts and rewards, asked from outside."""
