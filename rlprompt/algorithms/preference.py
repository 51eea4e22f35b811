"""Losses on pairs of a chosen and a rejected completion: pure functions of tensors.

Letters: N pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceLoss = Literal["sigmoid", "ipo"]


class PairLogprobs(NamedTuple):
    """Log-probabilities of the pairs' completions, summed over their tokens; each [N]."""

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


def implicit_rewards(pairs: PairLogprobs, kl_coef: float) -> tuple[Tensor, Tensor]:
    """What the policy behaves as if it were rewarded with, of chosen and rejected, [N] each.

    kl_coef * log(p / p_ref), up to a term of the query alone (Rafailov et al., 2023, arXiv
    2305.18290, eq. 5).
    """
    chosen = kl_coef * (pairs.chosen - pairs.ref_chosen)
    return chosen, kl_coef * (pairs.rejected - pairs.ref_rejected)


def dpo_loss(pairs: PairLogprobs, kl_coef: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, [N] (Rafailov et al., 2023, arXiv 2305.18290, eq. 7).

    Args:
        pairs: the log-probabilities; those of the policy carry the gradient.
        kl_coef: the paper's beta, the weight of the KL in the problem that is solved.
        label_smoothing: the share of pairs assumed to be the wrong way round, in [0, 0.5)
            (conservative DPO, Mitchell, 2023).
    """
    chosen, rejected = implicit_rewards(pairs, kl_coef)
    margin = chosen - rejected
    loss = -(1.0 - label_smoothing) * logsigmoid(margin)
    return loss - label_smoothing * logsigmoid(-margin) if label_smoothing else loss


def ipo_loss(
    pairs: PairLogprobs, chosen_lengths: Tensor, rejected_lengths: Tensor, kl_coef: float
) -> Tensor:
    """Identity preference optimisation, [N] (Azar et al., 2023, arXiv 2310.12036, eq. 17).

    (margin - 1 / (2 kl_coef))^2, where the margin is between *mean* log-ratios per token: with sums
    the target would mean something else for every length.

    Args:
        pairs: the log-probabilities; those of the policy carry the gradient.
        chosen_lengths: [N], tokens of the chosen completions.
        rejected_lengths: [N].
        kl_coef: the paper's tau.
    """
    chosen = (pairs.chosen - pairs.ref_chosen) / chosen_lengths.clamp_min(1)
    rejected = (pairs.rejected - pairs.ref_rejected) / rejected_lengths.clamp_min(1)
    return (chosen - rejected - 1.0 / (2.0 * kl_coef)).square()
