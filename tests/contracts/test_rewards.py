"""Every built-in reward and every file in reward_models/ keeps the contract of a reward.

Found by discovery: a new file needs a function or class named `reward` and a list `EXAMPLES`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pickle
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlprompt.rewards import BUILTIN, Example, RewardSettings, build_rewards, load_reward
from rlprompt.types import Completion, Group, Query

FOLDER = Path(__file__).parents[2] / "reward_models"
FILES = sorted(file for file in FOLDER.rglob("*.py"))
NEEDED = {file: re.search(r'^REQUIRES = "(\w+)"', file.read_text("utf-8"), re.M) for file in FILES}
MISSING = {
    file: match.group(1)
    for file, match in NEEDED.items()
    if match and importlib.util.find_spec(match.group(1)) is None
}
"""Files whose optional package is not installed; their tests skip and say so."""
PATHS: list[Any] = [f"builtin:{name}" for name in BUILTIN]
PATHS += [
    pytest.param(
        f"{file}:reward",
        marks=pytest.mark.skipif(file in MISSING, reason=f"needs {MISSING.get(file)}"),
    )
    for file in FILES
]

ODD_TEXTS = [
    "",
    " \n\t ",
    ".",
    "\U0001f3f4\u200d\u2620\ufe0f",
    "\u200b\u0000\ufffd",
    "Les \u00e9l\u00e8ves \u00e9taient l\u00e0.",
    "\u6708\u306f\u304d\u308c\u3044\u3067\u3059\u3002",
    "\u0645\u0631\u062d\u0628\u0627 \u0643\u064a\u0641\u061f",
    "a" * 3000,
    "1. 2. 3.",
    "```json\n{}\n```",
]


def load(path: str, options: Any = None) -> Any:
    settings = RewardSettings(path=path, options=dict(options or {}))
    return load_reward(settings, FOLDER, BUILTIN)


def examples_of(path: str) -> Sequence[Example]:
    if path.startswith("builtin:"):
        module = importlib.import_module(BUILTIN[path.removeprefix("builtin:")].split(":")[0])
    else:
        module = sys.modules[load(path).__module__]
    examples: Sequence[Example] = module.EXAMPLES
    return examples


def siblings_of(path: str) -> list[list[Example]]:
    """Examples of the same query, columns and options, together."""
    rows: dict[str, list[Example]] = {}
    for example in examples_of(path):
        key = repr((example.query, dict(example.columns), dict(example.options)))
        rows.setdefault(key, []).append(example)
    return list(rows.values())


def compares_siblings(path: str) -> bool:
    """Such a reward says so by naming `group_index`; its values depend on the group."""
    reward = load(path, examples_of(path)[0].options)
    return "group_index" in inspect.signature(reward).parameters


def score(
    path: str, example: Example, texts: list[str], conversational: bool = True
) -> list[float]:
    """Values through the runner; NaN for None."""
    options = dict(example.options)
    runner = build_rewards([RewardSettings(path=path, name="r", options=options)], FOLDER)
    query = Query(({"role": "user", "content": example.query},), example.columns, 0, conversational)
    completions = []
    for text in texts:
        ids = tuple(token_ids_of(text))
        completions.append(Completion(ids, (0.0,) * len(ids), text, True))
    batch = runner.score([Group(query, tuple(completions))], step=0)
    runner.close()
    values: list[float] = batch.values["r"].tolist()
    return values


def token_ids_of(text: str) -> list[int]:
    # One id per word, the same in every process (str hashes are not).
    return [sum(map(ord, word)) for word in text.split()] + [2]


def test_the_folder_is_not_empty() -> None:
    assert len(FILES) >= 4
    assert len(PATHS) == len(FILES) + len(BUILTIN)


@pytest.mark.parametrize("path", PATHS)
def test_examples_score_within_their_bounds(path: str) -> None:
    for siblings in siblings_of(path):
        values = score(path, siblings[0], [each.completion for each in siblings])
        for example, value in zip(siblings, values, strict=True):
            assert example.low - 1e-6 <= value <= example.high + 1e-6, (example, value)


@pytest.mark.parametrize("path", PATHS)
def test_good_examples_score_above_bad_ones(path: str) -> None:
    for siblings in siblings_of(path):
        values = score(path, siblings[0], [each.completion for each in siblings])
        good = [value for value, each in zip(values, siblings, strict=True) if each.good]
        bad = [value for value, each in zip(values, siblings, strict=True) if not each.good]
        assert good, siblings[0].query
        assert bad, siblings[0].query
        assert min(good) > max(bad), list(zip(values, siblings, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_examples_hold_an_empty_answer_and_it_never_wins(path: str) -> None:
    empty = [example for example in examples_of(path) if not example.completion]
    assert empty
    assert not any(example.good for example in empty)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("conversational", [True, False])
def test_odd_texts_give_one_finite_value_each(path: str, conversational: bool) -> None:
    example = examples_of(path)[0]
    values = score(path, example, ODD_TEXTS, conversational)
    assert len(values) == len(ODD_TEXTS)
    assert all(math.isfinite(value) and -1.0 <= value <= 1.0 for value in values), values


@pytest.mark.parametrize("path", PATHS)
def test_both_formats_give_the_same_values(path: str) -> None:
    examples = examples_of(path)
    texts = [each.completion for each in examples]
    assert score(path, examples[0], texts, True) == score(path, examples[0], texts, False)


@pytest.mark.parametrize("path", PATHS)
def test_values_do_not_depend_on_the_rest_of_the_batch_or_on_earlier_calls(path: str) -> None:
    if compares_siblings(path):
        pytest.skip("it compares the completions of a group with each other")
    examples = examples_of(path)
    texts = [each.completion for each in examples]
    together = score(path, examples[0], texts)
    assert together == [score(path, examples[0], [text])[0] for text in texts]
    assert together == score(path, examples[0], texts)


@pytest.mark.parametrize("path", PATHS)
def test_pickled_reward_gives_the_same_values(path: str) -> None:
    example = examples_of(path)[0]
    reward = load(path, example.options)
    copy = pickle.loads(pickle.dumps(reward))
    arguments: dict[str, Any] = {
        "prompts": [example.query],
        "completions": [example.completion],
        "completion_ids": [token_ids_of(example.completion)],
        **{name: [value] for name, value in example.columns.items()},
    }
    accepted = inspect.signature(reward).parameters
    if "group_index" in accepted:
        arguments = {k: v * 2 for k, v in arguments.items()} | {"group_index": [0, 0]}
    if not any(each.kind is each.VAR_KEYWORD for each in accepted.values()):
        arguments = {name: value for name, value in arguments.items() if name in accepted}
    assert copy(**arguments) == reward(**arguments)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "unit", ["word ", "a", "! ", "I can't ", "\u6708", "\n", "arr matey. ", '{"a":', "1. "]
)
def test_a_huge_completion_takes_less_than_a_second(path: str, unit: str) -> None:
    example = examples_of(path)[0]
    text = unit * (100_000 // len(unit))
    start = time.process_time()  # of all threads, and blind to what else the machine does
    score(path, example, [text])
    assert time.process_time() - start < 1.0
