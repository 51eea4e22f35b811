"""A model of one training step on a cluster: events, not a closed form. Needs no torch."""
