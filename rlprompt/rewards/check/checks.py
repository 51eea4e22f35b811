"""Tries a reward before a run does: on its own examples, and on what no author thinks of.

Everything goes through `RewardRunner`, so a reward is called exactly as in training. Each check
gives one row; a row fails when training on the reward would go wrong.
"""

from __future__ import annotations

import functools
import inspect
import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlprompt.errors import InputError, describe_error, quote
from rlprompt.rewards import NAMED
from rlprompt.rewards.base import Example, LoadedReward, RewardFunction, RewardSettings
from rlprompt.rewards.check.inputs import (
    HUGE_CHARACTERS,
    HUGE_UNITS,
    ODD_TEXTS,
    WRONG_COLUMN_VALUES,
    Pair,
    make_group,
)
from rlprompt.rewards.load import load_reward, resolve_target
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Group

HUGE_SECONDS = 1.0
"""CPU time that a completion of `HUGE_CHARACTERS` may take."""
THROUGHPUT_COMPLETIONS = 256
_TOLERANCE = 1e-6
_PLAIN_QUERY = "How do I keep basil plants alive in winter?"
_PLAIN_TEXTS = ("Put the pot on a sunny sill and water it once a week.", "Yes.", "")
_LONGER_TEXTS = (
    "I'm sorry, but I can't help with that.",
    "1. Move it indoors.\n2. Water it weekly.\n3. Trim the flowers!\n\nDoes that help?",
    "Basil needs light. " * 30,
)


@dataclass(frozen=True)
class CheckRow:
    """What one check found."""

    name: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str
    """Figures when it passed, the first counter-example when it failed, why it was skipped."""


@dataclass(frozen=True)
class Trial:
    """A reward, and what it is tried with."""

    settings: RewardSettings
    """Path, options and timeout of the reward. Its options hold for examples without their own."""
    base_dir: Path
    """Folder that file paths are relative to."""
    columns: Mapping[str, Any]
    """Dataset columns of rows that are no example."""
    pairs: Sequence[Pair] = ()
    """Answers that a person has compared."""


class _FailedError(Exception):
    """A check found what it looked for; the message is the row's detail."""


class _SkippedError(Exception):
    """A check has nothing to work on; the message says what it lacks."""


def check_reward(trial: Trial) -> list[CheckRow]:
    """Run every check on a reward.

    Raises:
        InputError: the reward cannot be loaded, or needs a dataset column that neither its
            examples nor `trial.columns` have.
    """
    subject = _Subject(trial)
    subject.values(subject.query, [_PLAIN_TEXTS[0]], subject.columns)  # a missing column ends here
    return [_row(name, function, subject) for name, function in _CHECKS.items()]


def examples_of(target: Any) -> Sequence[Example]:
    """`EXAMPLES` of the module that defines a reward function, class or object; [] without any."""
    while isinstance(target, functools.partial):
        target = target.func
    owner = target if inspect.isroutine(target) or inspect.isclass(target) else type(target)
    module = sys.modules.get(getattr(owner, "__module__", ""))
    found = getattr(module, "EXAMPLES", ())
    return [each for each in found if isinstance(each, Example)]


def sees_group(function: RewardFunction) -> bool:
    """True when the reward names `group_index`: its values depend on the completion's siblings."""
    try:
        return "group_index" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class _Subject:
    """A loaded reward with its examples, and the row that the other checks are made of."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        settings = trial.settings
        target = resolve_target(settings.path, trial.base_dir, NAMED)
        self.examples = examples_of(target)
        first = self.examples[0] if self.examples else None
        # A reward with an option that must be given shows in its examples how to give it.
        self.options = dict(settings.options or (first.options if first else {}))
        self.query = first.query if first else _PLAIN_QUERY
        self.columns = {**(first.columns if first else {}), **trial.columns}
        self.texts = [each.completion for each in self.examples] or list(_PLAIN_TEXTS)
        self.group = sees_group(self.load())

    def load(self, options: Mapping[str, Any] | None = None) -> RewardFunction:
        """The reward, made from options in place of the usual ones."""
        chosen = dict(self.options if options is None else options)
        settings = self.trial.settings.model_copy(update={"options": chosen})
        return load_reward(settings, self.trial.base_dir, NAMED)

    def values(
        self,
        query: str,
        texts: Sequence[str],
        columns: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
        conversational: bool = True,
    ) -> list[float]:
        """Values of the completions of one query; NaN for None."""
        return self.score(self.load(options), [make_group(query, columns, texts, conversational)])

    def score(self, reward: RewardFunction, groups: Sequence[Group]) -> list[float]:
        """Values through a runner of its own."""
        settings = self.trial.settings.model_copy(
            update={"role": "score", "weight": 1.0, "on_error": "raise", "options": {}}
        )
        runner = RewardRunner([LoadedReward(settings, reward)])
        try:
            values: list[float] = runner.score(groups, step=0).values[settings.name].tolist()
        finally:
            runner.close()
        return values


def _row(name: str, function: Callable[[_Subject], str], subject: _Subject) -> CheckRow:
    try:
        return CheckRow(name, "passed", function(subject))
    except _SkippedError as reason:
        return CheckRow(name, "skipped", str(reason))
    except (_FailedError, InputError) as reason:
        return CheckRow(name, "failed", str(reason))


def _siblings(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples of the same query, columns and options, together."""
    rows: dict[str, list[Example]] = {}
    for each in examples:
        key = repr((each.query, dict(each.columns), dict(each.options)))
        rows.setdefault(key, []).append(each)
    return list(rows.values())


def _scored_examples(subject: _Subject) -> list[tuple[list[Example], list[float]]]:
    if not subject.examples:
        raise _SkippedError("its module has no EXAMPLES; add a list of rlprompt.rewards.Example")
    scored = []
    for rows in _siblings(subject.examples):
        texts = [each.completion for each in rows]
        options = dict(rows[0].options) or subject.options
        scored.append((rows, subject.values(rows[0].query, texts, rows[0].columns, options)))
    return scored


def _check_bounds(subject: _Subject) -> str:
    count = 0
    for rows, values in _scored_examples(subject):
        for each, value in zip(rows, values, strict=True):
            count += 1
            if not each.low - _TOLERANCE <= value <= each.high + _TOLERANCE:
                raise _FailedError(
                    f"{quote(each.completion)} scores {value:.3f}, stated {each.low:g} to "
                    f"{each.high:g}"
                )
    return f"{count} examples"


def _check_varies(subject: _Subject) -> str:
    """A constant reward, or one that scores nothing, teaches nothing."""
    texts = list(dict.fromkeys([*subject.texts, *_PLAIN_TEXTS, *_LONGER_TEXTS]))
    found: list[float] = []
    for rows in _siblings(subject.examples):
        options = dict(rows[0].options) or subject.options
        answers = [each.completion for each in rows]
        found += subject.values(rows[0].query, answers, rows[0].columns, options)
    found += subject.values(subject.query, texts, subject.columns)
    known = [value for value in found if not math.isnan(value)]
    if not known:
        raise _FailedError(
            f"all {len(found)} answers that it was tried on score None, so nothing can be learned; "
            "give it the columns that it needs, or EXAMPLES that it can score"
        )
    if len(set(known)) == 1:
        raise _FailedError(
            f"all {len(known)} answers that it was tried on score {known[0]:.3f}, and a constant "
            "teaches nothing; add EXAMPLES with a good and a bad answer if it can tell them apart"
        )
    return f"{len(set(known))} different values on {len(found)} answers"


def _check_order(subject: _Subject) -> str:
    count = 0
    for rows, values in _scored_examples(subject):
        pairs = list(zip(rows, values, strict=True))
        for good, high in ((e, v) for e, v in pairs if e.good):
            for bad, low in ((e, v) for e, v in pairs if not e.good):
                count += 1
                if not high > low:
                    raise _FailedError(
                        f"good {quote(good.completion)} scores {high:.3f}, bad "
                        f"{quote(bad.completion)} {low:.3f}"
                    )
    if not count:
        raise _SkippedError("no query has both a good and a bad example")
    return f"{count} pairs of a good and a bad example"


def _check_pairs(subject: _Subject) -> str:
    if not subject.trial.pairs:
        raise _SkippedError("no pairs were given; name a JSONL file with --pairs")
    wrong = []
    for pair in subject.trial.pairs:
        columns = {**subject.columns, **pair.columns}
        good, bad = subject.values(pair.query, [pair.good, pair.bad], columns)
        if not good > bad:
            wrong.append(f"{quote(pair.good)} {good:.3f}, {quote(pair.bad)} {bad:.3f}")
    total = len(subject.trial.pairs)
    if wrong:
        raise _FailedError(f"{len(wrong)} of {total} pairs in the wrong order: {wrong[0]}")
    return f"{total} supplied pairs"


def _check_empty(subject: _Subject) -> str:
    good = [each for each in subject.examples if each.good]
    if not good:
        raise _SkippedError("there is no good example to compare with")
    for each in good:
        options = dict(each.options) or subject.options
        texts = [each.completion, ""]
        value, empty = subject.values(each.query, texts, each.columns, options)
        if empty >= value:
            raise _FailedError(
                f"an empty completion scores {empty:.3f}, {quote(each.completion)} {value:.3f}"
            )
    return "an empty completion scores below every good example"


def _check_odd(subject: _Subject) -> str:
    for kind, text in ODD_TEXTS.items():
        for conversational in (True, False):
            try:
                subject.values(
                    subject.query, [text], subject.columns, conversational=conversational
                )
            except InputError as error:
                raise _FailedError(f"on {kind}: {error}") from error
    return f"{len(ODD_TEXTS)} odd texts, each in both formats: a finite number or None"


def _check_huge(subject: _Subject) -> str:
    worst = 0.0
    for unit in HUGE_UNITS:
        text = unit * (HUGE_CHARACTERS // len(unit))
        start = time.process_time()
        subject.values(subject.query, [text], subject.columns)
        taken = time.process_time() - start
        if taken > HUGE_SECONDS:
            raise _FailedError(
                f"{HUGE_CHARACTERS:,} characters of {unit!r} took {taken:.1f} s of CPU time"
            )
        worst = max(worst, taken)
    return f"{HUGE_CHARACTERS:,} characters in at most {1000 * worst:.0f} ms"


def _check_formats(subject: _Subject) -> str:
    messages, strings = (
        subject.values(subject.query, subject.texts, subject.columns, conversational=each)
        for each in (True, False)
    )
    _require_equal(subject, messages, strings, "as messages and as plain strings")
    return f"{len(subject.texts)} completions, the same values as messages and as strings"


def _check_columns(subject: _Subject) -> str:
    """A wrong value in a column may be refused with InputError or give None, never a crash."""
    if not subject.columns:
        raise _SkippedError("it is tried without dataset columns")
    for column in subject.columns:
        for kind, value in WRONG_COLUMN_VALUES.items():
            try:
                columns = {**subject.columns, column: value}
                subject.values(subject.query, subject.texts, columns)
            except InputError as error:
                if isinstance(error.__cause__, InputError):
                    continue
                cause = error.__cause__
                told = describe_error(cause) if cause is not None else str(error)
                raise _FailedError(
                    f"column '{column}' holding {kind}: {told}; return None or raise InputError"
                ) from error
    return f"{len(subject.columns)} columns with {len(WRONG_COLUMN_VALUES)} kinds of wrong value"


def _check_determinism(subject: _Subject) -> str:
    first = subject.values(subject.query, subject.texts, subject.columns)
    again = subject.values(subject.query, subject.texts, subject.columns)
    _require_equal(subject, first, again, "in two calls")
    backwards = subject.values(subject.query, subject.texts[::-1], subject.columns)[::-1]
    _require_equal(subject, first, backwards, "in a reversed batch")
    if subject.group:
        return "the same values again and in reverse order; they depend on the group, as stated"
    alone = [subject.values(subject.query, [text], subject.columns)[0] for text in subject.texts]
    _require_equal(subject, first, alone, "in a batch and alone")
    return "the same values again, in reverse order and alone"


def _check_pickle(subject: _Subject) -> str:
    reward = subject.load()
    try:
        copy = pickle.loads(pickle.dumps(reward))
    except Exception as error:
        raise _FailedError(
            f"{describe_error(error)}; define it at the top of its module"
        ) from error
    groups = [make_group(subject.query, subject.columns, subject.texts)]
    _require_equal(
        subject, subject.score(reward, groups), subject.score(copy, groups), "before and after"
    )
    return "a pickled copy gives the same values"


def _check_throughput(subject: _Subject) -> str:
    copies = math.ceil(THROUGHPUT_COMPLETIONS / len(subject.texts))
    texts = (subject.texts * copies)[:THROUGHPUT_COMPLETIONS]
    reward = subject.load()
    groups = [make_group(subject.query, subject.columns, texts)]
    subject.score(reward, groups)
    start = time.perf_counter()
    subject.score(reward, groups)
    seconds = max(time.perf_counter() - start, 1e-9)
    return f"{len(texts) / seconds:,.0f} completions/s ({1e3 * seconds / len(texts):.3f} ms each)"


def _require_equal(
    subject: _Subject, left: Sequence[float], right: Sequence[float], when: str
) -> None:
    for text, one, other in zip(subject.texts, left, right, strict=True):
        same = one == other or (math.isnan(one) and math.isnan(other))
        if not same and abs(one - other) > _TOLERANCE * max(1.0, abs(one)):
            raise _FailedError(f"{quote(text)} scores {one:.4f} and {other:.4f} {when}")


_CHECKS: dict[str, Callable[[_Subject], str]] = {
    "examples lie in their bounds": _check_bounds,
    "answers get different scores": _check_varies,
    "good examples beat bad ones": _check_order,
    "supplied pairs are in order": _check_pairs,
    "an empty answer never wins": _check_empty,
    "odd texts": _check_odd,
    "huge texts": _check_huge,
    "both formats": _check_formats,
    "wrong column types": _check_columns,
    "determinism": _check_determinism,
    "picklability": _check_pickle,
    "throughput": _check_throughput,
}
