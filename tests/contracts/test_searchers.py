"""What holds for every searcher of a recipe, found in the one list of them.

A searcher that joins `SEARCHERS` must be given settings in `tests.fixtures.searches`, or the first
test fails.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load, save

from rlprompt.engines.native import NativeEngine
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Searcher, SearchStart
from rlprompt.search.make import SEARCHERS, AnySearchSettings, make_searcher
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.searches import CASES, trial


def settings_of(name: str) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(AnySearchSettings)
    return adapter.validate_python({"type": name, **CASES[name]})


def start_of(name: str) -> Prompt:
    kind = SEARCHERS[name].starts_from[0]
    return TextPrompt("Be nice.") if kind == "text" else make(kind, tiny_policy())


def searcher_of(name: str) -> Searcher:
    given = SearchStart(
        start_of(name), 0, NativeEngine(tiny_policy()), queries(8), queries_per_step=2
    )
    return make_searcher(settings_of(name), given)


def steps(searcher: Searcher, seed: int, count: int) -> Iterator[list[int]]:
    """Try what is asked for, with drawn scores; gives the ids of each step."""
    draw = random.Random(seed)
    for _ in range(count):
        if searcher.is_over:
            return
        asked = searcher.ask()
        searcher.tell([trial(c, [[draw.random()], [draw.random()]]) for c in asked])
        yield [candidate.id for candidate in asked]


def test_every_searcher_is_tested_here() -> None:
    assert CASES.keys() == SEARCHERS.keys()


@pytest.mark.parametrize("name", CASES)
def test_settings_survive_being_written_and_read(name: str) -> None:
    settings = settings_of(name)
    adapter: TypeAdapter[Any] = TypeAdapter(AnySearchSettings)
    assert adapter.validate_python(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize("name", CASES)
def test_it_begins_at_the_start_and_asks_for_one_at_least(name: str) -> None:
    searcher = searcher_of(name)
    assert set(searcher.starts_from) <= {kind["type"] for kind in KINDS.values()}
    prompt, start = searcher.incumbent.prompt, start_of(name)
    assert prompt.init_text == start.init_text != ""
    assert prompt.state_dict().keys() == start.state_dict().keys()
    for key, tensor in start.state_dict().items():
        assert torch.equal(prompt.state_dict()[key], tensor)
    assert not searcher.is_over
    tried = list(steps(searcher, 1, 4))
    assert all(ids and len(set(ids)) == len(ids) for ids in tried)
    assert searcher.incumbent.id in {number for ids in tried for number in ids} | {0}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_searcher_goes_on_where_its_state_was_taken(name: str, after: int) -> None:
    """Through the files of a checkpoint and back; what it does later does not reach the state."""
    searcher = searcher_of(name)
    list(steps(searcher, 1, after))
    state = searcher.state()
    kept = LearnerState(load(save(dict(state.tensors))), json.loads(json.dumps(state.plain)))
    straight = list(steps(searcher, 2, 6))
    for found in (kept, state):
        again = searcher_of(name)
        again.restore(found)
        assert list(steps(again, 2, 6)) == straight
        assert again.is_over == searcher.is_over
        assert again.incumbent.id == searcher.incumbent.id
        assert again.state().plain == searcher.state().plain
        for key, tensor in searcher.state().tensors.items():
            assert torch.equal(again.state().tensors[key], tensor)
