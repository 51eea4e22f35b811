"""The base on a CPU: packed weights, joined layers, products of a rollout."""
