"""The forward of packed tokens under a prefix."""
