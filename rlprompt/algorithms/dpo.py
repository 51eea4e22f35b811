"""Preference optimisation on pairs that the dataset gives: DPO and IPO.

Rafailov et al., 2023 (arXiv 2305.18290); Azar et al., 2023 (arXiv 2310.12036). The reference is the
base under the recipe's reference prompt. Metrics have the names of TRL's DPOTrainer.

Letters: B completions (chosen and rejected in turn), b rows of a micro-batch, T tokens.
"""

from __future__ import annotations

from typing import Literal

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
from rlprompt.algorithms.preference import (
    PairLogprobs,
    PreferenceLoss,
    dpo_loss,
    implicit_rewards,
    ipo_loss,
)
from rlprompt.policy import TokenScores


class DPOSettings(AlgorithmSettings):
    """Preference optimisation on pairs of a chosen and a rejected completion."""

    type: Literal["dpo"] = "dpo"
    """Algorithm."""
    loss: PreferenceLoss = "sigmoid"
    """DPO's loss, or IPO's."""
    kl_coef: float = Field(default=0.1, gt=0.0)
    """Weight of the KL to the reference in the problem that is solved (DPO's beta, IPO's tau)."""
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    """Share of pairs assumed to be the wrong way round; for loss: sigmoid."""
    chosen_column: str = Field(default="chosen", min_length=1)
    """Column of the dataset that holds the better completions."""
    rejected_column: str = Field(default="rejected", min_length=1)
    """Column of the dataset that holds the worse completions."""

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Chosen, then rejected."""
        return (self.chosen_column, self.rejected_column)

    @property
    def needs_reference(self) -> bool:
        """True."""
        return True

    @property
    def needs_rewards(self) -> bool:
        """False."""
        return False

    @model_validator(mode="after")
    def _dpo_settings_have_effect(self) -> DPOSettings:
        if self.chosen_column == self.rejected_column:
            raise ValueError(
                f"chosen_column and rejected_column are both '{self.chosen_column}'; name two "
                "columns"
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no effect with loss: ipo; remove it")
        return self


class DPO(Algorithm):
    """The algorithm; see the module."""

    Settings = DPOSettings
    settings: DPOSettings

    @property
    def group_size(self) -> int:
        """A pair."""
        return 2

    @property
    def needs(self) -> frozenset[Need]:
        """The reference's log-probabilities."""
        return frozenset({"ref_logprobs"})

    @property
    def whole_groups(self) -> bool:
        """True: the loss is about a pair."""
        return True

    def signal(self, view: BatchView) -> Signal:
        """All completions count; there are no advantages."""
        return Signal(torch.zeros(view.lengths.shape[0]), view.lengths)

    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """1 / B for every completion, spread over its tokens."""
        return row_weights(counted_lengths, "sequence", max_tokens=1)

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """The loss of each pair, averaged over pairs; see `Algorithm.losses`."""
        settings = self.settings
        assert micro.ref_logprobs is not None
        sums = (scores.logprobs * scores.mask).sum(dim=1).view(-1, 2)
        ref_sums = (micro.ref_logprobs * scores.mask).sum(dim=1).view(-1, 2)
        pairs = PairLogprobs(sums[:, 0], sums[:, 1], ref_sums[:, 0], ref_sums[:, 1])
        if settings.loss == "ipo":
            lengths = scores.mask.sum(dim=1).view(-1, 2)
            loss = ipo_loss(pairs, lengths[:, 0], lengths[:, 1], settings.kl_coef)
        else:
            loss = dpo_loss(pairs, settings.kl_coef, settings.label_smoothing)
        weights = micro.weights.sum(dim=1).view(-1, 2).sum(dim=1)  # [b / 2]
        return TokenLosses(
            rl=(weights * loss).sum(),
            metrics={"entropy": scores.entropy.detach()},
            row_metrics=_pair_metrics(pairs, settings.kl_coef),
        )


def _pair_metrics(pairs: PairLogprobs, kl_coef: float) -> dict[str, Tensor]:
    """TRL's metrics of pairs, [b]: each pair's number on both of its rows."""
    chosen, rejected = (side.detach() for side in implicit_rewards(pairs, kl_coef))
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
    }
    return {name: values.repeat_interleave(2) for name, values in metrics.items()}
