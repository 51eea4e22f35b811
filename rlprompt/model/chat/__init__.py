"""Chat templates: the slot, and text as tokens."""
