"""The recipe: YAML, typed settings, and the objects that they name."""
