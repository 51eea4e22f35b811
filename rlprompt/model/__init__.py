"""Load and freeze a base model, tell which weights it has, and find the system slot."""
