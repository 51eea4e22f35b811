"""However an update is divided, its gradient is the same: float64, 1e-10, every algorithm.

Micro-batches under a soft prompt are in `tests/contracts/test_algorithms.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlprompt.distributed.ranks import Ranks
from rlprompt.rollout.collect import RolloutBatch
from tests.fixtures.algorithms import CASES, algorithm_of, batch_for, gradients, learn
from tests.fixtures.prompts import make
from tests.fixtures.rank_gradients import (
    KINDS,
    all_gradients,
    gradients_on,
    gradients_short_of_memory,
)
from tests.fixtures.runs import tiny_policy

WHOLE, CUT = 100_000, 64
ONCE = {"num_epochs": 2, "num_minibatches": 1}  # the second update has ratios to clip


def turned(batch: RolloutBatch) -> RolloutBatch:
    """The same groups, the last one first."""
    count = len(batch.groups)
    size = len(batch.completions) // count
    order = [g * size + i for g in reversed(range(count)) for i in range(size)]
    rewards = replace(batch.rewards, total=batch.rewards.total[order])
    return replace(batch, groups=tuple(reversed(batch.groups)), rewards=rewards)


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert float(one[0].norm()) > 1e-6
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["soft", "prefix_low_rank", "lora", "soft_then_prefix"])
@pytest.mark.parametrize("name", CASES)
def test_neither_the_order_of_groups_nor_micro_batches_matter(name: str, kind: str) -> None:
    policy = tiny_policy(dtype=torch.float64)
    policy.prompt = make(kind, policy, noise=0.1)
    batch = batch_for(algorithm_of(name, policy, **ONCE), policy)
    found = []
    for divided, budget in ((batch, WHOLE), (batch, CUT), (turned(batch), WHOLE)):
        algorithm = algorithm_of(name, policy, **ONCE)
        learn(policy, algorithm, divided, budget)
        found.append(gradients(policy, algorithm))
    whole, cut, other_way = found
    assert_same(whole, cut)
    assert_same(whole, other_way)


@pytest.mark.slow
def test_the_number_of_ranks_does_not_matter(tmp_path: Path) -> None:
    """Four groups on one rank, and on three, of which one has two."""
    alone = all_gradients(Ranks())
    assert {tuple(key.split("/")[:2]) for key in alone} == {(n, k) for n in CASES for k in KINDS}
    for together in gradients_on(3, tmp_path):
        assert together.keys() == alone.keys()
        for key, grad in alone.items():
            # At rate 0 the value head stays zero, and with it the gradient of all but its end.
            assert float(grad.abs().max()) > 0 or key.startswith("ppo/"), key
            assert float((together[key] - grad).abs().max()) < 1e-10, key


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_halves_on_its_own(tmp_path: Path) -> None:
    """A whole base on each rank: they meet at the gradient only, so the others need not know."""
    alone = gradients_short_of_memory(Ranks())["grpo"]
    assert float(alone.abs().max()) > 1e-6
    for together in gradients_on(2, tmp_path, "short"):
        assert float((together["grpo"] - alone).abs().max()) < 1e-10
