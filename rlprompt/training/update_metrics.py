"""What an update did, added up: over micro-batches, over ranks, over the updates of a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlprompt.algorithms.base import MicroSignal, Signal, TokenLosses
from rlprompt.policy import TokenScores
from rlprompt.training.rows import Row, sampling_logprobs


@dataclass
class UpdateResult:
    """What an update did."""

    losses: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    token_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The algorithm's metrics, summed over the tokens that have a weight."""
    num_weighted: int = 0
    """How many those are: TRL's masks too leave out what the loss does not see."""
    row_sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """The algorithm's metrics of completions, summed over those that have a weight."""
    num_weighted_rows: int = 0
    """How many those are."""
    num_sampled: int = 0
    """Tokens that an engine drew."""
    gap_sum: float = 0.0
    """Absolute differences between sampling and training log-probabilities, over those tokens."""
    largest_gap: float = 0.0
    """The largest of them."""
    ratio_sum: float = 0.0
    """Probability of each of those tokens, over that which it was drawn with."""
    largest_ratio: float = 0.0
    """The largest of them."""
    kl_sum: float = 0.0
    """Estimates of KL(what drew them || what is trained), per token."""
    grad_norm: float = 0.0
    lr: float = 0.0


def summed(parts: Sequence[UpdateResult]) -> UpdateResult:
    """What all ranks did together."""
    total = parts[0]
    for part in parts[1:]:
        for mine, other in (
            (total.losses, part.losses),
            (total.token_sums, part.token_sums),
            (total.row_sums, part.row_sums),
        ):
            for name, value in other.items():
                mine[name] += value
        total.num_weighted += part.num_weighted
        total.num_weighted_rows += part.num_weighted_rows
        total.num_sampled += part.num_sampled
        total.gap_sum += part.gap_sum
        total.largest_gap = max(total.largest_gap, part.largest_gap)
        total.ratio_sum += part.ratio_sum
        total.largest_ratio = max(total.largest_ratio, part.largest_ratio)
        total.kl_sum += part.kl_sum
    return total


def account(
    result: UpdateResult,
    losses: TokenLosses,
    scores: TokenScores,
    signal: MicroSignal,
    rows: Sequence[Row],
) -> None:
    """Add a micro-batch's losses and token sums to the update's."""
    for name in ("rl", "kl", "ce", "value"):
        part = getattr(losses, name)
        if part is not None:
            result.losses[f"loss/{name}"] += float(part.detach())
    weighted = signal.weights > 0
    for name, values in (losses.metrics or {}).items():
        result.token_sums[name] += float((values * weighted).sum())
    result.num_weighted += int(weighted.sum())
    weighted_rows = weighted.any(dim=1)
    for name, values in (losses.row_metrics or {}).items():
        result.row_sums[name] += float((values * weighted_rows).sum())
    result.num_weighted_rows += int(weighted_rows.sum())
    sampled = sampling_logprobs(rows, scores)
    if sampled is None:
        return
    gap = (scores.logprobs.detach() - sampled) * scores.mask
    ratio = gap.exp() * scores.mask
    result.gap_sum += float(gap.abs().sum())
    result.largest_gap = max(result.largest_gap, float(gap.abs().max()))
    result.ratio_sum += float(ratio.sum())
    result.largest_ratio = max(result.largest_ratio, float(ratio.max()))
    result.kl_sum += float((ratio - scores.mask.to(ratio) - gap).sum())  # Schulman's k3
    result.num_sampled += int(scores.mask.sum())


def merged(
    results: Sequence[UpdateResult], signal: Signal, *, prefetched: bool = False
) -> dict[str, float]:
    """Means over tokens or completions, then over updates; a mean over none is left out.

    Args:
        results: the results of the updates on a batch, in their order.
        signal: the signal of the batch.
        prefetched: whether the batch was drawn ahead, see `RolloutBatch`; what tokens were drawn
            with then tells how old the batch is, and nothing of how well engine and training agree.
    """
    out: dict[str, float] = defaultdict(float)
    for result in results:
        share = 1.0 / len(results)
        for name, value in result.token_sums.items() if result.num_weighted else ():
            out[name] += share * value / result.num_weighted
        for name, value in result.row_sums.items() if result.num_weighted_rows else ():
            out[name] += share * value / result.num_weighted_rows
        for name, value in result.losses.items():
            out[name] += share * value
        out["loss"] += share * sum(result.losses.values())
        out["grad_norm"] += share * result.grad_norm
    # Later updates are off-policy on purpose: only the first compares like with like.
    first = results[0]
    if first.num_sampled and prefetched:
        out["sampling/importance_sampling_ratio/mean"] = first.ratio_sum / first.num_sampled
        out["sampling/importance_sampling_ratio/max"] = first.largest_ratio
        out["off_policy/kl"] = first.kl_sum / first.num_sampled
    elif first.num_sampled:
        out["sampling/sampling_logp_difference/mean"] = first.gap_sum / first.num_sampled
        out["sampling/sampling_logp_difference/max"] = first.largest_gap
    out["learning_rate"] = results[-1].lr
    return {**out, **signal.metrics}
