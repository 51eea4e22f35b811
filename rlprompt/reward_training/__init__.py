"""`rlprompt reward train`: a preference model from preferences, with honest numbers about it."""
