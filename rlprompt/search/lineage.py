"""What was tried in a search: where each candidate came from, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlprompt.search.base import Trial


class Lineage:
    """One row per candidate, plain JSON values, in the order in which they were first tried.

    `id`, `parents` and `origin` are those of the `Candidate`; `kind` and `text` say what its prompt
    is; `first_step` counts from 1; `completions` were drawn, `scored` of them have a reward, and
    `reward` is their mean over all steps, None without any; `mean_length` is in tokens.
    """

    def __init__(self, state: Sequence[Mapping[str, Any]] = ()) -> None:
        """Go on with what `state` gave.

        Args:
            state: sums by candidate; nothing at the start.
        """
        self._sums = {int(row["id"]): dict(row) for row in state}

    def add(self, trial: Trial, step: int) -> None:
        """Take up a trial.

        Args:
            trial: what came of a candidate.
            step: number of the step, from 1.
        """
        tried = trial.candidate
        sums = self._sums.setdefault(
            tried.id,
            {
                "id": tried.id,
                "parents": list(tried.parents),
                "origin": tried.origin,
                "kind": tried.prompt.kind,
                "text": tried.prompt.init_text,
                "first_step": step,
                "completions": 0,
                "scored": 0,
                "reward_sum": 0.0,
                "length_sum": 0,
            },
        )
        known = trial.rewards[~trial.rewards.isnan()]
        sums["completions"] += trial.rewards.numel()
        sums["scored"] += known.numel()
        sums["reward_sum"] += float(known.double().sum())
        sums["length_sum"] += int(trial.lengths.sum())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows; see the class."""
        return [_row(sums) for sums in self._sums.values()]

    @property
    def completions(self) -> int:
        """Completions that were drawn and scored in all: the calls of the reward."""
        return sum(sums["completions"] for sums in self._sums.values())

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps, as plain JSON values that later trials leave alone."""
        return [dict(sums) for sums in self._sums.values()]


def _row(sums: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in sums.items() if not name.endswith("_sum")}
    return kept | {
        "reward": sums["reward_sum"] / sums["scored"] if sums["scored"] else None,
        "mean_length": sums["length_sum"] / sums["completions"],
    }
