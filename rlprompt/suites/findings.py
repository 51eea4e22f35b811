"""What stands out in an evaluation, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_FEATURES = 3
"""Features of the answers that are told."""


def findings(result: Mapping[str, Any]) -> list[str]:
    """What differs beyond chance, all that was looked at together, in plain words.

    Args:
        result: what `SuiteRun.evaluate` gave.

    Returns:
        Sentences: situations in which a reward falls, side effects, and how answers changed; one
        that says so where there is nothing.
    """
    found = [*_situations(result), *_side_effects(result), *_features(result)]
    return found or [
        "nothing differs beyond chance between the situations, or beside the rewards; few queries "
        "find large changes only"
    ]


def _situations(result: Mapping[str, Any]) -> list[str]:
    sentences = []
    for row in result["situations"]:
        for name, cell in row["rewards"].items():
            change = cell["change"]
            if change["outcome"] == "worse":
                sentences.append(
                    f"in the situation {row['situation']} the value of {name} falls by "
                    f"{-change['value']:.3f} (change {_range(change)})"
                )
    return sentences


def _side_effects(result: Mapping[str, Any]) -> list[str]:
    sentences = []
    for measure in result["measures"]:
        for name, number in measure["numbers"].items():
            against = number["minus_base"]
            if against["outcome"] not in ("better", "worse"):
                continue
            way = "higher" if against["outcome"] == "better" else "lower"
            good = number["higher_is"]
            verdict = ""
            if good != "other":
                verdict = ", which is " + (
                    "better" if (way == "higher") == (good == "better") else "worse"
                )
            sentences.append(
                f"{measure['measure']}: {name} is {way} than the base's by "
                f"{abs(against['value']):.3f} (difference {_range(against)})"
                f"{verdict}"
            )
    return sentences


def _features(result: Mapping[str, Any]) -> list[str]:
    sure = [each for each in result["difference"] if each["p_value"] <= 0.05]
    return [
        f"on everyday questions, {each['feature']} goes from {each['base']:.3g} to "
        f"{each['prompt']:.3g} (p = {each['p_value']:.2g} after correction)"
        for each in sure[:MOST_FEATURES]
    ]


def _range(number: Mapping[str, Any]) -> str:
    low, high = (
        "unbounded" if number[side] is None else f"{number[side]:+.3f}" for side in ("low", "high")
    )
    return f"{low} to {high}"
