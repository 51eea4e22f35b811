"""Prompts in the formats of other programs: PEFT, transformers, vLLM, raw tensors, text."""
