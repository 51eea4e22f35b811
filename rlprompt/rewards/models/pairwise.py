"""Reward: how often a completion beats others in the eyes of a model that compares two answers.

Letters: G completions of one query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.rewards.models.classifier import (
    Classifier,
    ClassifierSettings,
    resolve_model,
)
from rlprompt.rewards.models.options import SignatureOf
from rlprompt.rewards.models.preference import scored_once
from rlprompt.rewards.models.score_cache import ScoreCache
from rlprompt.rewards.rules.text import message_texts


class _Pair(NamedTuple):
    """A comparison to make."""

    query: str
    first: str
    """The answer in the first place."""
    second: str


class PairwiseSettings(ClassifierSettings):
    """Options of `builtin:pairwise`."""

    question: str = "{query}"
    """What the model reads as the user's turn; must hold {query}."""
    answers: str = "Answer A:\n{a}\n\nAnswer B:\n{b}"
    """What the model reads as the assistant's turn; must hold {a} and {b}."""
    against: str | None = None
    """Dataset column with an answer to beat; null compares each completion with its siblings in
    the group."""
    first_label: int = Field(default=0, ge=0)
    """For a model with two or more outputs: which says that A is better. A model with one output
    says it by a positive number."""
    cache_size: int = Field(default=50_000, ge=0)
    """Comparisons that are kept; equal ones are made once."""


class PairwiseReward:
    """The mean probability of being the better answer, in [0, 1]; see `PairwiseSettings`.

    Each pair is asked in both orders and averaged, because such models prefer one place. Against
    G - 1 siblings that is G * (G - 1) comparisons per group; a lone completion cannot be scored.

    Raises:
        InputError: the model cannot be loaded, or an option does not fit it.
    """

    __signature__ = SignatureOf(PairwiseSettings)

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.settings = PairwiseSettings(**options)
        for option, places in (("question", ["{query}"]), ("answers", ["{a}", "{b}"])):
            for place in places:
                if place not in getattr(self.settings, option):
                    raise InputError(f"option '{option}' does not hold {place}; add it")
        self._classifier = Classifier.load(self.settings)
        self.needs_all_ranks = self.settings.sharded
        outputs = len(self._classifier.labels)
        if self.settings.first_label >= outputs:
            raise InputError(
                f"first_label is {self.settings.first_label}, but the model has {outputs} output(s)"
                f"; correct it"
            )
        self._cache: ScoreCache[list[float]] = ScoreCache(self.settings.cache_size)

    @staticmethod
    def resolve_paths(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        """Options with paths relative to the recipe's folder made absolute."""
        return resolve_model(options, base_dir)

    def __reduce__(self) -> Any:
        return _remake, (self._options,)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        group_index: Sequence[int],
        **kwargs: Any,
    ) -> list[float | None]:
        """One value in [0, 1] per completion; None without anything to compare with."""
        queries, texts = message_texts(prompts), message_texts(completions)
        rivals = self._rivals(texts, group_index, kwargs)
        pairs: dict[_Pair, None] = {}
        for query, text, others in zip(queries, texts, rivals, strict=True):
            for other in others:
                pairs[_Pair(query, text, other)] = None
                pairs[_Pair(query, other, text)] = None
        table, _ = scored_once(self._cache, list(pairs), self._compare)
        first = {pair: row[0] for pair, row in zip(pairs, table, strict=True)}
        values: list[float | None] = []
        for query, text, others in zip(queries, texts, rivals, strict=True):
            wins = [
                (first[_Pair(query, text, other)] + 1.0 - first[_Pair(query, other, text)]) / 2
                for other in others
            ]
            values.append(sum(wins) / len(wins) if wins else None)
        return values

    def _rivals(
        self, texts: Sequence[str], group_index: Sequence[int], kwargs: Mapping[str, Any]
    ) -> list[list[str]]:
        column = self.settings.against
        if column is not None:
            if column not in kwargs:
                raise InputError(f"the data has no column {column!r} (against); add it")
            return [[] if answer is None else [str(answer)] for answer in kwargs[column]]
        groups: dict[int, list[int]] = {}
        for position, group in enumerate(group_index):
            groups.setdefault(group, []).append(position)
        return [
            [texts[other] for other in groups[group] if other != position]
            for position, group in enumerate(group_index)
        ]

    def _compare(self, pairs: Sequence[_Pair]) -> tuple[Tensor, float]:
        """[n, 1] probability that the first answer is better."""
        answers = self.settings.answers
        rows = [
            [
                {"role": "user", "content": self.settings.question.format(query=pair.query)},
                {"role": "assistant", "content": answers.format(a=pair.first, b=pair.second)},
            ]
            for pair in pairs
        ]
        logits, cut = self._classifier.logits(rows)
        if logits.shape[1] == 1:
            return torch.sigmoid(logits), cut
        return logits.softmax(dim=1)[:, self.settings.first_label, None], cut


def _remake(options: dict[str, Any]) -> PairwiseReward:
    return PairwiseReward(**options)
