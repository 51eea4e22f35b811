"""Several prompts on the same queries, under the same draws, side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.prompts.base import Prompt
from rlprompt.rollout.collect import completion_rows


@dataclass(frozen=True)
class PromptScores:
    """How one prompt did."""

    name: str
    """What the prompt is called in the comparison."""
    reward: float
    """Mean total reward over the completions; NaN when none could be scored."""
    rewards: Mapping[str, float | None]
    """Mean of each reward by name; None when it scored nothing."""
    metrics: Mapping[str, Any]
    """All numbers, as a row of `evaluation.jsonl`."""
    completions: tuple[Mapping[str, Any], ...]
    """One row per completion: query, completion, reward, rewards, num_tokens, terminated."""


@dataclass(frozen=True)
class Comparison(Mapping[str, PromptScores]):
    """The scores of several prompts by name; all met the same queries and the same draws."""

    scores: Mapping[str, PromptScores]

    def __getitem__(self, name: str) -> PromptScores:
        """The scores of a prompt."""
        return self.scores[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in the order given."""
        return iter(self.scores)

    def __len__(self) -> int:
        """How many prompts were compared."""
        return len(self.scores)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row per prompt with all means; `pandas.DataFrame` takes the list."""
        return [_row(each) for each in self.scores.values()]

    def __str__(self) -> str:
        """A table of means."""
        names = _reward_names(self)
        lines = [["prompt", "reward", *names]]
        lines += [
            [each.name, _shown(each.reward), *(_shown(each.rewards.get(n)) for n in names)]
            for each in self.scores.values()
        ]
        widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        names = _reward_names(self)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("prompt", "reward", *names))
        body = "".join(
            f"<tr><td>{html.escape(each.name)}</td><td>{_shown(each.reward)}</td>"
            + "".join(f"<td>{_shown(each.rewards.get(name))}</td>" for name in names)
            + "</tr>"
            for each in self.scores.values()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def compare(evaluator: HeldoutEvaluator, prompts: Mapping[str, Prompt]) -> Comparison:
    """Evaluate prompts one after the other on what an evaluator holds.

    Args:
        evaluator: queries, rewards, sampling and seed, which all prompts meet alike.
        prompts: the prompts by name.

    Raises:
        InputError: a reward failed, or a query is too long for the base.
    """
    scores: dict[str, PromptScores] = {}
    for name, prompt in prompts.items():
        result = evaluator.evaluate(prompt, 0)
        rows = completion_rows(result.batch, "heldout", name)
        rewards: Any = result.metrics["rewards"]
        scores[name] = PromptScores(name, result.reward, rewards, result.metrics, tuple(rows))
    return Comparison(scores)


def _row(scores: PromptScores) -> dict[str, Any]:
    """One prompt's means; a reward that has the name of another column is `rewards/NAME`."""
    own = {"prompt": scores.name, "reward": scores.reward}
    others = _scalars(scores.metrics)
    rewards = {
        (f"rewards/{name}" if name in own or name in others else name): value
        for name, value in scores.rewards.items()
    }
    return {**own, **rewards, **others}


def _reward_names(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(name for each in comparison.scores.values() for name in each.rewards))


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k != "reward" and not isinstance(v, Mapping)}


def _shown(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"
