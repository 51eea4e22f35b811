"""Rewards that ask a model: classifiers, pairs, ensembles, judges, here or behind an address.

Nothing here unpickles or executes what comes over the network: only JSON is read, up to a size.
The training of preference models is in `rlprompt.reward_training` (`rlprompt reward train`).
"""
