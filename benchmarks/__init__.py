"""What is measured; every script says in its first lines how it is run."""
