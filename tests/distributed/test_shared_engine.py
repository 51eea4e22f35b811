"""An engine per rank: what each rank gets of the others' completions, and of its own products."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from rlprompt.distributed.ranks import Ranks
from rlprompt.distributed.shared_engine import SharedEngine
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.policy import Policy
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
