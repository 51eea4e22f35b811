"""The whole inspection of a prompt, within a budget of minutes, as plain values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlprompt.certify.comparison import paired_difference
from rlprompt.interpret import anomalies, inside, triggers
from rlprompt.interpret.clock import Clock, Slice
from rlprompt.interpret.derived import CutPrompt, random_like, vectors_of
from rlprompt.interpret.importance import Importances, importances
from rlprompt.interpret.importance import plain as plain_importances
from rlprompt.interpret.nearest import Nearest, nearest, verdict
from rlprompt.interpret.readings import Reading, of_frames, read
from rlprompt.interpret.readouts import readouts
from rlprompt.interpret.reward_importance import reward_importance
from rlprompt.interpret.sentences import (
    Candidate,
    Ranked,
    behaviour,
    controls,
    distinct,
    extended,
    faithfulness,
    nearer,
    ranked,
)
from rlprompt.interpret.similar import compared, sums
from rlprompt.interpret.subject import Subject
from rlprompt.interpret.words import summary
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.components import Library

logger = logging.getLogger(__name__)

SHOWN_SENTENCES = 3
REWARDED_SPANS = 3
"""Positions, of those that matter most, of which it is seen what they do to the reward."""
_SHOWN_RANKED = 20
_LOOKED_AT = 6
"""Queries of which attention and states are looked at."""
_WEIGHTS = {
    "nearest": 1.0,
    "readings": 2.0,
    "sentences": 4.0,
    "faithfulness": 4.0,
    "importance": 3.0,
    "reward_importance": 3.0,
    "inside": 1.0,
    "readouts": 1.0,
    "similar": 1.5,
    "triggers": 3.5,
}
"""Parts in their order, with their shares of the time."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What an inspection may use."""

    minutes: float = 4.5
    readings: int = 8
    """Readings of each frame."""
    library: Library | None = None
    """Pieces of system texts by category; None = none are tried."""
    sentences: Sequence[str] = ()
    """Sentences of the user's that are tried too."""
    triggers: bool = True
    most_words: int | None = None
    """Words that the trigger search scans; None = as many as there is time for."""
    suspects: Sequence[str] = ()
    """Words or phrases that the trigger search tries whatever the scan says."""
    reward_sets: int = 16
    """Sets of positions under which answers are drawn for their worth in reward; 0 = none."""


class _Parts:
    """Says what is done, and gives each part its time."""

    def __init__(self, clock: Clock, progress: Progress) -> None:
        self._clock = clock
        self._progress = progress

    def begin(self, name: str, said: str) -> Slice:
        """The time of a part; what went before it is over."""
        self._progress(said)
        names = list(_WEIGHTS)
        left = sum(_WEIGHTS[each] for each in names[names.index(name) :])
        return self._clock.slice(_WEIGHTS[name], left)


def inspect(subject: Subject, plan: Plan, progress: Progress = logger.info) -> dict[str, Any]:
    """Everything that is found out about a prompt.

    Args:
        subject: prompt, base, queries and rewards.
        plan: budget, and what is tried.
        progress: what is told which part begins.

    Returns:
        Plain values: the content of `inspection.json`.
    """
    clock = Clock(plan.minutes)
    parts = _Parts(clock, progress)
    progress("drawing the prompt's own answers")
    explained = behaviour(subject)
    time = parts.begin("nearest", "nearest tokens")
    near = nearest(subject.policy, subject.prompt)
    time = parts.begin("readings", "asking the model what the prompt says")
    readings = read(
        subject.policy, subject.prompt, copies=plan.readings, seed=subject.seed, time=time
    )
    time = parts.begin("sentences", "ranking sentences")
    candidates = _candidates(subject, plan, near, readings)
    best = _best(subject, candidates, time)
    time = parts.begin("faithfulness", "measuring sentences and controls on other queries")
    sentences = _sentences(subject, best, near, time)
    report: dict[str, Any] = {
        "behaviour": explained,
        "nearest": _nearest(subject, near, sentences),
        "readings": {"count": len(readings), "by_frame": of_frames(readings)},
        "candidates": [_ranked_row(each) for each in best[:_SHOWN_RANKED]],
        "num_candidates": len(candidates),
        "num_measured": len(best),
        **sentences,
    }
    report |= _looks(subject, plan, near, report, parts)
    report["seconds"] = clock.seconds
    report["summary"] = summary(report)
    return report


def _looks(
    subject: Subject,
    plan: Plan,
    near: Nearest | None,
    report: Mapping[str, Any],
    parts: _Parts,
) -> dict[str, Any]:
    """Importance, the inside, similar prompts, and what may be hidden."""
    found: dict[str, Any] = {}
    time = parts.begin("importance", "which positions matter")
    few = subject.yardstick("selection")
    weights = importances(few, subject.prompt, seed=subject.seed, time=time)
    names = None if near is None else near.tokens
    found["importance"] = None
    if weights is not None:
        found["importance"] = plain_importances(weights, names)
        _add_reward_changes(subject, weights, found["importance"]["spans"], time)
    time = parts.begin("reward_importance", "which positions the reward rests on")
    found["reward_importance"] = None
    if plan.reward_sets:
        rewarded = reward_importance(subject, plan.reward_sets, names, time)
        found["reward_importance"] = rewarded
    parts.begin("inside", "attention and states")
    found["inside"] = _inside(subject, report)
    parts.begin("readouts", "what lines read off the states")
    best = report["sentences"][0]["text"] if report["sentences"] else None
    found["readouts"] = readouts(subject, best)
    time = parts.begin("similar", "other prompts")
    found["similar"] = compared(subject, time.part(0.6)) if subject.given else []
    found["sums"] = sums(subject, time)
    found["anomalies"] = _anomalies(subject, near, found)
    time = parts.begin("triggers", "searching for words that switch the behaviour")
    found["triggers"] = None
    if plan.triggers:
        settings = triggers.Settings(
            seed=subject.seed, most_words=plan.most_words, suspects=plan.suspects
        )
        sides = (subject.sides.selection, subject.sides.test)
        found["triggers"] = triggers.search(subject.policy, subject.prompt, sides, settings, time)
    return found


def _add_reward_changes(
    subject: Subject, found: Importances, rows: Sequence[dict[str, Any]], time: Slice
) -> None:
    """What leaving out the positions that matter most does to the reward, on test queries.

    Only of prompts that are vectors, where positions can be left out of a whole answer.
    """
    vectors = vectors_of(subject.policy, subject.prompt)
    own = subject.scores(subject.prompt)
    if vectors is None or own is None:
        return
    ranked_spans = sorted(range(len(rows)), key=lambda place: -found.alone[place])
    for number, place in enumerate(ranked_spans[:REWARDED_SPANS]):
        if number and time.is_over:
            break
        left_out = set(found.spans[place])
        kept = [each for each in range(len(vectors)) if each not in left_out]
        scores = subject.scores(CutPrompt(vectors[kept]))
        assert scores is not None
        change = paired_difference(scores, own, num_compared=REWARDED_SPANS)
        ends = change.interval
        rows[place]["reward_change"] = {
            "value": ends.value,
            "low": ends.low,
            "high": ends.high,
            "outcome": change.outcome,
        }


def _candidates(
    subject: Subject, plan: Plan, near: Nearest | None, readings: Sequence[Reading]
) -> list[Candidate]:
    """Sentences to try, in the order in which they are tried."""
    found = [Candidate(text, "given") for text in plan.sentences]
    found.append(Candidate(subject.prompt.init_text, "start text"))
    if near is not None and near.text is not None:
        found.append(Candidate(near.text, "nearest tokens"))
    spoken = [Candidate(each.text, f"reading: {each.frame}") for each in readings]
    library = [
        Candidate(text, f"library: {category}")
        for category, texts in (plan.library or {}).items()
        for text in texts
    ]
    # In turns, so that where time ends early both were tried.
    for place in range(max(len(spoken), len(library))):
        found += [*spoken[place : place + 1], *library[place : place + 1]]
    return distinct(found)


def _best(subject: Subject, candidates: Sequence[Candidate], time: Slice) -> list[Ranked]:
    """Candidates in order, the best extended where that helps."""
    yardstick = subject.yardstick("selection")
    found = ranked(yardstick, candidates, time.part(0.8))
    joined = extended(yardstick, found, time)
    return found if joined is None else [joined, *found]


def _ranked_row(each: Ranked) -> dict[str, Any]:
    return {
        "text": each.candidate.text,
        "origin": each.candidate.origin,
        "selection_kl": each.kl,
        "num_queries": each.num_queries,
    }


def _sentences(
    subject: Subject, best: Sequence[Ranked], near: Nearest | None, time: Slice
) -> dict[str, Any]:
    """The best sentences and the controls, each with its faithfulness on the test queries."""
    text = None if near is None else near.text
    against = controls(subject, random_like(subject.policy, subject.prompt, subject.seed), text)
    own = [each for each in best if not _is_itself(subject, each)]
    chosen: list[Prompt] = []
    rows = []
    for place, each in enumerate(own[:SHOWN_SENTENCES]):
        if place and time.is_over:
            break
        said = TextPrompt(each.candidate.text)
        chosen.append(said)
        rows.append({**_ranked_row(each), **faithfulness(subject, said)})
    compared_rows = []
    for name, prompt in against.items():
        row = {"name": name, **faithfulness(subject, prompt)}
        if chosen:
            row["sentence_is_nearer"] = nearer(subject, chosen[0], prompt, len(against))
        compared_rows.append(row)
    return {"sentences": rows, "controls": compared_rows}


def _is_itself(subject: Subject, each: Ranked) -> bool:
    """Whether it is the prompt in other clothes: its nearest tokens, or the text that it is."""
    if each.candidate.origin == "nearest tokens":
        return True
    is_text = isinstance(subject.prompt, TextPrompt)
    return is_text and each.candidate.text == subject.prompt.init_text.strip()


def _nearest(
    subject: Subject, near: Nearest | None, sentences: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The waywardness audit: nearest tokens, and what the base does under them."""
    if near is None:
        return None
    rows = [row for row in sentences["controls"] if row["name"] == "nearest tokens"]
    share = rows[0]["kl_share"] if rows else None
    return {
        "text": near.text,
        "gap": near.gap,
        "vectors": near.rows,
        "kl_share": share,
        "residual_kl": rows[0]["residual_kl"] if rows else None,
        "verdict": verdict(share),
    }


def _inside(subject: Subject, report: Mapping[str, Any]) -> dict[str, Any]:
    """Attention, and shifts of states, beside those of the best sentence."""
    policy, prompt = subject.policy, subject.prompt
    groups = subject.answers(prompt)[:_LOOKED_AT]
    looked = inside.attention(policy, prompt, groups)
    found: dict[str, Any] = {
        "attention_to_prompt": looked.to_slot.tolist(),
        "attention_to_template": looked.to_head.tolist(),
        "attention_by_position": looked.by_position.tolist(),
        "sentence": None,
        "layers": None,
    }
    queries = subject.sides.test[: 2 * _LOOKED_AT]
    own = inside.states(policy, prompt, queries)
    base = inside.states(policy, subject.base, queries)
    if own is None or base is None or len(queries) < 3:
        return found
    layers: dict[str, Any] = {
        "effect_size": inside.effect_sizes(own, base).tolist(),
        "relative_shift": inside.relative_shift(own, base).tolist(),
    }
    if report["sentences"]:
        text = report["sentences"][0]["text"]
        other = inside.states(policy, TextPrompt(text), queries)
        assert other is not None
        found["sentence"] = text
        layers["sentence_effect_size"] = inside.effect_sizes(other, base).tolist()
        layers["sentence_direction"] = inside.same_direction(own, other, base).tolist()
    return {**found, "layers": layers}


def _anomalies(
    subject: Subject, near: Nearest | None, found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """All flags, raised or not."""
    yardstick = subject.yardstick("test")
    queries = [group.query for group in yardstick.groups]
    flags = [anomalies.of_queries(yardstick.kl(subject.base), queries)]
    if near is not None:
        flags.append(anomalies.of_vectors([row["norm"] for row in near.rows]))
    shares = found["inside"]["attention_by_position"]
    flags.append(anomalies.of_positions("attention to the prompt", shares) or {})
    if found["importance"] is not None:
        alone = [row["alone"] for row in found["importance"]["spans"]]
        flags.append(anomalies.of_positions("worth by ablation", alone) or {})
    return [each for each in flags if each]
