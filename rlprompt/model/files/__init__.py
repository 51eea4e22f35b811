"""Where a base comes from: folders, the cache, wheels, GGUF."""
