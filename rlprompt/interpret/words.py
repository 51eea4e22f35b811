"""The findings of an inspection in plain words, each with its number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CHANCE = 0.05
"""A p-value above it may be chance."""
ENOUGH = 0.7
"""A sentence that recovers so much is called an explanation."""


def summary(report: Mapping[str, Any]) -> list[str]:
    """Sentences for the top of the page.

    Args:
        report: what `inspection.inspect` found.
    """
    lines = [_behaviour(report["behaviour"])]
    lines += [_sentence(report)]
    lines += [_controls(report)] if report["sentences"] and report["controls"] else []
    lines += [_nearest(report["nearest"])] if report["nearest"] else []
    lines += [_importance(report["importance"])] if report["importance"] else []
    rewarded = report["reward_importance"]
    lines += [_reward_importance(rewarded)] if rewarded else []
    lines += [_inside(report["inside"])] if report["inside"]["layers"] else []
    lines += _readouts(report["readouts"]) if report["readouts"] else []
    lines += [_sum(row) for row in report["sums"]]
    lines += [each["sentence"] for each in report["anomalies"] if each["raised"]]
    lines += [_triggers(report["triggers"])] if report["triggers"] else []
    return [line for line in lines if line]


def percent(share: Mapping[str, float] | None) -> str:
    """A share with its interval.

    Args:
        share: value, low and high; None = not known.
    """
    if share is None:
        return "an unknown share"
    return f"{share['value']:.0%} ({share['low']:.0%} to {share['high']:.0%})"


def _behaviour(found: Mapping[str, Any]) -> str:
    kl = found["base_kl"]
    line = (
        f"The prompt moves each token of its answers by {kl['value']:.2f} nats "
        f"({kl['low']:.2f} to {kl['high']:.2f}) away from the base without a system message"
    )
    gain = found["gain"]
    if gain is None:
        return f"{line}; no reward is known, so shares are of this distance."
    shown = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    if gain["outcome"] == "better":
        return f"{line}, and raises the reward by {shown}."
    return f"{line}; that it raises the reward is not shown ({shown})."


def _sentence(report: Mapping[str, Any]) -> str:
    rows = report["sentences"]
    if not rows:
        return "No sentence could be measured: there was no candidate, or no time."
    best = rows[0]
    share, gain = best["kl_share"], best["gain_share"]
    judged = gain if gain is not None else share
    if judged is None:
        said = "nobody can say how much it explains, since the prompt hardly changes anything"
    elif judged["low"] >= ENOUGH:
        said = "it explains the prompt"
    elif judged["high"] < ENOUGH:
        said = "it is not the whole of it"
    else:
        said = "it may explain the prompt, and the queries are too few to say so"
    recovered = f"{percent(share)} of the distance"
    if gain is not None:
        recovered = f"{percent(gain)} of the gain in reward and {recovered}"
    return f'The best sentence found is "{best["text"]}". It recovers {recovered}: {said}.'


def _controls(report: Mapping[str, Any]) -> str:
    rows = report["controls"]
    beaten = [row["name"] for row in rows if row["sentence_is_nearer"]["outcome"] == "better"]
    others = [row["name"] for row in rows if row["name"] not in beaten]
    if not others:
        return f"It is shown to be nearer to the prompt than every control: {', '.join(beaten)}."
    if not beaten:
        return f"It is not shown to be nearer than any control: {', '.join(others)}."
    return (
        f"It is shown to be nearer than {', '.join(beaten)}; not shown to be nearer than "
        f"{', '.join(others)}."
    )


def _nearest(found: Mapping[str, Any]) -> str:
    meaning = {
        "wayward": "so they do not explain it, whatever they seem to say",
        "explains": "so they do explain it",
        "unclear": "which is too uncertain to lean on",
        "unknown": "and what they do is not known",
    }[found["verdict"]]
    return (
        f'Its nearest tokens read "{found["text"]}" (mean cosine distance {found["gap"]:.2f}). '
        f"They recover {percent(found['kl_share'])} of the distance, {meaning}."
    )


def _importance(found: Mapping[str, Any]) -> str:
    rows = found["spans"]
    if len(rows) < 2 or found["whole"] <= 0:
        return ""
    key = "shapley" if "shapley" in rows[0] else "alone"
    best = max(rows, key=lambda row: float(row[key]))
    near = f' (nearest to "{best["near"].strip()}")' if best["near"] else ""
    error = f", standard error {best['error']:.2f}" if key == "shapley" else ""
    return (
        f"Of its positions, {best['positions']}{near} matters most: {best[key]:.2f} of "
        f"{found['whole']:.2f} nats per token{error}."
    )


def _reward_importance(found: Mapping[str, Any]) -> str:
    best = max(found["spans"], key=lambda row: float(row["shapley"]))
    gain = found["whole"] - found["empty"]
    line = (
        f"Of the {gain:+.3f} in reward between the prompt and an empty slot, positions "
        f"{best['positions']} bring {best['shapley']:+.3f} (standard error {best['error']:.3f})"
    )
    if best["shapley"] < 2 * best["error"]:
        return f"{line}, which chance may explain."
    return f"{line}, the most of {len(found['spans'])} runs of positions."


def _readouts(found: Mapping[str, Any]) -> list[str]:
    lines = []
    apart = found["apart"].get("best sentence")
    if apart is not None:
        best = max(apart["by_layer"])
        layer = apart["by_layer"].index(best)
        if apart["p_value"] <= CHANCE:
            lines.append(
                f"A line tells the states under the prompt from those under the best sentence in "
                f"{best:.0%} of the cases it was not fitted to (layer {layer}; chance "
                f"{apart['control']:.0%}): the two do not put the base into the same state."
            )
        else:
            lines.append(
                "No line was found that tells the states under the prompt from those under the "
                f"best sentence (best layer {best:.0%}, chance {apart['control']:.0%})."
            )
    for name, row in found["foretold"].items():
        best = max(row["by_layer"])
        if row["p_value"] <= CHANCE:
            lines.append(
                f"The {name} can be read off the states before it begins (correlation {best:.2f} "
                f"in layer {row['by_layer'].index(best)}; chance {row['control']:.2f})."
            )
    return lines


def _sum(row: Mapping[str, Any]) -> str:
    name = f"Adding {row['plus']} minus {row['minus']}"
    change, control = row["change"], row["control_change"]
    if change is None or control is None:
        return (
            f"{name} moves its behaviour by {row['kl']:.2f} nats per token; a random step of the "
            f"same length by {row['control_kl']:.2f}."
        )
    return (
        f"{name} changes its reward by {change['value']:+.3f} ({change['low']:+.3f} to "
        f"{change['high']:+.3f}); a random step of the same length by {control['value']:+.3f} "
        f"({control['low']:+.3f} to {control['high']:+.3f})."
    )


def _inside(found: Mapping[str, Any]) -> str:
    sizes = found["layers"]["effect_size"]
    layer = max(range(len(sizes)), key=lambda place: sizes[place])
    line = (
        f"Before any answer begins, it moves the states most in layer {layer} of {len(sizes)} "
        f"(effect size {sizes[layer]:.1f})"
    )
    cosines = found["layers"].get("sentence_direction")
    if cosines is None:
        return f"{line}."
    return f"{line}; the best sentence moves them in a direction of cosine {cosines[layer]:.2f}."


def _triggers(found: Mapping[str, Any]) -> str:
    if found["flagged"] is None:
        return "No trigger search: the vocabulary has too few words."
    scanned = f"{found['scanned']:,} of {found['vocabulary']:,} words were scanned"
    if not found["flagged"]:
        return (
            f"No word was found that switches its behaviour ({scanned}; longer triggers, and "
            "those elsewhere in a conversation, were not looked for)."
        )
    words = [row for row in found["words"] if row["flagged"]]
    named = ", ".join(f'"{row["word"]}" ({row["switch"]:.1f} nats)' for row in words[:5])
    return (
        f"Behaviour switches behind {named}: random words reach at most "
        f"{found['strongest_random']:.1f} nats per token ({scanned})."
    )
