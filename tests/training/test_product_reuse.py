"""Updates that take products of a rollout: where they do, and that no bit of a run changes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.engines.base import Generation
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.cpu.rollout_products import ProductStore
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.recipe.build import build_run
from rlprompt.runs.checkpoint import load_checkpoint
from rlprompt.training.update import PhaseClock, Updater
from tests.fixtures.products import KEEPS, USABLE, WITHOUT_AMX, counted_takes, needs_products
from tests.fixtures.runs import queries, scored, tiny_policy, tiny_recipe

SAMPLING = SamplingSettings(max_tokens=6)
ROOT = Path(__file__).parents[2]
MEMBERS: list[dict[str, Any]] = [
    {"name": "a", "changes": {"seed": 1}},
    {"name": "b", "changes": {"seed": 2, "training.optimizer.lr_relative": 0.2}},
    {
        "name": "lora",
        "changes": {"prompt": {"type": "adapter", "text": "the sun", "method": {"type": "lora"}}},
    },
]


def soft_policy(policy: Policy, seed: int) -> Policy:
    """Another policy over the same base."""
    made = policy.sibling()
    made.prompt = SoftPrompt.create(SoftSettings(num_virtual_tokens=6), made, seed)
    return made


def bf16_policy() -> Policy:
    return tiny_policy("llama", torch.bfloat16)


class Learner:
    """Steps of a prompt with an engine of its own."""

    def __init__(self, policy: Policy, reuse_mib: int, seed: int = 0) -> None:
        self.policy, self.seed = policy, seed
        self.engine = NativeEngine(policy, NativeSettings(reuse_mib=reuse_mib))
        algorithm = GRPO(GRPOSettings(group_size=4), SAMPLING.max_tokens)
        self.updater = Updater(policy, algorithm, None, temperature=1.0, token_budget=64)
        self.optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)

    def drawn(self, seed: int) -> Generation:
        self.engine.sync(self.policy.prompt)
        return self.engine.generate(queries(3), 4, SAMPLING, seed, keep_products=True)

    def learn(self, drawn: Generation) -> None:
        rewards = [float(len(set(c.token_ids))) for g in drawn.groups for c in g.completions]
        batch = replace(scored(drawn.groups, rewards), products=drawn.products)
        self.updater.learn(batch, self.optimizer, lambda: 0.05, 1.0, PhaseClock())

    def steps(self, count: int) -> list[Tensor]:
        for number in range(count):
            self.learn(self.drawn(100 * self.seed + number))
        return [parameter.detach().clone() for parameter in self.policy.parameters()]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@needs_products
def test_every_update_takes_them_and_no_bit_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = bf16_policy()
    with counted_takes(monkeypatch) as takes:
        without = Learner(soft_policy(policy, 0), reuse_mib=0).steps(3)
        assert takes.count == 0
        learner, counts = Learner(soft_policy(policy, 0), reuse_mib=128), []
        for _ in range(3):
            learner.steps(1)
            counts.append(takes.count)
    assert counts[0] > 0 and len(set(counts)) == 3
    assert_equal(Learner(soft_policy(policy, 0), reuse_mib=128).steps(3), without)


@needs_products
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_batch_whose_memory_was_filled_again_is_learned_from_alike(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = bf16_policy()
    policy.gradient_checkpointing = checkpointing
    results = []
    for refills in (False, True):
        learner = Learner(soft_policy(policy, 0), reuse_mib=128)
        first = learner.drawn(seed=1)
        if refills:
            other = learner.drawn(seed=2)
            assert other.groups != first.groups and other.products is not None
        with counted_takes(monkeypatch) as takes:
            learner.learn(first)
        assert (takes.count > 0) is not refills
        results.append([parameter.detach().clone() for parameter in learner.policy.parameters()])
    assert_equal(results[0], results[1])


@needs_products
def test_threads_with_engines_of_their_own_never_see_each_others_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two policies on one base and a third on its own, at the same time and one by one."""
    shared = bf16_policy()
    policies = [soft_policy(shared, 0), soft_policy(shared, 1), soft_policy(bf16_policy(), 2)]
    alone = [Learner(soft_policy(p, s), 128, s).steps(4) for s, p in enumerate(policies)]
    learners = [Learner(policy, 128, seed) for seed, policy in enumerate(policies)]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        found[number] = learners[number].steps(4)

    with counted_takes(monkeypatch) as takes:
        threads = [threading.Thread(target=work, args=(n,), name=str(n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(takes.by_thread) == ["0", "1", "2"]
    stores = [store for used in takes.by_thread.values() for store in used]
    assert len(stores) == len(set(stores)) == 3
    for number in range(3):
        assert_equal(found[number], alone[number])


def ran(folder: Path, output: Path, reuse_mib: int, **changes: Any) -> None:
    """A tiny run, or a population, in bfloat16."""
    plain = {"model": {"dtype": "bfloat16"}, "engine": {"reuse_mib": reuse_mib}, **changes}
    build_run(tiny_recipe(folder, **plain), folder, output).run()


def assert_same_runs(one: Path, two: Path) -> None:
    first, second = (load_checkpoint(output / "checkpoints").tensors for output in (one, two))
    assert first.keys() == second.keys()
    names = [n for n in first if n.startswith(("prompt/", "optimizer/", "algorithm/", "best/"))]
    assert any(name.startswith("prompt/") for name in names)
    assert_equal([first[name] for name in names], [second[name] for name in names])


@needs_products
def test_members_of_a_population_take_them_and_no_bit_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    start = ProductStore.start

    def counting(store: ProductStore, *arguments: Any) -> Any:
        asked.append(takes.count)
        return start(store, *arguments)

    monkeypatch.setattr(ProductStore, "start", counting)
    changes = {"population": MEMBERS, "training": {"steps": 6}}
    with counted_takes(monkeypatch) as takes:
        ran(tmp_path, tmp_path / "reuse", 128, **changes)
    # As many rollouts are kept as there are steps, and each is followed by an update that takes.
    counts = [*asked, takes.count]
    assert len(asked) == 6
    assert all(after > before for before, after in pairwise(counts))
    with counted_takes(monkeypatch) as takes:
        ran(tmp_path, tmp_path / "without", 0, **changes)
    assert takes.count == 0
    for member in MEMBERS:
        runs = [tmp_path / name / "members" / member["name"] for name in ("reuse", "without")]
        assert_same_runs(runs[0], runs[1])


@needs_products
@pytest.mark.parametrize(
    ("changes", "rollouts"),
    [
        ({"training": {"overlap_rollouts": True, "steps": 4}}, 1),
        ({"algorithm": {"type": "ppo", "group_size": 4, "num_epochs": 2}}, 3),
        ({"algorithm": {"type": "grpo", "group_size": 4, "kl_coef": 0.1}}, 3),
    ],
    ids=["overlap", "ppo", "reference"],
)
def test_no_bit_of_a_run_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], rollouts: int
) -> None:
    """Whatever is drawn ahead, scored before the update, or scored under a reference."""
    started: list[ProductStore] = []
    start = ProductStore.start

    def counting(store: ProductStore, *arguments: Any) -> Any:
        started.append(store)
        return start(store, *arguments)

    monkeypatch.setattr(ProductStore, "start", counting)
    with counted_takes(monkeypatch) as takes:
        ran(tmp_path, tmp_path / "reuse", 128, **changes)
    assert takes.count > 0
    assert len(started) == rollouts
    ran(tmp_path, tmp_path / "without", 0, **changes)
    assert_same_runs(tmp_path / "reuse", tmp_path / "without")


@pytest.mark.slow
@pytest.mark.skipif(KEEPS or not USABLE, reason="the tests of this page run in this process")
def test_all_of_this_runs_without_amx() -> None:
    """With AMX, oneDNN packs in a way that the kernels do not read: told not to, it does as before.

    So that on such a machine, too, everything about products is tested.
    """
    assert torch.ops.rlprompt_cpu.has_packed_product()
    tests = ROOT / "tests"
    others = ("model/cpu/test_rollout_products", "distributed/test_shared_engine")
    files = [Path(__file__), *(tests / f"{name}.py" for name in (*others, "rollout/test_sources"))]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rs", "-m", "not model", *files],
        env={**os.environ, **WITHOUT_AMX, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert child.returncode == 0, child.stdout[-4000:]
    assert "1 skipped" in child.stdout, child.stdout[-4000:]  # this one
