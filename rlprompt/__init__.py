"""rlprompt: learn the system prompt of a frozen language model with reinforcement learning."""

__version__ = "0.1.0.dev0"
