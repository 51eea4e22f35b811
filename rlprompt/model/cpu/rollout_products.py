"""Products of a rollout, kept for the update that learns from it.

A decode step of the C++ kernels and the training forward give the same bits. What decoding has
multiplied need not be multiplied again: an update under the very prompt that was sampled under
takes the outputs of the layers' products from the rollout, and computes only what lies between
them. Backward, LM head and everything else are as without.

An engine owns the memory, a `ProductStore`, and fills it again in every rollout that is to be
learned from. A batch carries `RolloutProducts`, which say where its tokens stand there; they are
valid until the memory is filled again. The forward of a micro-batch gets its `ProductRows`.

Letters: B rows, n tokens, O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlprompt.kernels.cpu.product import MOST_ROWS
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

    def forward_or_take(self, x: Tensor, products: ProductRows | None) -> tuple[Tensor, int]:
        """The outputs in fresh memory, without autograd, and how many of the first rows are new.

        The rows behind these are taken from `products`, with what an adapter adds to them.
        """
        ...

    def input_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the input, in fresh memory."""
        ...


class ProductStore:
    """Memory for the outputs of some products, for every token that one rollout decodes.

    It is taken once and filled again by every rollout. Within the limit, products with the most
    work per byte are kept: those with the most inputs.
    """

    def __init__(self, products: Sequence[Product], exact: Sequence[Product], limit: int) -> None:
        """Keep nothing yet.

        Args:
            products: all products, in the order of a decode step.
            exact: the products whose outputs have the bits of a training forward, so may be kept.
            limit: the most memory, in bytes.
        """
        self._products = products
        self._exact = exact
        self._limit = limit
        self._kept: dict[Product, Tensor] = {}
        self._capacity = 0
        self._rollout = 0

    @property
    def rollout(self) -> int:
        """The number of the rollout that the memory holds, counted from 1."""
        return self._rollout

    def start(self, prefix: PrefixKV, most_tokens: int) -> ProductWriter | None:
        """Begin a rollout; what was kept of the one before is not valid any more.

        Args:
            prefix: the prefix that is sampled under.
            most_tokens: the tokens that may be decoded.

        Returns:
            None = no product fits into the limit.
        """
        self._rollout += 1
        if most_tokens != self._capacity:
            self._kept = {}  # given back before more is taken
            self._capacity = most_tokens
            self._kept = self._make_room()
        return ProductWriter(self, prefix) if self._kept else None

    def _make_room(self) -> dict[Product, Tensor]:
        """Memory of the chosen products; pages that are never written cost nothing."""
        left = self._limit
        kept = {}
        for product in sorted(self._exact, key=lambda product: (-product.inputs, product.outputs)):
            needed = 2 * self._capacity * product.outputs
            if 0 < needed <= left:
                left -= needed
                shape = (self._capacity, product.outputs)
                kept[product] = torch.empty(shape, dtype=torch.bfloat16)
        return kept

    def tensors(self) -> list[Tensor | None]:
        """Where a decode step leaves the output of each product, [n, O]; None = nowhere."""
        return [self._kept.get(product) for product in self._products]

    def take(
        self, rollout: int, product: Product, places: Tensor, num_computed: int
    ) -> Tensor | None:
        """A copy of what a product gave in a rollout.

        Args:
            rollout: the number of the rollout.
            product: one of the products.
            places: int64 [n], the rows of the memory.
            num_computed: rows to leave free before them.

        Returns:
            [num_computed + n, O]; None = the product is not kept, or the memory has been filled
            again.
        """
        kept = self._kept.get(product)
        if kept is None or self._rollout != rollout:
            return None
        out = torch.empty(num_computed + len(places), product.outputs, dtype=kept.dtype)
        torch.index_select(kept, 0, places, out=out[num_computed:])
        # Asked once more: another thread may have begun to fill the memory meanwhile.
        return out if self._rollout == rollout else None


@dataclass(frozen=True)
class StepProducts:
    """Where one decode step leaves what its products give."""

    tensors: Sequence[Tensor | None]
    """[n, O] of each product, in the order of a step; None = nowhere."""
    first: int
    """The row of the first of the step's B rows."""


class ProductWriter:
    """Says where each token of one rollout goes in a store; made by `ProductStore.start`."""

    def __init__(self, store: ProductStore, prefix: PrefixKV) -> None:
        """Begin at the start of the memory."""
        self._store = store
        self._rollout = store.rollout
        self._prefix = prefix
        self._used = 0
        self._turn_places = torch.empty(0, 0, dtype=torch.int64)
        self._places: dict[int, CompletionPlaces] = {}

    def begin_turn(self, rows: int, max_tokens: int) -> None:
        """Begin to decode `rows` completions."""
        self._turn_places = torch.full((rows, max_tokens), -1)

    def begin_step(self, row_ids: Tensor, step: int) -> StepProducts | None:
        """Where the step leaves its products that decodes the token numbered `step` of some rows.

        Args:
            row_ids: int64 [B], rows of the turn.
            step: the number of the token, from 0.

        Returns:
            None = nothing of this step is kept: oneDNN multiplies so many rows, or a later rollout
            has the memory.
        """
        if len(row_ids) > MOST_ROWS or self._store.rollout != self._rollout:
            return None
        first = self._used
        self._used += len(row_ids)
        self._turn_places[row_ids, step] = torch.arange(first, self._used)
        return StepProducts(self._store.tensors(), first)

    def end_turn(self, completions: Sequence[Completion]) -> None:
        """Remember the completions of the turn's rows, in their order, that were kept whole."""
        for row, completion in enumerate(completions):
            places = self._turn_places[row, : len(completion.token_ids) - 1]
            if bool((places >= 0).all()):
                self._places[id(completion)] = CompletionPlaces(completion, places)

    def finish(self) -> RolloutProducts:
        """What was kept of the rollout."""
        return RolloutProducts(self._store, self._rollout, self._prefix, self._places)


@dataclass(frozen=True, eq=False)
class CompletionPlaces:
    """Where the tokens of a completion stand in a store."""

    completion: Completion
    """Held, so that its id stays its own."""
    places: Tensor
    """int64 [n], of all its tokens but the last."""


@dataclass(frozen=True, eq=False)
class RolloutProducts:
    """What was kept of a rollout; the batch that was drawn in it carries this."""

    store: ProductStore
    rollout: int
    """Its number in the store; the store has a higher one when it has been filled again."""
    prefix: PrefixKV
    """The prefix that was sampled under."""
    places: Mapping[int, CompletionPlaces]
    """By the id of the completion: equal ones may answer other queries."""

    def rows(
        self, completions: Sequence[Completion], prefix: PrefixKV, num_queries: int
    ) -> ProductRows | None:
        """The rows that a forward of some completions needs.

        Args:
            completions: the completions of a tree, in its order.
            prefix: the prefix that the forward attends to.
            num_queries: tokens of the tree's queries, which stand first and are computed.

        Returns:
            None = not all were drawn in this rollout, or not under this prefix bit for bit, or the
            memory has been filled again.
        """
        known = [self.places.get(id(completion)) for completion in completions]
        found = [entry.places for entry in known if entry is not None]
        if self.store.rollout != self.rollout or len(found) < len(known):
            return None
        if not found or not _is_same(self.prefix, prefix):
            return None
        return ProductRows(self.store, self.rollout, num_queries, torch.cat(found))


@dataclass(frozen=True, eq=False)
class ProductRows:
    """What products give in one forward of tokens that a rollout has decoded."""

    store: ProductStore
    rollout: int
    num_computed: int
    """Tokens before them, which are computed."""
    places: Tensor
    """int64 [n], in the store."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward."""
        return self.num_computed + len(self.places)

    def take(self, product: Product) -> Tensor | None:
        """Outputs [num_tokens, O] whose first `num_computed` rows are still to be written.

        None = there are none; the product is computed.
        """
        return self.store.take(self.rollout, product, self.places, self.num_computed)


def _is_same(mine: PrefixKV, other: PrefixKV) -> bool:
    """Whether two prefixes are equal, bit for bit."""
    if mine.num_tokens != other.num_tokens:
        return False
    pairs = zip([*mine.keys, *mine.values], [*other.keys, *other.values], strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and _adds_same(mine.adapter, other.adapter)


def _adds_same(mine: Adapter | None, other: Adapter | None) -> bool:
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
