"""`rlprompt reward check`."""
