"""Runs a suite on a prompt: every situation and measure for the prompt and for the base.

What is compared meets the same queries and the same draws. Each cell (a prompt in a situation, or
under a measure) is kept by what it is made of, so that a run goes on where it was cut off, and the
base is measured once for several artifacts.

Letters: Q queries, n answers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlprompt.certify.comparison import Scores
from rlprompt.data.situations import PLAIN, Dialogue, Quantised, Situation, System
from rlprompt.engines.base import Engine
from rlprompt.engines.make import make_engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.surroundings import NotApplicableError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rewards.runner import RewardRunner
from rlprompt.suites.bench import Bench, MeasureSettings
from rlprompt.suites.bounds import stated_difference, stated_mean
from rlprompt.suites.cells import Cells, code_version, identity
from rlprompt.suites.composition import among, dialogue, quantised
from rlprompt.suites.features import compare_answers
from rlprompt.suites.measures import Answers
from rlprompt.suites.schema import SuiteSettings
from rlprompt.types import Group, Query

MOST_CHANGES = 25
"""Features of a behaviour difference that are kept."""
_MOST_ROWS = 12
_MOST_TEXT = 1200

Plain = dict[str, Any]
"""JSON values."""


@dataclass(frozen=True)
class Ground:
    """What a suite is run on."""

    policy: Policy
    engine: Engine
    rewards: RewardRunner
    queries: Sequence[Query]
    sampling: SamplingSettings
    written: Sequence[str]
    """Hand-written system prompts that the prompt is compared with in the plain situation."""
    reward_key: Any
    """What names the rewards and their source, as JSON values."""


@dataclass(frozen=True)
class _Cell:
    """One prompt in one situation: [Q, n] values by reward, and the answers."""

    scores: Mapping[str, Scores]
    rows: Sequence[Plain]


class SuiteRun:
    """A suite on one base; see the module."""

    def __init__(
        self, suite: SuiteSettings, ground: Ground, cells: Cells, say: Callable[[str], None]
    ) -> None:
        """Nothing is computed yet.

        Args:
            suite: the suite.
            ground: what it is run on.
            cells: where results are kept.
            say: function that is called with a line about what is done next.
        """
        self._suite = suite
        self._ground = ground
        self._cells = cells
        self._say = say
        self._coarse: tuple[Quantised, Policy, Engine] | None = None

    def evaluate(self, prompt: Prompt) -> Plain:
        """All that the suite says of a prompt, as JSON values.

        Args:
            prompt: the prompt.

        Raises:
            InputError: a reward failed, a measure needs what is not there, or a query is too long.
        """
        left_out = [sentence for each in self._suite.measures if (sentence := each.missing())]
        metrics: Plain = {}
        adherence = self._adherence(prompt, metrics, left_out)
        situations = self._situations(prompt, metrics, left_out)
        measures, difference = self._measures(prompt, metrics)
        return {
            "adherence": adherence,
            "situations": situations,
            "measures": measures,
            "difference": difference,
            "metrics": metrics,
            "left_out": left_out,
        }

    def _adherence(self, prompt: Prompt, metrics: Plain, left_out: list[str]) -> Plain:
        """Rewards of base, written texts and prompt in the plain situation, paired."""
        ours, base = self._cell(prompt, None), self._cell(NonePrompt(), None)
        names = _known(ours.scores)
        if not names:
            left_out.append(
                "no reward gave a value, so adherence and situations have no numbers; give the "
                "suite rewards of its own"
            )
        written = {text: self._cell(TextPrompt(text), None) for text in self._ground.written}
        found: Plain = {}
        for name in names:
            row = {
                "prompt": stated_mean(ours.scores[name]).plain(),
                "base": stated_mean(base.scores[name]).plain(),
                "minus_base": stated_difference(ours.scores[name], base.scores[name]).plain(),
            }
            if written:
                means = {t: float(np.nanmean(c.scores[name])) for t, c in written.items()}
                best = max(means, key=means.__getitem__)
                other = written[best].scores[name]
                row["best_written"] = {"text": best, **stated_mean(other).plain()}
                against = stated_difference(ours.scores[name], other, len(written))
                row["minus_written"] = against.plain()
            for key in ("minus_base", "minus_written"):
                if key in row:
                    metrics[f"adherence/{name}/{key}"] = row[key]
            metrics[f"adherence/{name}"] = row["prompt"]
            row["slices"] = self._slices(ours.scores[name], base.scores[name])
            found[name] = row
        return {"rewards": found, "rows": list(ours.rows[:_MOST_ROWS])}

    def _slices(self, ours: Scores, base: Scores) -> Plain:
        """The reward by the values of a column; bounds hold for all slices together."""
        column = self._suite.slices
        if column is None:
            return {}
        values = [str(query.columns.get(column)) for query in self._ground.queries]
        known = list(dict.fromkeys(values))
        found = {}
        for value in known:
            inside = np.array([each == value for each in values])
            found[value] = {
                "prompt": stated_mean(ours[inside]).plain(),
                "minus_base": stated_difference(ours[inside], base[inside], len(known)).plain(),
            }
        return found

    def _situations(self, prompt: Prompt, metrics: Plain, left_out: list[str]) -> list[Plain]:
        """The matrix of situations x rewards, each against the plain one."""
        if not self._suite.situations:
            return []
        plain, base_plain = self._cell(prompt, None), self._cell(NonePrompt(), None)
        names = _known(plain.scores)
        drawn: list[tuple[str, _Cell, _Cell]] = []
        for situation in self._suite.situations:
            try:
                own = self._rows_of(prompt, situation)
                others = self._rows_of(NonePrompt(), situation)
            except NotApplicableError as error:
                left_out.append(f"situation {situation.label}: {error}")
                continue
            except InputError as error:
                raise InputError(f"situation {situation.label}: {error}") from error
            drawn += [(label, own[label], others[label]) for label in own]
        num_compared = max(1, len(drawn) * len(names))
        rows = []
        for label, ours, theirs in drawn:
            row: Plain = {"situation": label, "rewards": {}, "rows": list(ours.rows[:3])}
            for name in names:
                first = ours.scores[name]
                before = plain.scores[name][: len(first)]
                base = base_plain.scores[name][: len(first)]
                cell = {
                    "prompt": stated_mean(first).plain(),
                    "base": stated_mean(theirs.scores[name]).plain(),
                    "change": stated_difference(first, before, num_compared).plain(),
                    "base_change": stated_difference(
                        theirs.scores[name], base, num_compared
                    ).plain(),
                    "minus_base": stated_difference(
                        first, theirs.scores[name], num_compared
                    ).plain(),
                }
                row["rewards"][name] = cell
                metrics[f"situations/{label}/{name}"] = cell["prompt"]
                for key in ("change", "minus_base"):
                    metrics[f"situations/{label}/{name}/{key}"] = cell[key]
            rows.append(row)
        return rows

    def _measures(self, prompt: Prompt, metrics: Plain) -> tuple[list[Plain], list[Plain]]:
        """Every measure for prompt and base, and what changed in the answers."""
        chosen = [each for each in self._suite.measures if not each.missing()]
        pairs = [
            (m, self._measured(m, prompt, prompt), self._measured(m, NonePrompt(), prompt))
            for m in chosen
        ]
        count = max(1, sum(len(ours["values"]) for _, ours, _ in pairs))
        found, difference = [], []
        for measure, ours, base in pairs:
            numbers: Plain = {}
            for name, values in ours["values"].items():
                first, second = _table(values), _table(base["values"][name])
                kind = name.split("/")[0]
                is_share = kind in measure.shares
                against = stated_difference(first, second, count, is_share).plain()
                numbers[name] = {
                    "prompt": stated_mean(first, is_share).plain(),
                    "base": stated_mean(second, is_share).plain(),
                    "minus_base": against,
                    "higher_is": measure.higher_is.get(kind, "other"),
                }
                metrics[f"measures/{measure.label}/{name}"] = numbers[name]["prompt"]
                metrics[f"measures/{measure.label}/{name}/minus_base"] = against
            found.append(
                {
                    "measure": measure.label,
                    "type": measure.type,
                    "about": str(type(measure).__doc__).partition("\n")[0],
                    "numbers": numbers,
                    "extra": {"prompt": ours["extra"], "base": base["extra"]},
                    "rows": ours["rows"][:_MOST_ROWS],
                }
            )
            if isinstance(measure, Answers):
                difference += _difference(base["rows"], ours["rows"], measure.copies)
        return found, difference

    def _rows_of(self, prompt: Prompt, situation: Situation) -> dict[str, _Cell]:
        """The cells of a situation by name: one, or one per scored turn of a dialogue."""
        if not isinstance(situation, Dialogue):
            return {situation.label: self._cell(prompt, situation)}
        key = self._key(prompt, situation.model_dump(mode="json"))
        made = self._cells.get(key, lambda: self._dialogue(prompt, situation))
        return {f"{situation.label}_turn_{turn}": _cell_of(each) for turn, each in made.items()}

    def _cell(self, prompt: Prompt, situation: Situation | None) -> _Cell:
        """A prompt in a situation; None = the plain one."""
        under = among(prompt, situation) if isinstance(situation, System) else prompt
        plain = None if situation is None else situation.model_dump(mode="json")
        key = self._key(prompt, plain)
        return _cell_of(self._cells.get(key, lambda: self._drawn(prompt, under, situation)))

    def _key(self, prompt: Prompt, situation: Any) -> Plain:
        ground = self._ground
        if isinstance(situation, dict):  # what it is called changes nothing
            situation = {k: v for k, v in situation.items() if k != "name"}
        return {
            **self._common(prompt),
            "situation": situation,
            "queries": [[list(q.messages), repr(dict(q.columns)), q.index] for q in ground.queries],
            "rewards": ground.reward_key,
            "copies": self._suite.completions_per_query,
        }

    def _common(self, prompt: Prompt) -> Plain:
        policy = self._ground.policy
        return {
            "prompt": identity(prompt, policy.id),
            "base": policy.fingerprint,
            "template": policy.template_hash,
            "machine": policy.machine(),
            "engine": self._ground.engine.settings.model_dump(mode="json"),
            "sampling": self._ground.sampling.model_dump(mode="json"),
            "seed": self._suite.seed,
            "code": code_version(),
        }

    def _drawn(self, prompt: Prompt, under: Prompt, situation: Situation | None) -> Plain:
        """Answers of a prompt in a situation, with their rewards."""
        self._say(f"{_who(prompt)}, {PLAIN if situation is None else situation.label}")
        ground, suite = self._ground, self._suite
        engine, sampling, queries = ground.engine, ground.sampling, list(ground.queries)
        if situation is not None:
            sampling = situation.sampled(sampling)
            queries = [
                replace(q, messages=tuple(dict(m) for m in situation.asked(q.messages, suite.seed)))
                for q in queries
            ]
        if isinstance(situation, Quantised):
            engine = self._coarse_engine(situation)
        engine.sync(under)
        drawn = engine.generate(queries, suite.completions_per_query, sampling, suite.seed)
        return self._scored(drawn.groups)

    def _dialogue(self, prompt: Prompt, situation: Dialogue) -> Plain:
        """Dialogues of a prompt, with the rewards of the turns that are scored."""
        self._say(f"{_who(prompt)}, {situation.label} of {situation.turns[-1]} turns")
        ground = self._ground
        turns = dialogue(
            ground.engine,
            prompt,
            ground.queries[: situation.queries],
            situation,
            ground.sampling,
            self._suite.seed,
        )
        return {str(turn): self._scored(groups) for turn, groups in turns.items()}

    def _scored(self, groups: Sequence[Group]) -> Plain:
        batch = self._ground.rewards.score(groups, step=0)
        named = {"reward": batch.total, **batch.values}
        tables = {name: v.double().reshape(len(groups), -1).tolist() for name, v in named.items()}
        rows = [
            {"query": _cut(group.query.text), "answer": _cut(c.text)}
            for group in groups
            for c in group.completions
        ]
        return {"values": tables, "rows": rows}

    def _measured(self, measure: MeasureSettings, prompt: Prompt, about: Prompt) -> Plain:
        """What a measure gives of a prompt."""
        settings = measure.model_dump(mode="json", exclude={"name"})
        key = {**self._common(prompt), "measure": settings}
        if measure.type == "leakage":
            key["about"] = about.init_text
        if measure.type == "standard":
            key["measure"] = {k: v for k, v in settings.items() if k != "path"}

        def make() -> Plain:
            self._say(f"{_who(prompt)}, {measure.label}")
            ground = self._ground
            bench = Bench(ground.policy, ground.engine, ground.sampling, self._suite.seed)
            try:
                found = measure.measure(bench, prompt, about)
            except InputError as error:
                raise InputError(f"measure {measure.label}: {error}") from error
            rows = [
                {k: _cut(v) if isinstance(v, str) else v for k, v in row.items()}
                for row in found.rows
            ]
            return {"values": dict(found.values), "rows": rows, "extra": dict(found.extra)}

        return self._cells.get(key, make)

    def _coarse_engine(self, situation: Quantised) -> Engine:
        """The engine over rounded weights; one copy of the base is kept at a time."""
        asked = situation.model_copy(update={"name": None})
        if self._coarse is None or self._coarse[0] != asked:
            self._coarse = None
            policy = quantised(self._ground.policy, situation.bits, situation.group_size)
            engine = make_engine(policy, self._ground.engine.settings)
            self._coarse = (asked, policy, engine)
        return self._coarse[2]


def num_cells(suite: SuiteSettings, ground: Ground) -> int:
    """How many cells an evaluation takes, kept ones and those asked for twice included.

    Args:
        suite: the suite.
        ground: what it is run on.
    """
    measured = sum(not each.missing() for each in suite.measures)
    plain = 4 if suite.situations else 2
    return plain + len(ground.written) + 2 * (len(suite.situations) + measured)


def _difference(before: Sequence[Plain], after: Sequence[Plain], copies: int) -> list[Plain]:
    """The largest changes, each with the answers that show it best."""
    sides = [
        [[row["answer"] for row in rows[i : i + copies]] for i in range(0, len(rows), copies)]
        for rows in (before, after)
    ]
    return [
        {
            "feature": each.feature,
            "base": each.before,
            "prompt": each.after,
            "effect": each.effect,
            "p_value": each.p_value,
            "query": after[each.question * copies]["query"],
            "base_answer": sides[0][each.question][0],
            "prompt_answer": sides[1][each.question][0],
        }
        for each in compare_answers(*sides)[:MOST_CHANGES]
    ]


def _cell_of(content: Plain) -> _Cell:
    scores = {name: _table(values) for name, values in content["values"].items()}
    return _Cell(scores, content["rows"])


def _table(values: Sequence[Sequence[float | None]]) -> Scores:
    """[Q, n] with NaN for what is unknown."""
    rows = [[np.nan if value is None else float(value) for value in row] for row in values]
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)


def _known(scores: Mapping[str, Scores]) -> list[str]:
    """Rewards that gave a value at all."""
    return [name for name, table in scores.items() if not np.isnan(table).all()]


def _who(prompt: Prompt) -> str:
    if isinstance(prompt, NonePrompt):
        return "base"
    return "written text" if isinstance(prompt, TextPrompt) else "prompt"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."
