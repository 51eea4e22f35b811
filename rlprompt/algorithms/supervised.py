"""Supervised prompt tuning: the cross-entropy of given completions (Lester et al., 2021).

Letters: B completions, b rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.algorithms.advantages import row_weights
from rlprompt.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    BatchView,
    MicroSignal,
    Signal,
    TokenLosses,
)
from rlprompt.policy import TokenScores


class SupervisedSettings(AlgorithmSettings):
    """Cross-entropy of completions that the dataset gives."""

    type: Literal["supervised"] = "supervised"
    """Algorithm."""
    completion_column: str = Field(default="completion", min_length=1)
    """Column of the dataset that holds the completions."""
    normalizer: Literal["token", "sequence"] = "token"
    """Mean over tokens, or over completions of token means."""

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The completions."""
        return (self.completion_column,)

    @property
    def needs_rewards(self) -> bool:
        """False."""
        return False


class Supervised(Algorithm):
    """The algorithm; see the module."""

    Settings = SupervisedSettings
    settings: SupervisedSettings

    def signal(self, view: BatchView) -> Signal:
        """All completions count; there are no advantages."""
        return Signal(torch.zeros(view.lengths.shape[0]), view.lengths)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """By the normaliser; see `row_weights`."""
        return row_weights(counted_lengths, self.settings.normalizer, max_tokens=1)

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Cross-entropy; see `Algorithm.losses`."""
        loss = -(micro.weights * scores.logprobs).sum()
        logprobs = scores.logprobs.detach()
        metrics = {"entropy": scores.entropy.detach(), "target_logprob": logprobs}
        return TokenLosses(ce=loss, metrics=metrics)
