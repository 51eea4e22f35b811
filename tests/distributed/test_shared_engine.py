"""An engine per rank: what each rank gets of the others' completions, and of its own products."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pytest
import torch

from rlprompt.distributed.ranks import Ranks
from rlprompt.distributed.shared_engine import SharedEngine
from rlprompt.engines.base import Generation
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.products import needs_products
from tests.fixtures.runs import queries, tiny_policy

T = TypeVar("T")
SAMPLING = SamplingSettings(max_tokens=6, min_tokens=6)


@dataclass(frozen=True)
class _Rank(Ranks):
    """One of two ranks; the other's answers are known, and all travel as they do over gloo."""

    other: object = None

    def each(self, work: Callable[[], T], what: str) -> list[T]:
        mine = pickle.loads(pickle.dumps(work()))
        answers = [mine, pickle.loads(pickle.dumps(self.other))]
        return answers if self.rank == 0 else answers[::-1]


def _engine(policy: Policy) -> NativeEngine:
    engine = NativeEngine(policy)
    engine.sync(policy.prompt)
    return engine


@needs_products
def test_a_rank_keeps_the_products_of_its_own_queries() -> None:
    policy = tiny_policy("llama", torch.bfloat16)
    whole = _engine(policy).generate(queries(4), 2, SAMPLING, seed=3, keep_products=True)
    answers = [group.completions for group in whole.groups]
    for rank, mine in ((0, [0, 1]), (1, [2, 3])):
        theirs = [answers[g] for g in range(4) if g not in mine]
        shared = SharedEngine(_engine(policy), _Rank(rank, 2, other=theirs))
        drawn = shared.generate(queries(4), 2, SAMPLING, seed=3, keep_products=True)
        assert drawn == whole
        assert drawn.products is not None
        prefix = policy.prefix()
        for g, group in enumerate(drawn.groups):
            rows = drawn.products.rows(group.completions, prefix, num_queries=3)
            assert (rows is not None) == (g in mine)


def test_ranks_divide_a_population() -> None:
    policy = tiny_policy("llama", torch.float64)
    prompts = [TextPrompt("the rain"), NonePrompt(), policy.prompt, TextPrompt("in and on")]
    alone = _engine(policy)
    whole = alone.generate_each(prompts, queries(3), 2, SAMPLING, seed=3)
    answers = [[group.completions for group in each.groups] for each in whole]
    for rank, mine in ((0, [0, 1]), (1, [2, 3])):
        theirs = [answers[place] for place in range(4) if place not in mine]
        own = _engine(policy)
        shared = SharedEngine(own, _Rank(rank, 2, other=theirs))
        drawn = shared.generate_each(prompts, queries(3), 2, SAMPLING, seed=3)
        assert _tokens(drawn) == _tokens(whole)
        last = own.generate(queries(3), 2, SAMPLING, seed=3)  # it stays synced on every rank
        assert _tokens([last]) == _tokens(whole[-1:])


def test_few_prompts_are_drawn_under_by_all_ranks() -> None:
    policy = tiny_policy("llama", torch.float64)
    whole = _engine(policy).generate(queries(4), 2, SAMPLING, seed=3)
    theirs = [group.completions for group in whole.groups[2:]]
    shared = SharedEngine(_engine(policy), _Rank(0, 2, other=theirs))
    drawn = shared.generate_each([policy.prompt], queries(4), 2, SAMPLING, seed=3)
    assert _tokens(drawn) == _tokens([whole])
    with pytest.raises(InputError, match="no prompt to draw under"):
        shared.generate_each([], queries(4), 2, SAMPLING, seed=3)


def test_ranks_divide_queries_under_prompts_of_their_own() -> None:
    policy = tiny_policy("llama", torch.float64)
    prompts = [TextPrompt("the rain"), NonePrompt(), policy.prompt, TextPrompt("in and on")]
    whole = _engine(policy).generate_under(prompts, queries(4), 2, SAMPLING, seed=3)
    answers = [group.completions for group in whole.groups]
    for rank, mine in ((0, [0, 1]), (1, [2, 3])):
        theirs = [answers[g] for g in range(4) if g not in mine]
        shared = SharedEngine(_engine(policy), _Rank(rank, 2, other=theirs))
        drawn = shared.generate_under(prompts, queries(4), 2, SAMPLING, seed=3)
        assert _tokens([drawn]) == _tokens([whole])
    with pytest.raises(InputError, match="no prompt to draw under"):
        shared.generate_under([], queries(4), 2, SAMPLING, seed=3)


def _tokens(drawn: list[Generation]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for g in each.groups for c in g.completions] for each in drawn]
