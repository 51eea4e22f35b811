"""Rewards that are computed elsewhere: HTTP reward servers, OpenAI-compatible judges, our server.

Nothing here unpickles or executes what comes over the network: only JSON is read, up to a size.
"""
