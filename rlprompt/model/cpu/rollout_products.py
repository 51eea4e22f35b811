"""Products of a rollout, kept for the update that learns from it.

A decode step of the C++ kernels and the training forward give the same bits. What decoding has
multiplied need not be multiplied again: an update under the very prompt that was sampled under
takes the outputs of the layers' products from here, and computes only what lies between them.
Backward, LM head and everything else are as without.

Letters: B rows, n tokens, O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlprompt.types import Adapter, Completion, PrefixKV


class Product(Protocol):
    """A frozen linear map; see `rlprompt.model.cpu.packed_linear.PackedWeight`."""

    @property
    def inputs(self) -> int:
        """Numbers that go in."""
        ...

    @property
    def outputs(self) -> int:
        """Numbers that come out."""
        ...


class Recording:
    """Outputs of some products for every token that one rollout decoded.

    Memory is taken once and filled again by every rollout. Within the limit, products with the most
    work per byte are kept: those with the most inputs.
    """

    def __init__(self, products: Sequence[Product], kept: Sequence[Product], limit: int) -> None:
        """Keep nothing yet.

        Args:
            products: all of them, in the order of a decode step.
            kept: those whose outputs may be kept.
            limit: bytes.
        """
        self._products = products
        self._kept = kept
        self._limit = limit
        self._stores: dict[Product, Tensor] = {}
        self._capacity = 0
        self._used = 0
        self._places = torch.empty(0, 0, dtype=torch.int64)
        self._next = (torch.empty(0, dtype=torch.int64), 0)
        self._known: dict[int, tuple[Completion, Tensor]] = {}
        """By id; the completion itself is held so that its id stays its own."""
        self._prefix: PrefixKV | None = None

    def start(self, prefix: PrefixKV, most_tokens: int) -> None:
        """Begin a rollout; what was kept of the last one is gone.

        Args:
            prefix: what is sampled under.
            most_tokens: that may be decoded.
        """
        self._prefix = prefix
        self._known = {}
        self._used = 0
        if most_tokens != self._capacity:
            self._stores = {}
            self._capacity = most_tokens
            self._stores = self._make_room()

    def _make_room(self) -> dict[Product, Tensor]:
        """Memory of the chosen products; pages that are never written cost nothing."""
        left = self._limit
        stores = {}
        for product in sorted(self._kept, key=lambda product: (-product.inputs, product.outputs)):
            needed = 2 * self._capacity * product.outputs
            if 0 < needed <= left:
                left -= needed
                shape = (self._capacity, product.outputs)
                stores[product] = torch.empty(shape, dtype=torch.bfloat16)
        return stores

    def stores(self) -> list[Tensor | None]:
        """Where a step leaves the output of each product, with what an adapter adds to it, [n, O].

        Empty = nothing is kept.
        """
        if not self._stores:
            return []
        return [self._stores.get(product) for product in self._products]

    def begin_turn(self, rows: int, max_tokens: int) -> None:
        """Begin to decode `rows` completions."""
        self._places = torch.full((rows, max_tokens), -1)

    def begin_step(self, row_ids: Tensor, step: int) -> None:
        """The token numbered `step` of these rows, int64 [B], is about to be decoded."""
        self._next = (row_ids, step)

    def take(self) -> int:
        """The place of the first of the rows that a step leaves here, which it must then do."""
        row_ids, step = self._next
        first = self._used
        self._used += len(row_ids)
        self._places[row_ids, step] = torch.arange(first, self._used)
        return first

    def end_turn(self, completions: Sequence[Completion]) -> None:
        """The completions of the turn's rows, in their order."""
        for row, completion in enumerate(completions):
            places = self._places[row, : len(completion.token_ids) - 1]
            if bool((places >= 0).all()):
                self._known[id(completion)] = (completion, places)

    @contextmanager
    def replayed(
        self, completions: Sequence[Completion], prefix: PrefixKV, num_queries: int
    ) -> Iterator[bool]:
        """A block in which a forward of these completions takes its products from here.

        It does nothing, and gives False, where they were not all drawn in the last rollout, or
        under another prefix, bit for bit.

        Args:
            completions: those of a tree, in its order.
            prefix: that the forward attends to.
            num_queries: tokens of the tree's queries, which stand first and are computed.
        """
        known = [self._known.get(id(completion)) for completion in completions]
        found = [entry[1] for entry in known if entry is not None]
        if not self._stores or len(found) < len(known) or not self._is_under(prefix):
            yield False
            return
        token = _REPLAY.set(Replay(self._stores, num_queries, torch.cat(found)))
        try:
            yield True
        finally:
            _REPLAY.reset(token)

    def _is_under(self, prefix: PrefixKV) -> bool:
        mine = self._prefix
        if mine is None or mine.num_tokens != prefix.num_tokens:
            return False
        pairs = zip([*mine.keys, *mine.values], [*prefix.keys, *prefix.values], strict=True)
        return all(torch.equal(a, b) for a, b in pairs) and _same(mine.adapter, prefix.adapter)


def _same(mine: Adapter | None, other: Adapter | None) -> bool:
    """Whether two adapters add the same to the same layers, bit for bit."""
    if mine is None or other is None:
        return mine is other
    parts, others = mine.low_rank(), other.low_rank()
    if parts is None or others is None or parts.keys() != others.keys():
        return False
    pairs = [(parts[name], others[name]) for name in parts]
    return all(
        a.scale == b.scale and torch.equal(a.down, b.down) and torch.equal(a.up, b.up)
        for a, b in pairs
    )


@dataclass(frozen=True)
class Replay:
    """What products give in a forward of tokens that were decoded before."""

    stores: dict[Product, Tensor]
    first: int
    """Tokens before them, which are computed."""
    places: Tensor
    """int64 [n], in the stores."""

    def rows(self, product: Product, num_tokens: int) -> Tensor | None:
        """The store of a product, if this is the forward; the places say which rows of it."""
        if num_tokens != self.first + len(self.places):
            return None
        return self.stores.get(product)


_REPLAY: ContextVar[Replay | None] = ContextVar("replay", default=None)
_WANTED: ContextVar[bool] = ContextVar("wanted", default=False)


@contextmanager
def to_be_learned_from() -> Iterator[None]:
    """A block whose rollouts an update will follow: engines that can keep their products do."""
    token = _WANTED.set(True)
    try:
        yield
    finally:
        _WANTED.reset(token)


def is_wanted() -> bool:
    """Whether this thread draws completions to learn from."""
    return _WANTED.get()


def current_replay() -> Replay | None:
    """That of this thread's forward, if there is one."""
    return _REPLAY.get()
