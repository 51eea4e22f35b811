"""Evaluation of prompts on held-out queries."""
