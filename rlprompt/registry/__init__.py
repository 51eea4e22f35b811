"""A registry of learned prompts: immutable versions by content, and names that point to them."""
