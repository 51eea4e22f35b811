"""GGUF files of common families, made into folders that transformers reads."""
