"""What attention is given: the tensors of a layer that belong together, and how it scores them.

Letters: N packed tokens, B decoding rows, S own columns, P prefix tokens, H heads, H_kv key/value
heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """The heads of an attention layer."""

    queries: int
    """H."""
    keys: int
    """H_kv, of keys and of values; H is a multiple of it."""
    dim: int
    """D."""


class KeyValue(NamedTuple):
    """Keys and values of the same tokens: [H_kv, P, D] of a prefix, [B, H_kv, S, D] of a cache."""

    key: Tensor
    value: Tensor


class Packed(NamedTuple):
    """Tokens of many rows, packed behind each other."""

    query: Tensor
    """[N, H, D]."""
    key: Tensor
    """[N, H_kv, D]."""
    value: Tensor
    """[N, H_kv, D]."""


class Spans(NamedTuple):
    """Which columns of a decode cache each row sees."""

    firsts: Tensor
    """int32 [B], the first column."""
    lengths: Tensor
    """int32 [B], how many from there on; the new token stands in the last of them."""


class Scoring(NamedTuple):
    """How scores come about; one layer's."""

    scaling: float
    """Factor on the scores, usually D ** -0.5."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma); None = no cap."""
    window: int | None = None
    """Positions seen, the own included; None = all."""
