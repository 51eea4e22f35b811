"""Reads, or makes, the preferences that a recipe names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings, Table
from rlprompt.data.load import read_table
from rlprompt.data.messages import is_message, read_message
from rlprompt.engines.make import make_engine
from rlprompt.errors import InputError
from rlprompt.model.base import load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.reward_training.pairs import (
    Judged,
    Pair,
    Sides,
    divide,
    pairs_across_queries,
    pairs_within_queries,
)
from rlprompt.reward_training.settings import (
    LabelData,
    PairData,
    RewardRecipe,
    SampledData,
)
from rlprompt.rewards import build_rewards
from rlprompt.types import Message

_ROLES = ("system", "user", "assistant")
_LEAST = 4
"""Fewest pairs or answers on a side that a number can be made of."""


def load_sides(recipe: RewardRecipe, base_dir: Path) -> Sides:
    """The pairs of a recipe, divided by query.

    Raises:
        InputError: the data cannot be read or made, a row is wrong, or a side has too few pairs.
    """
    data, test = recipe.data, recipe.test
    if isinstance(data, PairData):
        pairs = _read_pairs(data, base_dir)
        sides = Sides(*divide(pairs, test.calibration, test.heldout, recipe.seed))
    else:
        if isinstance(data, LabelData):
            rows = _read_labels(data, base_dir)
        else:
            rows = _sample(data, base_dir, recipe.seed)
        kept = divide(rows, test.calibration, test.heldout, recipe.seed)
        train, calibration, heldout = (_pairs(part, data, recipe.seed) for part in kept)
        sides = Sides(train, calibration, heldout, kept.calibration, kept.heldout)
    for name in ("train", "calibration", "heldout"):
        found = len(getattr(sides, name))
        if found < _LEAST:
            raise InputError(
                f"the data gives {found} pair(s) for the {name} side, at least {_LEAST} are needed;"
                f" add rows, or change test.heldout, test.calibration or data.min_gap"
            )
    return sides


def _pairs(rows: Sequence[Judged], data: LabelData | SampledData, seed: int) -> list[Pair]:
    if isinstance(data, SampledData):
        return pairs_within_queries(rows, data.min_gap, data.max_pairs, seed)
    if data.pairing == "query":
        limit = data.pairs_per_row * len(rows)
        return pairs_within_queries(rows, data.min_gap, limit, seed)
    return pairs_across_queries(rows, data.min_gap, data.pairs_per_row, seed)


def _read(data: PairData | LabelData, base_dir: Path) -> Table:
    source = DataSettings(path=data.path, name=data.name, split=data.split)
    return read_table(source, base_dir)


def _read_pairs(data: PairData, base_dir: Path) -> list[Pair]:
    table = _read(data, base_dir)
    pairs = []
    for position, row in enumerate(table.rows):
        where = table.where(position)
        query = [] if data.query_column is None else _turns(row, data.query_column, "user", where)
        answers = [
            (*query, *_turns(row, column, "assistant", where))
            for column in (data.chosen_column, data.rejected_column)
        ]
        for answer in answers:
            if len(answer) < 2 or answer[-1]["role"] != "assistant":
                raise InputError(
                    f"{where}: chosen and rejected must be answers to a query, or conversations "
                    f"that end with one; correct the row or data.query_column"
                )
        if answers[0] != answers[1]:
            pairs.append(Pair(*answers))
    return pairs


def _read_labels(data: LabelData, base_dir: Path) -> list[Judged]:
    table = _read(data, base_dir)
    used = {data.query_column, data.completion_column, data.score_column}
    rows: dict[str, Judged] = {}
    for position, row in enumerate(table.rows):
        where = table.where(position)
        score = row.get(data.score_column)
        if isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
            raise InputError(f"{where}: '{data.score_column}' is {score!r}; write a number")
        query = _turns(row, data.query_column, "user", where)
        answer = _turns(row, data.completion_column, "assistant", where)
        columns = {name: value for name, value in row.items() if name not in used}
        judged = Judged((*query, *answer), float(score), columns)
        rows.setdefault(repr(judged.messages), judged)  # the first judgement of an answer counts
    return list(rows.values())


def _turns(row: dict[str, Any], column: str, role: str, where: str) -> list[Message]:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    given = [value] if is_message(value) else value
    if not isinstance(given, list) or not given or not all(is_message(each) for each in given):
        raise InputError(
            f"{where}: '{column}' is neither text nor a list of messages; correct it, or name "
            "another column"
        )
    turns = [
        read_message(each, f"{where}, column '{column}', turn {i + 1}")
        for i, each in enumerate(given)
    ]
    wrong = next((i for i, each in enumerate(turns) if each["role"] not in _ROLES), None)
    if wrong is not None:
        raise InputError(
            f"{where}, column '{column}', turn {wrong + 1} has the role {turns[wrong]['role']!r}; "
            f"write one of {', '.join(_ROLES)}"
        )
    return turns


def _sample(data: SampledData, base_dir: Path, seed: int) -> list[Judged]:
    """Completions of the base with the rewards' total; those that none scored are left out."""
    split = load_queries(data.queries, base_dir)
    rewards = build_rewards(data.rewards, base_dir)
    base = load_base(data.base)
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer, data.base.template))
    rewards.bind_policy(policy)
    prompt: Prompt = NonePrompt() if data.system is None else TextPrompt(data.system)
    engine = make_engine(policy)
    engine.sync(prompt)
    queries = [*split.train, *split.heldout]
    groups = engine.generate(queries, data.completions_per_query, data.sampling, seed).groups
    totals = rewards.score(groups, step=0).total.tolist()
    rewards.close()
    flat = [(group.query, each) for group in groups for each in group.completions]
    rows = [
        Judged(
            (*query.messages, {"role": "assistant", "content": completion.text}),
            total,
            query.columns,
        )
        for (query, completion), total in zip(flat, totals, strict=True)
        if not math.isnan(total) and completion.text.strip()
    ]
    return list({repr(row.messages): row for row in rows}.values())
