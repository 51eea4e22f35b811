"""Rewards: the score of a preference model, or of several.

Letters: B completions, K labels, E members of an ensemble.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.rewards.models.classifier import (
    Classifier,
    ClassifierSettings,
    resolve_model,
)
from rlprompt.rewards.models.conversation import conversation
from rlprompt.rewards.models.options import SignatureOf
from rlprompt.rewards.models.score_cache import ScoreCache, content_key
from rlprompt.settings import Settings
from rlprompt.types import Message


class MemberSettings(ClassifierSettings):
    """A preference model, and how its outputs become one number."""

    activation: Literal["none", "sigmoid", "softmax"] = "none"
    """What is done to the outputs first. `sigmoid` of a model that `rlprompt reward train` made
    takes its calibration along: 0.5 is the threshold between good and bad."""
    attributes: dict[str, float] = Field(default_factory=dict)
    """For a model with several outputs: the weight of each, by label or number; those not named
    have weight 0."""


class PreferenceSettings(MemberSettings):
    """Options of `builtin:preference`."""

    cache_size: int = Field(default=10_000, ge=0)
    """Scores that are kept; equal conversations are scored once."""


class EnsembleSettings(Settings):
    """Options of `builtin:preference_ensemble`."""

    members: tuple[MemberSettings, ...] = Field(min_length=2)
    """The preference models; their values should be on one scale."""
    combine: Literal["mean", "min", "uncertainty"] = "mean"
    """`mean`; `min`, the most sceptical member; or `uncertainty`, mean - penalty * variance over
    the members, which distrusts what they disagree on (Coste et al. 2023, arXiv 2310.02743)."""
    penalty: float = Field(default=1.0, gt=0)
    """For `uncertainty`."""
    cache_size: int = Field(default=10_000, ge=0)
    """Scores that are kept; equal conversations are scored once."""


class PreferenceReward:
    """One preference model as a reward; see `PreferenceSettings` for its options.

    Logs `preference/cut_share`, the share of conversations too long for the model; with several
    attributes each of them as a column.

    Raises:
        InputError: the model cannot be loaded, or `attributes` do not fit its outputs.
    """

    __signature__ = SignatureOf(PreferenceSettings)

    def __init__(self, **options: Any) -> None:
        self._options = options
        settings = PreferenceSettings(**options)
        self._member = _Member(settings)
        self.needs_all_ranks = settings.sharded
        self._cache: ScoreCache[list[float]] = ScoreCache(settings.cache_size)

    @staticmethod
    def resolve_paths(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        """Options with paths relative to the recipe's folder made absolute."""
        return resolve_model(options, base_dir)

    def __reduce__(self) -> Any:
        return _remake, (PreferenceReward, self._options)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float]:
        """One value per completion."""
        rows = _conversations(prompts, completions)
        table, cut = scored_once(self._cache, rows, self._member.outputs)
        _log_metric(kwargs, "preference/cut_share", cut)
        if len(self._member.weights) > 1 and "log_extra" in kwargs:
            for position, label in enumerate(self._member.labels):
                kwargs["log_extra"](label, [row[position] for row in table])
        return self._member.values(torch.tensor(table)).tolist() if table else []


class EnsembleReward:
    """Several preference models as one reward; see `EnsembleSettings` for its options.

    Logs the column `preference_std` (between the members) and `preference/disagreement`, its mean.

    Raises:
        InputError: a member cannot be loaded, or `penalty` has no effect.
    """

    __signature__ = SignatureOf(EnsembleSettings)

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.settings = EnsembleSettings(**options)
        if "penalty" in options and self.settings.combine != "uncertainty":
            raise InputError(
                f"penalty has no effect with combine: {self.settings.combine}; remove it or set "
                f"combine: uncertainty"
            )
        self._members = [_Member(member) for member in self.settings.members]
        self.needs_all_ranks = any(member.sharded for member in self.settings.members)
        self._cache: ScoreCache[list[float]] = ScoreCache(self.settings.cache_size)

    @staticmethod
    def resolve_paths(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        """Options with paths relative to the recipe's folder made absolute."""
        members = options.get("members")
        if not isinstance(members, list | tuple):
            return dict(options)
        found = [resolve_model(m, base_dir) if isinstance(m, Mapping) else m for m in members]
        return {**options, "members": found}

    def __reduce__(self) -> Any:
        return _remake, (EnsembleReward, self._options)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float]:
        """One value per completion."""
        rows = _conversations(prompts, completions)
        table, _ = scored_once(self._cache, rows, self._member_values)
        if not table:
            return []
        scores = torch.tensor(table)  # [B, E]
        spread = scores.std(dim=1, correction=0)
        if "log_extra" in kwargs:
            kwargs["log_extra"]("preference_std", spread.tolist())
        _log_metric(kwargs, "preference/disagreement", float(spread.mean()))
        combined = scores.amin(dim=1) if self.settings.combine == "min" else scores.mean(dim=1)
        if self.settings.combine == "uncertainty":
            combined = combined - self.settings.penalty * spread.square()
        return combined.tolist()

    def _member_values(self, rows: Sequence[Sequence[Message]]) -> tuple[Tensor, float]:
        values, cuts = [], []
        for member in self._members:
            outputs, cut = member.outputs(rows)
            values.append(member.values(outputs))
            cuts.append(cut)
        return torch.stack(values, dim=1), max(cuts)


class _Member:
    """A classifier with the weights of its outputs."""

    def __init__(self, settings: MemberSettings) -> None:
        self._settings = settings
        self._classifier = Classifier.load(settings)
        self.labels = self._classifier.labels
        self.weights = self._weights()

    def outputs(self, rows: Sequence[Sequence[Message]]) -> tuple[Tensor, float]:
        """[B, K] after the activation, and the share that had to be shortened."""
        logits, cut = self._classifier.logits(rows)
        if self._settings.activation == "softmax":
            return logits.softmax(dim=1), cut
        if self._settings.activation == "sigmoid":
            card = self._classifier.card
            offset, temperature = card.get("offset", 0.0), card.get("temperature", 1.0)
            return ((logits - offset) / temperature).sigmoid(), cut
        return logits, cut

    def values(self, outputs: Tensor) -> Tensor:
        """[B] weighted sums of [B, K] outputs."""
        return outputs @ self.weights

    def _weights(self) -> Tensor:
        attributes = self._settings.attributes
        if len(self.labels) == 1:
            if attributes or self._settings.activation == "softmax":
                raise InputError(
                    "the preference model has one output, where attributes and softmax have no "
                    "effect; remove them"
                )
            return torch.ones(1)
        if not attributes:
            raise InputError(
                f"the preference model has {len(self.labels)} outputs ({', '.join(self.labels)}); "
                f"set attributes to the weight of each that counts"
            )
        weights = torch.zeros(len(self.labels))
        for name, weight in attributes.items():
            if name in self.labels:
                weights[self.labels.index(name)] = weight
            elif name.isdecimal() and int(name) < len(self.labels):
                weights[int(name)] = weight
            else:
                raise InputError(
                    f"the preference model has no output {name!r}; its outputs are "
                    f"{', '.join(self.labels)}"
                )
        return weights


def scored_once(
    cache: ScoreCache[list[float]],
    rows: Sequence[Any],
    score: Callable[[Sequence[Any]], tuple[Tensor, float]],
) -> tuple[list[list[float]], float]:
    """Scores of rows, each distinct one that the cache lacks scored once.

    Args:
        cache: earlier scores, by content.
        rows: JSON values.
        score: function of rows that gives [n, m] scores, and the share of rows that had to be
            shortened.

    Returns:
        A list of m numbers per row, and the share among the rows that were scored now.
    """
    keys = [content_key(row) for row in rows]
    found = {key: cache.get(key) for key in keys}
    wanted = {key: row for key, row in zip(keys, rows, strict=True) if found[key] is None}
    cut = 0.0
    if wanted:
        table, cut = score(list(wanted.values()))
        for key, numbers in zip(wanted, table.tolist(), strict=True):
            found[key] = numbers
            cache.put(key, numbers)
    return [found[key] or [] for key in keys], cut


def _conversations(prompts: Sequence[Any], completions: Sequence[Any]) -> list[list[Message]]:
    return [conversation(p, c) for p, c in zip(prompts, completions, strict=True)]


def _log_metric(kwargs: Mapping[str, Any], name: str, value: float) -> None:
    if "log_metric" in kwargs:
        kwargs["log_metric"](name, value)


def _remake(kind: Any, options: dict[str, Any]) -> Any:
    return kind(**options)
