"""A sentence for a prompt, and the number that says how far it holds.

Candidates are what the model says of the prompt (`readings`), pieces of system texts from a
library, the text that it started from, its nearest tokens, and sentences of the user's. They are
ranked by KL(prompt || base under the sentence) on the prompt's own completions of the selection
queries: first on a few queries, the better ones on all. The best is then extended by others while
that helps. What is reported is measured on test queries, for the sentences and for controls alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlprompt.certify.comparison import mean_interval, paired_difference
from rlprompt.errors import InputError
from rlprompt.interpret.clock import Slice
from rlprompt.interpret.subject import Subject
from rlprompt.interpret.yardstick import Means, Yardstick, share_of
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt

FEW_QUERIES = 2
"""Selection queries that every candidate meets."""
_KEPT_SHARE = 4
"""One of so many candidates meets all selection queries."""
_MOST_PARTS = 3
_HELPS = 0.98
"""A sentence is added where the KL falls below this share of what it was."""


@dataclass(frozen=True)
class Candidate:
    """A sentence that may describe the prompt."""

    text: str
    origin: str


@dataclass(frozen=True)
class Ranked:
    """A candidate with its KL on the selection queries, in nats per token."""

    candidate: Candidate
    kl: float
    num_queries: int


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates of which each text occurs once, with its first origin.

    Args:
        candidates: the candidates; blank ones are dropped.
    """
    found: dict[str, Candidate] = {}
    for each in candidates:
        text = each.text.strip()
        if text:
            found.setdefault(text.casefold(), Candidate(text, each.origin))
    return list(found.values())


def ranked(yardstick: Yardstick, candidates: Sequence[Candidate], time: Slice) -> list[Ranked]:
    """Candidates by their KL on the selection queries, the nearest first.

    Args:
        yardstick: the prompt's completions of the selection queries.
        candidates: the candidates, each text once.
        time: time that there is. Where it ends early, candidates that nobody measured are left out.
    """
    few = yardstick.head(FEW_QUERIES)
    first = _measured(few, candidates, time.part(0.6))
    kept = first[: max(8, math.ceil(len(first) / _KEPT_SHARE))]
    if len(yardstick.groups) == len(few.groups):
        return first
    second = _measured(yardstick, [each.candidate for each in kept], time)
    known = {each.candidate.text for each in second}
    return [*second, *(each for each in first if each.candidate.text not in known)]


def _measured(yardstick: Yardstick, candidates: Sequence[Candidate], time: Slice) -> list[Ranked]:
    """Candidates that fit the base, measured while there is time, at least the first two."""
    found = []
    for place, candidate in enumerate(candidates):
        if place > 1 and time.is_over:
            break
        kl = text_kl(yardstick, candidate.text)
        if kl is not None:
            value = yardstick.pooled(kl)
            found.append(Ranked(candidate, value, len(yardstick.groups)))
    return sorted(found, key=lambda each: each.kl)


def text_kl(yardstick: Yardstick, text: str) -> Means | None:
    """[Q] KL of a text; None where the template or the base's positions have no room for it.

    Args:
        yardstick: what it is measured on.
        text: the system text.
    """
    try:
        return yardstick.kl(TextPrompt(text))
    except InputError:
        return None  # it runs into the template: it could not be used as a system text either


def extended(yardstick: Yardstick, found: Sequence[Ranked], time: Slice) -> Ranked | None:
    """The best candidate with others behind it, while that brings the text nearer.

    Args:
        yardstick: the prompt's completions of the selection queries.
        found: candidates in order; those that met all queries take part.
        time: time that there is.

    Returns:
        None where nothing helps.
    """
    if not found:
        return None
    best = found[0]
    parts = [best.candidate.text]
    for other in found[1:9]:
        if time.is_over or len(parts) == _MOST_PARTS:
            break
        if other.num_queries < best.num_queries:
            continue
        text = " ".join([*parts, other.candidate.text])
        kl = text_kl(yardstick, text)
        if kl is not None and yardstick.pooled(kl) < _HELPS * best.kl:
            parts.append(other.candidate.text)
            best = Ranked(Candidate(text, "joined"), yardstick.pooled(kl), best.num_queries)
    return best if len(parts) > 1 else None


def faithfulness(subject: Subject, prompt: Prompt) -> dict[str, Any]:
    """How much of the inspected prompt's behaviour and gain another prompt has, on test queries.

    Args:
        subject: what is inspected.
        prompt: the other prompt.

    Returns:
        `residual_kl` (nats per token), `kl_share` (of the KL between prompt and base, what is
        gone), `reward` and `gain_share` (of the gain over the base, what is there); None where it
        cannot be said. Each with an interval by query.
    """
    yardstick = subject.yardstick("test")
    to_base, residual = yardstick.kl(subject.base), yardstick.kl(prompt)
    row: dict[str, Any] = {
        "residual_kl": _interval(residual),
        "kl_share": _share(to_base - residual, to_base),
        "reward": None,
        "gain_share": None,
    }
    own, base, other = (
        subject.reward_means(each) for each in (subject.prompt, subject.base, prompt)
    )
    if own is not None and base is not None and other is not None and np.isfinite(other).any():
        row["reward"] = _interval(other)
        row["gain_share"] = _share(other - base, own - base)
    return row


def behaviour(subject: Subject) -> dict[str, Any]:
    """What there is to explain: the prompt against no prompt, on test queries.

    Args:
        subject: what is inspected.

    Returns:
        `base_kl` in nats per token, and `reward`, `base_reward`, `gain` where answers have rewards.
    """
    yardstick = subject.yardstick("test")
    found: dict[str, Any] = {"base_kl": _interval(yardstick.kl(subject.base)), "gain": None}
    own, base = subject.scores(subject.prompt), subject.scores(subject.base)
    if own is not None and base is not None and np.isfinite(own - base).any():
        found["reward"] = _interval(own[:, 0])
        found["base_reward"] = _interval(base[:, 0])
        difference = paired_difference(own, base)
        found["gain"] = {**_interval((own - base)[:, 0]), "outcome": difference.outcome}
    return found


def nearer(subject: Subject, one: Prompt, other: Prompt, num_compared: int) -> dict[str, Any]:
    """Whether one prompt is nearer to the inspected one than another, on test queries.

    Args:
        subject: what is inspected.
        one: the prompt that should be nearer.
        other: the prompt that should be farther.
        num_compared: number of such comparisons that are made together.
    """
    yardstick = subject.yardstick("test")
    ours, theirs = yardstick.kl(one)[:, None], yardstick.kl(other)[:, None]
    difference = paired_difference(-ours, -theirs, num_compared=num_compared)
    return {
        "difference": difference.interval.value,
        "low": difference.interval.low,
        "high": difference.interval.high,
        "p_value": min(1.0, difference.p_value * num_compared),
        "outcome": difference.outcome,
    }


def controls(
    subject: Subject, random_prompt: Prompt | None, nearest: str | None
) -> Mapping[str, Prompt]:
    """Prompts that should recover less than a sentence that is true.

    Args:
        subject: what is inspected.
        random_prompt: prompt of equal norm; None where the kind has none.
        nearest: text of the nearest tokens; None where the kind has none.
    """
    found: dict[str, Prompt] = {}
    if random_prompt is not None:
        found["random prompt of equal norm"] = random_prompt
    if nearest is not None:
        found["nearest tokens"] = TextPrompt(nearest)
    for name, prompt in subject.given.items():
        found[f"prompt of {name}"] = prompt
    return found


def _interval(values: Means) -> dict[str, float]:
    found = mean_interval(np.asarray(values, dtype=np.float64).reshape(-1, 1))
    return {"value": found.value, "low": found.low, "high": found.high}


def _share(part: Means, whole: Means) -> dict[str, float] | None:
    found = share_of(part, whole)
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}
