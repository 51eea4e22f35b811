"""`rlprompt forecast`: whether prompts can help a recipe, before anything is trained."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlprompt.certify.forecast import Forecast, Rewards, forecast, prompt_signal, signal
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.endpoints.ledger import BudgetSpentError
from rlprompt.engines.base import Generation
from rlprompt.engines.make import require_support
from rlprompt.errors import InputError
from rlprompt.files import to_json
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.recipe.build import Shared, build_prompt, build_shared
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.rewards import build_rewards
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.collect import collect
from rlprompt.tracking.console import PlainConsole
from rlprompt.types import Query

_SHOWN = 5
"""Queries that are named on each side."""


def run(
    recipe_path: Path,
    overrides: Sequence[str],
    *,
    num_queries: int = 24,
    completions: int = 4,
    texts: Path | None = None,
    difference: float = 0.05,
    as_json: bool = False,
    verbose: bool = False,
) -> None:
    """Draw completions of a few prompts for training queries, score them, and say what they tell.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        num_queries: number of training queries, the first in the recipe's order.
        completions: number of completions of each query under each prompt, at least 2.
        texts: a JSON file with a list of further system texts.
        difference: mean difference for which the queries needed are said.
        as_json: whether JSON is printed in place of tables.
        verbose: whether to log more.

    Raises:
        InputError: the recipe is wrong, has no reward, or nothing could be scored.
    """
    if not difference > 0.0:
        raise InputError(f"--difference is {difference:g}; give one above 0")
    notes = PlainConsole(stderr=True)
    setup_logging(notes, logging.WARNING, verbose)
    recipe = load_recipe(recipe_path, overrides)
    if not any(reward.role == "score" for reward in recipe.rewards):
        raise InputError(
            "the recipe has no reward with the role score, so there is nothing to forecast; add one"
        )
    further = [] if texts is None else _read_texts(texts)
    with notes.status("loading data, rewards and model"):
        shared = build_shared(recipe, recipe_path.parent)
        prompts = _prompts(recipe, build_prompt(recipe, shared.target, recipe_path.parent), further)
        require_support(shared.engine, tuple(prompts.values()))
        rewards = build_rewards(recipe.rewards, recipe_path.parent)
        if isinstance(shared.target, Policy):
            rewards.bind_policy(shared.target)
    queries = shared.data.train[:num_queries]
    try:
        with notes.status("drawing and scoring completions"):
            table, again = _table(recipe, shared, rewards, prompts, queries, completions)
    except BudgetSpentError as error:
        raise InputError(f"{error}; raise budget, or lower --queries") from error
    finally:
        rewards.close()
    try:
        found = forecast(table, again)
    except ValueError as error:
        raise InputError(f"no forecast can be made: {error}") from error
    asked = [query.text for query in queries]
    report = _report(found, list(prompts), asked, table, difference)
    queries_per_step = recipe.training.queries_per_step
    report["step"] = {
        "queries": queries_per_step,
        "completions": completions,
        "between_share": found.between_share(queries_per_step, completions),
    }
    if as_json:
        sys.stdout.write(to_json(report, indent=2) + "\n")
    else:
        _show(report, PlainConsole())


def _prompts(recipe: Recipe, start: Prompt, further: Sequence[str]) -> Mapping[str, Prompt]:
    """Prompts by what they are called, the start first; equal texts once."""
    prompts: dict[str, Prompt] = {"start": start, "base": NonePrompt()}
    evaluation = recipe.evaluation
    written = [evaluation.handwritten, *evaluation.texts]
    texts = [*written, *getattr(recipe.search, "texts", ()), *further]
    met = {start.init_text}
    for text in texts:
        if text is not None and text not in met:
            met.add(text)
            name = "handwritten" if text == evaluation.handwritten else f"text {len(met) - 1}"
            prompts[name] = TextPrompt(text)
    return prompts


def _read_texts(path: Path) -> list[str]:
    try:
        texts = json_text.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(
            f"'{path}' cannot be read as JSON ({why}); name a list of texts"
        ) from error
    if not isinstance(texts, list) or not all(isinstance(t, str) and t.strip() for t in texts):
        raise InputError(f"'{path}' is not a list of texts; write one, such as [\"Be brief.\"]")
    return texts


def _table(
    recipe: Recipe,
    shared: Shared,
    rewards: RewardRunner,
    prompts: Mapping[str, Prompt],
    queries: Sequence[Query],
    completions: int,
) -> tuple[Any, Any]:
    """Rewards [P, Q, n] of all prompts, and [Q, n] of the start's completions scored again."""
    rows, again = [], None

    def draw() -> Generation:
        return shared.engine.generate(queries, completions, recipe.sampling, recipe.seed)

    for prompt in prompts.values():
        shared.engine.sync(prompt)
        batch = collect(draw, rewards, step=0)
        rows.append(_square(batch.rewards.total, len(queries)))
        if again is None:
            again = _square(rewards.score(batch.groups, step=0).total, len(queries))
    return np.stack(rows), again


def _square(total: Tensor, queries: int) -> Any:
    return total.double().numpy().reshape(queries, -1).copy()


def _report(
    found: Forecast,
    names: Sequence[str],
    queries: Sequence[str],
    table: Rewards,
    difference: float,
) -> dict[str, Any]:
    """What is printed, as plain values."""
    spread, between = signal(table[0]), prompt_signal(table)
    known = [i for i in range(len(queries)) if not math.isnan(spread[i])]
    ranked = sorted(known, key=lambda i: -spread[i])
    return {
        "outlook": found.outlook,
        "sentence": found.sentence,
        "num_queries": found.num_queries,
        "num_dropped": found.num_dropped,
        "means": dict(zip(names, found.means, strict=True)),
        "shares": {
            "prompts": found.prompt_share,
            "prompts by query": found.query_prompt_share,
            "chance": found.chance_share,
        },
        "p_value": found.p_value,
        "gain": found.gain,
        "group_spread": found.group_spread,
        "flat_groups": found.flat_groups,
        "best_of_n": found.best_of_n,
        "noise": None if math.isnan(found.noise) else found.noise,
        "difference": difference,
        "queries_needed": None if found.is_flat else found.queries_needed(difference),
        "signal": [
            {
                "query": queries[i],
                "spread": float(spread[i]),
                "between_prompts": None if math.isnan(between[i]) else float(between[i]),
            }
            for i in ranked
        ],
    }


def _show(report: Mapping[str, Any], console: PlainConsole) -> None:
    console.print(Text(report["sentence"], style="bold"), soft_wrap=True)
    means = Table("prompt", "mean reward")
    for name, mean in report["means"].items():
        means.add_row(name, f"{mean:.3f}")
    console.print(means)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report["shares"].items())
    noise, step = report["noise"], report["step"]
    lines = [
        f"{report['num_queries']} queries, {report['num_dropped']} left out for a missing reward",
        f"variance of one query's rewards: {shares}",
        f"variance of the mean over a step's {step['queries']} queries x {step['completions']}: "
        f"prompts {step['between_share']:.0%}",
        f"spread within a group of the start: {report['group_spread']:.3f}; "
        f"{report['flat_groups']:.0%} of groups are flat and teach nothing",
        f"best of n of the start's own completions: {report['best_of_n']:.3f}",
        f"noise of the reward itself: {'not known' if noise is None else f'{noise:.3f}'}",
        f"a difference of {report['difference']:g} needs {_needed(report['queries_needed'])}",
    ]
    for line in lines:
        console.print(line, soft_wrap=True)
    signals = report["signal"]
    ends = Table("query", "spread", "between prompts", title="most and least signal")
    for row in signals if len(signals) <= 2 * _SHOWN else signals[:_SHOWN] + signals[-_SHOWN:]:
        between = row["between_prompts"]
        shown = "-" if between is None else f"{between:.3f}"
        ends.add_row(row["query"][:70], f"{row['spread']:.3f}", shown)
    console.print(ends)


def _needed(queries: int | None) -> str:
    return f"{queries} queries" if queries is not None else "nobody knows how many: none was seen"
