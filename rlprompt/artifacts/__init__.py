"""The published prompt: a directory of safetensors, JSON and a card."""
