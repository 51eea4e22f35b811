"""How far two forwards of one base may be apart: what rounding does to the model's own forward.

A fixed tolerance is too wide for one model and too narrow for another: models differ in how far
they carry a rounding error. So the model itself is asked: its own forward once more, from
embeddings that are off by one rounding, says how far apart two correct forwards are.

Attention is written in two ways that are both right. A fused one keeps scores in float32; the plain
one (`eager` in transformers) rounds them to the dtype of the model, which is what rlprompt's
attention does too. Where scores are large (Qwen2's keys have large biases) that moves results by
more than a rounding of the embeddings, so in half precision a forward is held against both.

Letters: N compared tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PROBE_TOKENS = 24
"""Of the plain probe; a third each are prompt, query and completion."""
LONGEST_WINDOW = 1024
"""Sliding windows up to this are looked through; the config tells of longer ones."""
_FACTOR = 9.0
"""Three times as far as rounding moves log-probabilities: the divergence grows with the square."""
_LEAST = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-5, torch.bfloat16: 2e-4}
"""Divergence in nats that is let pass where rounding happens to do less."""
_MOST = 0.25
"""Divergence in nats that is never let pass."""


class Probe(NamedTuple):
    """Tokens to compare on, as prompt, query and completion."""

    prompt: Tensor
    query: Tensor
    completion: Tensor

    @property
    def token_ids(self) -> Tensor:
        """All of them."""
        return torch.cat(self)

    @property
    def num_compared(self) -> int:
        """N, the last tokens, whose predictions are compared."""
        return PROBE_TOKENS * 2 // 3


class Gap(NamedTuple):
    """How far a forward is from the model's own."""

    nats: float
    """Mean difference of log-probabilities, over the vocabulary."""
    divergence: float
    """Mean KL divergence in nats from the model's own distributions."""
    tolerance: float
    """The divergence that would pass."""

    @property
    def is_fine(self) -> bool:
        """Whether rounding explains it; false where something is not finite."""
        return self.divergence <= self.tolerance


class Expected(NamedTuple):
    """What the model's own forward gives for a probe."""

    probe: Probe
    logits: Tensor
    """[N, V]."""
    tolerance: float
    """Mean divergence in nats that a correct forward may have."""
    rounded_scores: Tensor | None = None
    """[N, V] with attention scores rounded to the model's dtype; None = not another forward."""

    def gap(self, ours: Tensor) -> Gap:
        """How far logits [N, V] are from the nearer of the model's own forwards."""
        each = [self.logits] if self.rounded_scores is None else [self.logits, self.rounded_scores]
        gaps = [gap(own, ours, self.tolerance) for own in each]
        return next((found for found in gaps if found.is_fine), gaps[0])


def probes(vocab_size: int, window: int | None, device: torch.device) -> list[Probe]:
    """The plain probe, and one that is longer than a sliding window.

    Args:
        vocab_size: the number of embeddings.
        window: the smallest window of the base's layers that the plain probe does not fill; None =
            there is none.
        device: where the ids live.
    """
    lengths = [PROBE_TOKENS]
    if window is not None and window <= LONGEST_WINDOW:
        lengths.append(PROBE_TOKENS + window)
    made = []
    for length in lengths:
        ids = torch.arange(length, device=device) * 7 % vocab_size
        third = PROBE_TOKENS // 3
        made.append(Probe(*ids.split([length - 2 * third, third, third])))
    return made


def roughened(embeddings: Tensor) -> Tensor:
    """Embeddings [n, d] of which every number is off by one rounding of its dtype."""
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, embeddings.shape, generator=generator).to(embeddings.device) * 2 - 1
    eps = torch.finfo(embeddings.dtype).eps
    return (embeddings.double() * (1.0 + 0.75 * eps * sign)).to(embeddings.dtype)


def tolerance(own: Tensor, again: Tensor) -> float:
    """The divergence that a correct forward may have.

    Args:
        own: [N, V] logits of the model's own forward.
        again: [N, V] the same from roughened embeddings.
    """
    rounding = gap(own, again).divergence
    return min(max(_LEAST[own.dtype], _FACTOR * rounding), _MOST)


def gap(own: Tensor, ours: Tensor, passes: float = 0.0) -> Gap:
    """How far logits [N, V] are from the model's own.

    Args:
        own: logits of the model's own forward.
        ours: logits of the other forward.
        passes: the tolerance.
    """
    right, other = (x.double().log_softmax(-1) for x in (own, ours.to(own.device)))
    difference = right - other
    divergence = (right.exp() * difference).sum(-1).mean().item()
    return Gap(difference.abs().mean().item(), divergence, passes)
