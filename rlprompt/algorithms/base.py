"""What an algorithm is: a source of samples and a per-token signal.

The loop is blind to it. It asks for the per-completion `Signal` of a rollout batch once, and for
the token losses of each micro-batch; what it minimises is the weighted sum of their parts.

Letters: B completions, T tokens. Masks: True = the position counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlprompt.policy import TokenScores


@dataclass(frozen=True)
class Signal:
    """What each completion of a rollout batch is worth to the loss."""

    advantages: Tensor
    """[B] float32."""
    weights: Tensor
    """[B] float32: what one token counts for; the normaliser is global, so sums over micro-batches
    equal the loss of the whole batch."""
    metrics: Mapping[str, float]
    """Numbers about the batch, by their logged names."""


@dataclass(frozen=True)
class MicroSignal:
    """The rows of a micro-batch."""

    advantages: Tensor
    """[B, 1]."""
    weights: Tensor
    """[B, T]: 0 in the padding."""
    old_logprobs: Tensor | None
    """[B, T] before the first update; None in the first update, where they are the current ones."""
    ref_logprobs: Tensor | None
    """[B, T] under the reference; None when the algorithm needs none."""


@dataclass(frozen=True)
class TokenLosses:
    """Parts of the loss, each already weighted and summed: scalars that carry gradients."""

    rl: Tensor | None = None
    """Policy gradient."""
    kl: Tensor | None = None
    """Distance to the reference."""
    ce: Tensor | None = None
    """Cross-entropy to targets, and the (negative) entropy bonus."""
    value: Tensor | None = None
    """Value regression."""
    metrics: Mapping[str, Tensor] | None = None
    """Per token, [B, T], without gradient; logged as means over the tokens of the batch that have a
    weight."""

    def total(self) -> Tensor:
        """The scalar to differentiate.

        Raises:
            ValueError: no part is set.
        """
        parts = [part for part in (self.rl, self.kl, self.ce, self.value) if part is not None]
        if not parts:
            raise ValueError("an algorithm returned no loss")
        return sum(parts[1:], start=parts[0])


class Algorithm(Protocol):
    """A learning rule for on-policy rollouts."""

    @property
    def group_size(self) -> int:
        """Completions drawn per query."""
        ...

    @property
    def num_updates(self) -> int:
        """Updates per rollout batch."""
        ...

    @property
    def needs_reference(self) -> bool:
        """Whether the loss uses reference log-probabilities."""
        ...

    @property
    def entropy_grad(self) -> bool:
        """Whether the entropy takes part in the loss."""
        ...

    def signal(self, rewards: Tensor, lengths: Tensor, terminated: Tensor) -> Signal:
        """What each completion is worth.

        Args:
            rewards: [B] float32, groups beside each other, NaN = not scored.
            lengths: int64 [B].
            terminated: bool [B], False for completions cut at the token limit.
        """
        ...

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Token losses of a micro-batch."""
        ...
