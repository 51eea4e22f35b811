"""A group on several ranks: the same completions, numbers and gradients; ranks are threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import Algorithm
from rlprompt.distributed.ranks import Ranks
from rlprompt.distributed.shared_engine import SharedEngine
from rlprompt.engines.base import Engine, Generation
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.measures import (
    BaseKL,
    BaseLogprob,
    Measure,
    QueryInformation,
    TargetLogprob,
    TeacherKL,
)
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.algorithms import algorithm_of, gradients, learn
from tests.fixtures.rank_gradients import exact_policy
from tests.fixtures.runs import queries, sampled_batch, tiny_policy
from tests.fixtures.thread_ranks import ThreadRanks, on_ranks

SAMPLING = SamplingSettings(max_tokens=7)


def engine_of(policy: Policy) -> NativeEngine:
    engine = NativeEngine(policy)
    engine.sync(policy.prompt)
    return engine


class Plain(NativeEngine):
    """An engine that knows nothing of pieces."""

    generate_some = Engine.generate_some


def test_some_completions_of_a_query_are_those_of_all() -> None:
    policy = tiny_policy("llama", torch.float64)
    whole = engine_of(policy).generate(queries(3), 5, SAMPLING, seed=4)
    expected = _tokens(whole)[2][1:4]
    plain = Plain(policy)
    plain.sync(policy.prompt)
    for engine in (engine_of(policy), plain):
        some = engine.generate_some(queries(3)[2], range(1, 4), 5, SAMPLING, seed=4, first=2)
        assert _tokens(some) == [expected]


@pytest.mark.parametrize(("num_ranks", "count", "size"), [(3, 2, 4), (5, 2, 2), (7, 3, 1)])
def test_ranks_share_a_query(num_ranks: int, count: int, size: int) -> None:
    policy = tiny_policy("llama", torch.float64)
    whole = engine_of(policy).generate(queries(count), size, SAMPLING, seed=3, first=2)

    def draw(ranks: ThreadRanks) -> Generation:
        shared = SharedEngine(engine_of(tiny_policy("llama", torch.float64)), ranks)
        return shared.generate(queries(count), size, SAMPLING, seed=3, first=2)

    for drawn in on_ranks(num_ranks, draw):
        assert _tokens(drawn) == _tokens(whole)
        assert [group.query for group in drawn.groups] == [group.query for group in whole.groups]


def test_ranks_that_draw_together_send_a_digest() -> None:
    whole = engine_of(tiny_policy("llama", torch.float64)).generate(queries(3), 4, SAMPLING, seed=3)

    def draw(ranks: ThreadRanks) -> tuple[Generation, int]:
        shared = SharedEngine(engine_of(tiny_policy("llama", torch.float64)), ranks, together=True)
        drawn = shared.generate(queries(3), 4, SAMPLING, seed=3)
        each = shared.generate_each([TextPrompt("the rain")] * 2, queries(1), 1, SAMPLING, seed=3)
        assert len(each) == 2
        return drawn, ranks.meeting.sent

    found = on_ranks(4, draw)
    assert all(_tokens(drawn) == _tokens(whole) for drawn, _ in found)
    assert found[0][1] < 2 * 4 * 100  # two rollouts, four ranks: 12 completions have more bytes


def test_ranks_that_drew_something_else_take_what_the_first_has() -> None:
    found = on_ranks(3, lambda ranks: ranks.same(lambda: ("drawn", min(1, ranks.rank)), "x"))
    assert found == [("drawn", 0)] * 3


def learned(
    name: str, minibatches: int, groups: int, num_ranks: int
) -> list[tuple[dict[str, float], list[Tensor]]]:
    """Metrics and gradients on each of several ranks, or on one."""

    def algorithm(policy: Policy) -> Algorithm:
        return algorithm_of(name, policy, num_epochs=2, num_minibatches=minibatches)

    torch.manual_seed(0)  # the rewards
    policy = exact_policy()
    size = algorithm(policy).group_size
    batch = sampled_batch(policy, group_size=size, count=groups)

    def learn_on(ranks: Ranks) -> tuple[dict[str, float], list[Tensor]]:
        own = exact_policy()
        made = algorithm(own)
        return learn(own, made, batch, 64, ranks=ranks), gradients(own, made)

    return [learn_on(Ranks())] if num_ranks == 1 else on_ranks(num_ranks, learn_on)


@pytest.mark.parametrize(
    ("name", "num_ranks", "groups", "minibatches"),
    [
        ("grpo", 6, 4, 1),
        ("grpo", 3, 4, 2),  # two groups per minibatch, on three ranks
        ("grpo", 2, 5, 2),
        ("gspo", 5, 2, 1),
        ("rloo", 4, 3, 2),
        ("distill_given", 6, 4, 2),
        ("dpo", 6, 4, 1),  # pairs stay whole, two ranks have nothing
    ],
)
def test_gradients_are_those_of_one_rank(
    name: str, num_ranks: int, groups: int, minibatches: int
) -> None:
    ((alone, expected),) = learned(name, minibatches, groups, 1)
    assert float(expected[0].norm()) > 1e-6
    for metrics, found in learned(name, minibatches, groups, num_ranks):
        assert metrics.keys() == alone.keys()
        for key, value in alone.items():
            assert metrics[key] == pytest.approx(value, rel=1e-9, abs=1e-10), key
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("num_ranks", [2, 3, 6])
def test_measures_are_those_of_one_rank(num_ranks: int) -> None:
    policy = tiny_policy("llama", torch.float64)
    drawn = engine_of(policy).generate(queries(4), 3, SAMPLING, seed=1).groups

    def measures(ranks: Ranks) -> dict[str, Measure]:
        own, teacher = tiny_policy("llama", torch.float64), TextPrompt("Be nice.")
        return {
            "logprob": BaseLogprob(own, 64, ranks),
            "kl": BaseKL(own, 64, ranks),
            "information": QueryInformation(own, 64, ranks),
            "target": TargetLogprob(own, drawn, 64, ranks),
            "teacher": TeacherKL(own, teacher, lambda _: drawn, 64, ranks),
        }

    def measure(ranks: Ranks) -> dict[str, list[float]]:
        return {k: each(policy.prompt, drawn).by_query for k, each in measures(ranks).items()}

    alone = measure(Ranks())
    for found in on_ranks(num_ranks, measure):
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


def _tokens(drawn: Generation) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group.completions] for group in drawn.groups]
