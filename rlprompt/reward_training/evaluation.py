"""What is said of a trained preference model: on pairs, on single answers, and beside rules.

"Bad" is the finding: sensitivity is the share of bad answers that are called bad, specificity the
share of good answers that are called good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlprompt.reward_training.measures import (
    Bin,
    brier,
    exact_mcnemar,
    expected_calibration_error,
    fit_logistic,
    fit_temperature,
    reliability,
    share,
)
from rlprompt.reward_training.pairs import Judged, Pair, Sides
from rlprompt.reward_training.settings import RewardRecipe, RuleSettings
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import RewardSettings
from rlprompt.rewards.models.classifier import Classifier
from rlprompt.types import Completion, Group, Message, Query


@dataclass(frozen=True)
class Calibration:
    """How scores become probabilities."""

    offset: float
    """The score that is as likely good as bad; the median score where no answer is judged."""
    temperature: float
    """P(good) = sigmoid((score - offset) / temperature)."""
    pair_temperature: float
    """P(first is better) = sigmoid(difference / pair_temperature)."""


@dataclass(frozen=True)
class Findings:
    """The numbers, and what the reliability plot shows."""

    pairs: dict[str, Any]
    answers: dict[str, Any] | None
    rules: dict[str, dict[str, Any]]
    curves: dict[str, list[Bin]]


class Scorer:
    """Scores of a classifier; an answer that is in many pairs is scored once."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self._known: dict[str, float] = {}

    def margins(self, pairs: Sequence[Pair]) -> list[float]:
        """Score of the chosen minus score of the rejected answer."""
        chosen = self._scores([pair.chosen for pair in pairs])
        rejected = self._scores([pair.rejected for pair in pairs])
        return [a - b for a, b in zip(chosen, rejected, strict=True)]

    def scores(self, rows: Sequence[Judged]) -> list[float]:
        """The score of each answer."""
        return self._scores([row.messages for row in rows])

    def _scores(self, conversations: Sequence[tuple[Message, ...]]) -> list[float]:
        new = {repr(c): list(c) for c in conversations if repr(c) not in self._known}
        if new:
            logits, _ = self._classifier.logits(list(new.values()))
            self._known |= dict(zip(new, logits[:, 0].tolist(), strict=True))
        return [self._known[repr(c)] for c in conversations]


def calibrate(scorer: Scorer, sides: Sides, good_above: float | None) -> Calibration:
    """Fit threshold and temperatures on the calibration side."""
    differences = scorer.margins(sides.calibration)
    pair_temperature = fit_temperature(differences)
    rows = sides.calibration_rows
    if not rows or good_above is None:
        chosen = [Judged(pair.chosen, 1.0) for pair in sides.calibration]
        rejected = [Judged(pair.rejected, 0.0) for pair in sides.calibration]
        offset = statistics.median(scorer.scores([*chosen, *rejected]))
        return Calibration(offset, pair_temperature, pair_temperature)
    good = [row.score > good_above for row in rows]
    offset, temperature = fit_logistic(scorer.scores(rows), good)
    return Calibration(offset, temperature, pair_temperature)


def examine(
    scorer: Scorer,
    sides: Sides,
    calibration: Calibration,
    recipe: RewardRecipe,
    base_dir: Path,
) -> Findings:
    """Everything measured on the held-out side.

    Args:
        scorer: scorer with the trained model, read back from where it was saved.
        sides: sides of the data.
        calibration: calibration fitted on its side.
        recipe: recipe that names the rules to compare with.
        base_dir: folder of the recipe.

    Raises:
        InputError: a rule cannot be loaded, or failed.
    """
    pairs, curves = _pair_findings(scorer.margins(sides.heldout), calibration)
    good_above = getattr(recipe.data, "good_above", None)
    if good_above is None or not sides.heldout_rows:
        return Findings(pairs, None, {}, curves)
    rows = sides.heldout_rows
    good = [row.score > good_above for row in rows]
    chances = [
        _sigmoid((score - calibration.offset) / calibration.temperature)
        for score in scorer.scores(rows)
    ]
    called = [chance >= 0.5 for chance in chances]
    bins = reliability(chances, good)
    curves["answers"] = bins
    answers = _verdicts(called, good) | {
        "brier": brier(chances, good),
        "brier_of_base_rate": brier([sum(good) / len(good)] * len(good), good),
        "ece": expected_calibration_error(bins),
        "auc": area_under_curve(chances, good),
    }
    right = [a == b for a, b in zip(called, good, strict=True)]
    rules = {
        rule.reward.name: _beside(right, _rule_calls(rule, rows, base_dir), good)
        for rule in recipe.compare
    }
    return Findings(pairs, answers, rules, curves)


def area_under_curve(values: Sequence[float], good: Sequence[bool]) -> float:
    """Chance that a good answer scores above a bad one, ties half; NaN without both kinds."""
    ordered = sorted(zip(values, good, strict=True))
    ranks: dict[float, list[int]] = {}
    for rank, (value, _) in enumerate(ordered, start=1):
        ranks.setdefault(value, []).append(rank)
    positives, negatives = sum(good), len(good) - sum(good)
    if not positives or not negatives:
        return math.nan
    total = sum(sum(ranks[v]) / len(ranks[v]) for v, is_good in ordered if is_good)
    return (total - positives * (positives + 1) / 2) / (positives * negatives)


def _pair_findings(
    differences: Sequence[float], calibration: Calibration
) -> tuple[dict[str, Any], dict[str, list[Bin]]]:
    """Each pair is shown as (chosen, rejected) and turned round.

    Otherwise a constant confidence would be rewarded for always meeting the chosen answer first.
    """
    found: dict[str, Any] = {"accuracy": share([d > 0 for d in differences]).plain()}
    curves = {}
    outcomes = [True] * len(differences) + [False] * len(differences)
    for name, temperature in (("raw", 1.0), ("calibrated", calibration.pair_temperature)):
        both = [_sigmoid(d / temperature) for d in [*differences, *(-d for d in differences)]]
        bins = reliability(both, outcomes)
        found[name] = {"brier": brier(both, outcomes), "ece": expected_calibration_error(bins)}
        curves["pairs" if name == "calibrated" else "pairs, raw"] = bins
    return found, curves


def _verdicts(called_good: Sequence[bool], good: Sequence[bool]) -> dict[str, Any]:
    rows = list(zip(called_good, good, strict=True))
    return {
        "accuracy": share([a == b for a, b in rows]).plain(),
        "sensitivity": share([not a for a, b in rows if not b]).plain(),
        "specificity": share([a for a, b in rows if b]).plain(),
    }


def _rule_calls(rule: RuleSettings, rows: Sequence[Judged], base_dir: Path) -> list[bool]:
    settings: RewardSettings = rule.reward
    runner = build_rewards([settings], base_dir)
    groups = [_group(row, position) for position, row in enumerate(rows)]
    values = runner.score(groups, step=0).values[settings.name].tolist()
    runner.close()
    return [value >= rule.threshold for value in values]


def _group(row: Judged, index: int) -> Group:
    query = Query(tuple(row.messages[:-1]), dict(row.columns), index)
    answer = Completion((0,), (0.0,), row.messages[-1]["content"], True)
    return Group(query, (answer,))


def _beside(
    model_right: Sequence[bool], called: Sequence[bool], good: Sequence[bool]
) -> dict[str, Any]:
    right = [a == b for a, b in zip(called, good, strict=True)]
    compared = exact_mcnemar(model_right, right)
    return _verdicts(called, good) | {
        "only_model_right": compared.only_first,
        "only_rule_right": compared.only_second,
        "mcnemar_p": compared.p_value,
    }


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0
