"""Answers of a vLLM server on this machine, under prompts that only this side knows."""
