"""Runs on datasets as others write them: pairs with an implicit prompt, ShareGPT, system turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprompt.algorithms.supervised import SupervisedSettings
from rlprompt.errors import InputError
from rlprompt.prompts.soft import SoftSettings
from rlprompt.recipe.build import build_single_run, started_from_data
from rlprompt.recipe.keywords import Found, data_section
from rlprompt.recipe.schema import Recipe
from tests.fixtures.runs import QUERIES, merged, tiny_recipe, tiny_trainer

SYSTEM = "the sun and the land"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_preferences_are_learned_from_rows_with_an_implicit_prompt(tmp_path: Path) -> None:
    rows = [
        {
            "chosen": [user(text), assistant("the sun is out")],
            "rejected": [user(text), assistant("no")],
        }
        for text in QUERIES
    ]
    changes: dict[str, Any] = {
        "algorithm": {"type": "dpo"},
        "data": {"rows": rows, "heldout": 2},
        "rewards": [],
    }
    plain = tiny_recipe(tmp_path).plain()
    plain["algorithm"] = {}
    recipe = Recipe(**merged(plain, changes))
    run = build_single_run(recipe, tmp_path, tmp_path / "run")
    summary = run.run()
    assert summary["steps"] == 3
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert "rewards/accuracies" in row


def test_the_answers_of_sharegpt_conversations_are_learned(tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "the sun"}]}
        for text in QUERIES
    ]
    plain = tiny_recipe(tmp_path).plain()
    plain |= {"algorithm": SupervisedSettings().model_dump(), "rewards": []}
    plain["data"] |= {"rows": rows, "query_column": "conversations"}
    summary = build_single_run(Recipe(**plain), tmp_path, tmp_path / "run").run()
    assert summary["steps"] == 3


@pytest.mark.parametrize("column", ["query", "prompt", "messages", "conversations"])
def test_python_finds_the_column_of_the_queries(column: str) -> None:
    rows = [{"id": 1, column: [user("the sun")]}]
    assert data_section(rows, Found())["query_column"] == column


def rows_with_system(text: str = SYSTEM) -> list[Any]:
    return [{"query": [{"role": "system", "content": text}, user(each)]} for each in QUERIES]


def test_a_prompt_starts_from_the_system_turn_of_the_data(tmp_path: Path) -> None:
    data = {"rows": rows_with_system(), "system": "init"}
    default = SoftSettings.model_fields["init_text"].default
    prompt = {"init_text": default, "num_virtual_tokens": None}
    run = tiny_trainer(tmp_path, tmp_path / "run", data=data, prompt=prompt)
    started = run.parts.policy.prompt
    assert started.init_text == SYSTEM
    tokens = run.parts.policy.slot_ids(SYSTEM)
    assert started.parameters()[0].shape[0] == len(tokens)
    assert all(turn["role"] == "user" for turn in run.parts.data.train[0].messages)
    stored = Recipe(**run.parts.recipe)  # what an artifact carries can be run again
    assert stored.prompt.model_dump()["init_text"] == SYSTEM
    assert started_from_data(stored, run.parts.data).prompt == stored.prompt


def test_two_starts_are_refused(tmp_path: Path) -> None:
    data = {"rows": rows_with_system(), "system": "init"}
    with pytest.raises(InputError, match=r"prompt\.init_text and data\.system: init both say"):
        tiny_trainer(tmp_path, tmp_path / "run", data=data)
    with pytest.raises(ValueError, match=r"which a prompt of type adapter does not have"):
        Recipe(**merged(tiny_recipe(tmp_path).plain(), {"data": data}) | ADAPTER)
    artifact = {"init_text": None, "num_virtual_tokens": None, "from_artifact": "a"}
    with pytest.raises(ValueError, match=r"data\.system: init and prompt\.from_artifact both say"):
        tiny_recipe(tmp_path, data=data, prompt=artifact)


ADAPTER = {"prompt": {"type": "adapter"}}
