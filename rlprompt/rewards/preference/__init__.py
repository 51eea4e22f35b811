"""Rewards that ask a model on this machine: classifiers, pairs, ensembles, and a judging LM.

The one training command for them is in `trainer` (`rlprompt reward train`).
"""
