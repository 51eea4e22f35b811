"""Drawing tokens row by row until every row has ended: what a decode step is, and the plain loop.

Letters: B rows, G groups, d model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlprompt.engines.cache import AttendedCache, DecodeCache, DecodeContext, StepCache
from rlprompt.engines.sampling import Drawer
from rlprompt.model.cpu.rollout_products import ProductStore, ProductWriter, StepProducts
from rlprompt.model.forward.prefix_forward import PrefixForward

Progress = Callable[[int, int], None]
"""Called with (tokens drawn in the longest row, max_tokens)."""


class Decoder(Protocol):
    """Decode steps of one base under one adapter, or none."""

    @property
    def store(self) -> ProductStore | None:
        """Where steps can keep their products; None = they cannot."""
        ...

    def hidden(self, tokens: Tensor, cache: StepCache, kept: StepProducts | None = None) -> Tensor:
        """Final hidden states [B, d] of one new token per row; writes the cache's next column."""
        ...

    def is_current(self) -> bool:
        """Whether the base is still the one that the steps were made for."""
        ...


class ModuleDecoder:
    """Decode steps through the base's own modules, which serve every base and keep nothing."""

    store = None

    def __init__(self, forward: PrefixForward) -> None:
        """Decode with a base."""
        self._forward = forward

    def hidden(
        self, tokens: Tensor, cache: AttendedCache, kept: StepProducts | None = None
    ) -> Tensor:
        """See `Decoder.hidden`.

        Raises:
            ValueError: products are to be kept.
        """
        if kept is not None:
            raise ValueError("a base's own modules keep no products")
        context = DecodeContext(cache)
        return self._forward.hidden(self._forward.embed(tokens), cache.positions(), context)

    def is_current(self) -> bool:
        """True: modules are called as they are."""
        return True


class Row(NamedTuple):
    """What was drawn in one row."""

    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class TokenLoop:
    """Draws tokens until every row has ended."""

    drawer: Drawer
    stop: frozenset[int]
    """Tokens that end a row."""
    progress: Progress | None
    heard: Callable[[int], None] | None = None
    """Called with each token of the first row."""

    @property
    def max_tokens(self) -> int:
        """The tokens of the longest row."""
        return self.drawer.sampling.max_tokens

    def run(
        self,
        decoder: Decoder,
        cache: DecodeCache,
        states: Tensor,
        uniform: Tensor,
        writer: ProductWriter | None,
    ) -> list[Row]:
        """Decode the rows of a cache.

        Args:
            decoder: the decoder that makes the steps.
            cache: B rows, the same number for each of G groups.
            states: [G, d], what the first tokens are drawn from.
            uniform: [max_tokens, B] in [0, 1).
            writer: what says where products are kept; None = nowhere.

        Returns:
            What was drawn, in the first order of the rows.
        """
        sampling, device = self.drawer.sampling, states.device
        total = cache.num_rows
        logits = self.drawer.logits(states).repeat_interleave(total // len(states), 0)
        uniform = uniform.to(device)
        stop_ids = torch.tensor(sorted(self.stop), device=device, dtype=torch.int64)
        token_rows = torch.zeros(total, sampling.max_tokens, dtype=torch.int64, device=device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        logprob_rows = logits.new_zeros(total, sampling.max_tokens, dtype=wide)
        lengths = torch.zeros(total, dtype=torch.int64, device=device)
        row_ids = torch.arange(total, device=device)
        if writer is not None:
            writer.begin_turn(total, sampling.max_tokens)
        for step in range(sampling.max_tokens):
            banned = stop_ids if step < sampling.min_tokens else None
            tokens, logprobs = self.drawer.draw(logits, uniform[step, row_ids], banned)
            token_rows[row_ids, step] = tokens
            logprob_rows[row_ids, step] = logprobs
            lengths[row_ids] = step + 1
            if self.progress is not None:
                self.progress(step + 1, sampling.max_tokens)
            if self.heard is not None:
                self.heard(int(tokens[0]))
            finished = torch.isin(tokens, stop_ids)
            if bool(finished.any()):
                going_on = cache.drop(finished)
                row_ids, tokens = row_ids[going_on], tokens[going_on]
            if row_ids.numel() == 0 or step + 1 == sampling.max_tokens:
                break
            kept = None if writer is None else writer.begin_step(row_ids, step)
            logits = self.drawer.logits(decoder.hidden(tokens, cache, kept))
            cache.advance()
        ends = lengths.tolist()
        ids, scores = token_rows.tolist(), logprob_rows.tolist()
        return [Row(ids[i][: ends[i]], scores[i][: ends[i]]) for i in range(total)]
