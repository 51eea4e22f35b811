"""Queries: where they come from, how they are divided, and in which order training draws them."""

from rlprompt.data.base import DataSettings, QuerySplit
from rlprompt.data.load import load_queries
from rlprompt.data.sampler import QuerySampler

__all__ = ["DataSettings", "QuerySampler", "QuerySplit", "load_queries"]
