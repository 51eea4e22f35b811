"""What makes the data and pages of docs/; every script says in its first lines how it is run."""
