"""Several ranks: who does what, and an engine that they share."""
