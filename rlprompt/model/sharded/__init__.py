"""A base of which each rank holds a part."""
