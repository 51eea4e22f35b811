"""From queries to scored completions.

Letters: B completions, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlprompt.engines.base import Generation
from rlprompt.model.cpu.rollout_products import RolloutProducts
from rlprompt.rewards.base import RewardBatch
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Completion, Group


@dataclass(frozen=True)
class RolloutBatch:
    """Scored completions of one step."""

    groups: tuple[Group, ...]
    rewards: RewardBatch
    rollout_seconds: float
    reward_seconds: float
    prefetched: bool = False
    """Whether the prompt has been updated since: sampling log-probabilities are then those of an
    earlier prompt."""
    products: RolloutProducts | None = field(default=None, compare=False, repr=False)
    """What the engine has multiplied for these completions, or some of them, and kept for an
    update under the same prompt; None = nothing."""

    @property
    def completions(self) -> list[Completion]:
        """All B completions, group by group."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def lengths(self) -> Tensor:
        """int64 [B], tokens of each completion."""
        return torch.tensor([c.num_tokens for c in self.completions])

    @property
    def terminated(self) -> Tensor:
        """Bool [B], False where the token limit cut a completion."""
        return torch.tensor([c.terminated for c in self.completions])


def collect(draw: Callable[[], Generation], rewards: RewardRunner, *, step: int) -> RolloutBatch:
    """Draw completions and score them.

    Args:
        draw: what lets an engine generate, under the prompt that it is synced with.
        rewards: the rewards, which score the whole batch at once.
        step: the number of updates made so far; rewards see it.

    Raises:
        InputError: a reward failed under `on_error: raise`.
    """
    start = time.perf_counter()
    drawn = draw()
    generated = time.perf_counter()
    scored = rewards.score(drawn.groups, step=step)
    return RolloutBatch(
        drawn.groups,
        scored,
        generated - start,
        time.perf_counter() - generated,
        products=drawn.products,
    )


def completion_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Lengths, truncation and reward of a batch under TRL's metric names.

    What rewards have logged is not among them: see `logged_metrics`. A mean over nothing is left
    out: the reward when none was scored, the length of terminated completions when all were cut.
    """
    lengths, ended = batch.lengths.float(), batch.terminated
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~ended).float().mean()),
    }
    if bool(ended.any()):
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
        metrics["completions/min_terminated_length"] = float(lengths[ended].min())
        metrics["completions/max_terminated_length"] = float(lengths[ended].max())
    total = batch.rewards.total
    known = total[~total.isnan()]
    if known.numel():
        metrics["reward"] = float(known.mean())
    if known.numel() > 1:
        metrics["reward_std"] = float(known.std())
    logged = batch.rewards.logged
    metrics |= _situation_metrics(batch)
    return metrics | {k: v for k, v in batch.rewards.metrics.items() if k not in logged}


def _situation_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Mean reward by situation, under `augment`; a situation without a known reward is left out."""
    names = [group.query.situation for group in batch.groups for _ in group.completions]
    metrics = {}
    for name in sorted(set(names) - {""}):
        own = batch.rewards.total[torch.tensor([each == name for each in names])]
        known = own[~own.isnan()]
        if known.numel():
            metrics[f"augment/{name}/reward"] = float(known.mean())
    return metrics


def logged_metrics(batch: RolloutBatch) -> dict[str, float]:
    """What rewards have logged of a batch with `log_metric`."""
    return {name: batch.rewards.metrics[name] for name in batch.rewards.logged}


def completion_rows(
    batch: RolloutBatch, split: str, who: str, advantages: Tensor | None = None
) -> list[dict[str, object]]:
    """Rows of `completions.jsonl`, one per completion.

    What rewards logged with `log_extra` follows under its own name, or `extra.name` where that is a
    name of the rows' own.
    """
    rows: list[dict[str, object]] = []
    pairs = [
        (group.query, completion) for group in batch.groups for completion in group.completions
    ]
    for position, (query, completion) in enumerate(pairs):
        row: dict[str, object] = {
            "split": split,
            "who": who,
            "query_index": query.index,
            "query": query.text,
            "completion": completion.text,
            "reward": float(batch.rewards.total[position]),
            "rewards": {k: float(v[position]) for k, v in batch.rewards.values.items()},
            "terminated": completion.terminated,
            "num_tokens": completion.num_tokens,
            "advantage": None if advantages is None else float(advantages[position]),
        }
        if query.situation:
            row["situation"] = query.situation
        if query.around is not None:
            row["around"] = {"before": query.around.before, "after": query.around.after}
        rows.append(row)
    names: set[str] = set()
    for column, values in batch.rewards.extras.items():
        name = column
        while (
            name in _ROW_KEYS or name in names or (name != column and name in batch.rewards.extras)
        ):
            name = f"extra.{name}"
        names.add(name)
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


_ROW_KEYS = frozenset(
    {
        "advantage",
        "around",
        "candidate",
        "completion",
        "num_tokens",
        "query",
        "query_index",
        "reward",
        "rewards",
        "situation",
        "split",
        "step",
        "terminated",
        "time",
        "who",
    }
)
"""Names of the columns that a run writes itself."""
