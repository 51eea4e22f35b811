"""Prompt distillation: the base under a long text teaches the base under the learned prompt.

The loss is a divergence between the two next-token distributions over the whole vocabulary, at
every token of completions that the dataset gives, the teacher writes, or the prompt itself writes
(on-policy; Agarwal et al., 2024, arXiv 2306.13649). Completions carry no gradient.

Letters: B completions, b rows of a micro-batch, T tokens, M = all tokens of a micro-batch.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlprompt.algorithms.advantages import row_weights
from rlprompt.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    BatchView,
    MicroSignal,
    Need,
    Signal,
    TokenLosses,
)
from rlprompt.algorithms.policy_gradient import refuse_changed
from rlprompt.kernels.divergence import Divergence, head_divergence
from rlprompt.kernels.lm_head import Head
from rlprompt.policy import Policy, TokenScores


class DistillSettings(AlgorithmSettings):
    """Distillation of a text system prompt into the learned one."""

    type: Literal["distill"] = "distill"
    """Algorithm."""
    teacher: str = Field(min_length=1)
    """System text that the base has as the teacher."""
    completions: Literal["teacher", "student", "given"] = "teacher"
    """Who writes the completions: the teacher, the learned prompt (on-policy), or the dataset."""
    completion_column: str = Field(default="completion", min_length=1)
    """Column of the dataset that holds the completions; for completions: given."""
    group_size: int = Field(default=1, ge=1, le=4096)
    """Completions drawn per query; not for completions: given."""
    divergence: Divergence = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or the generalised Jensen-Shannon
    divergence."""
    mixture: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The teacher's share of the mixture; for divergence: jensen_shannon."""
    temperature: float = Field(default=1.0, gt=0.0)
    """Both distributions are softened by it before they are compared."""
    normalizer: Literal["token", "sequence"] = "token"
    """Mean over tokens, or over completions of token means."""

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The completions when they are given."""
        return (self.completion_column,) if self.completions == "given" else ()

    @property
    def teacher_text(self) -> str:
        """The teacher's system text."""
        return self.teacher

    @property
    def draws_from_teacher(self) -> bool:
        """Whether the teacher writes the completions."""
        return self.completions == "teacher"

    @property
    def needs_rewards(self) -> bool:
        """False."""
        return False

    @model_validator(mode="after")
    def _distill_settings_have_effect(self) -> DistillSettings:
        if not self.teacher.strip():
            raise ValueError("teacher is blank; write the system text to distil")
        if self.completions == "given":
            refuse_changed(self, ("group_size",), "with completions: given; remove it")
        else:
            why = f"with completions: {self.completions}; remove it"
            refuse_changed(self, ("completion_column",), why)
        if self.divergence != "jensen_shannon":
            why = f"with divergence: {self.divergence}; remove it"
            refuse_changed(self, ("mixture",), why)
        return self


class Distill(Algorithm):
    """The algorithm; see the module."""

    Settings = DistillSettings
    settings: DistillSettings

    def __init__(self, settings: DistillSettings, max_tokens: int, head: Head) -> None:
        """Keep the settings and the base's LM head."""
        super().__init__(settings, max_tokens)
        self._head = head

    @classmethod
    def make(cls, settings: DistillSettings, policy: Policy, max_tokens: int, seed: int) -> Self:
        """With the base's LM head; see `Algorithm.make`."""
        del seed
        return cls(settings, max_tokens, policy.forward.head)

    @property
    def group_size(self) -> int:
        """Completions per query."""
        return self.settings.group_size

    @property
    def needs(self) -> frozenset[Need]:
        """The teacher's hidden states."""
        return frozenset({"teacher_states"})

    def signal(self, view: BatchView) -> Signal:
        """All completions count; there are no advantages."""
        return Signal(torch.zeros(view.lengths.shape[0]), view.lengths)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """By the normaliser; see `row_weights`."""
        return row_weights(counted_lengths, self.settings.normalizer, max_tokens=1)

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """The divergence; see `Algorithm.losses`."""
        settings = self.settings
        assert micro.teacher_states is not None
        divergence = scores.unflatten(
            head_divergence(
                scores.states,
                micro.teacher_states,
                self._head,
                settings.divergence,
                mixture=settings.mixture,
                temperature=settings.temperature,
            )
        )
        metrics = {"entropy": scores.entropy.detach(), "teacher_kl": divergence.detach()}
        return TokenLosses(kl=(micro.weights * divergence).sum(), metrics=metrics)
