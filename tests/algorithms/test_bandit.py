"""Bandits over the first token, whose best policy is known: every policy gradient finds it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.make import make_algorithm
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.lm_head import head_logits
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftSettings
from rlprompt.prompts.text import NonePrompt
from rlprompt.recipe.schema import Recipe
from rlprompt.training.update import PhaseClock, Updater
from tests.fixtures.prompts import make as make_prompt
from tests.fixtures.runs import completion, queries, scored, tiny_policy

TARGET = 83
LR = 0.05
FREE = SoftSettings(num_virtual_tokens=8, max_norm_ratio=None)
GRPO = {"type": "grpo", "group_size": 16, "num_epochs": 2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "dr_grpo": {**GRPO, "normalizer": "constant", "scale_rewards": "none"},
    "dapo": {**GRPO, "normalizer": "token", "clip_high": 0.28},
    "gspo": {**GRPO, "ratio": "sequence_mean"},
    "cispo": {**GRPO, "surrogate": "cispo", "normalizer": "token", "clip_high": 1.0},
    "rloo": {"type": "rloo", "group_size": 16, "num_epochs": 2},
    "reinforce": {"type": "reinforce", "group_size": 16, "num_epochs": 2},
    "ppo": {"type": "ppo", "group_size": 16, "num_epochs": 2, "value_head": {"lr": 0.01}},
}


def make(policy: Policy, **settings: Any) -> Algorithm:
    reward = {"path": "builtin:length", "options": {"target": 1}}
    checked = Recipe.model_validate(
        {
            "name": "bandit",
            "data": {"rows": ["q", "r"]},
            "algorithm": settings,
            "rewards": [reward],
        }
    )
    return make_algorithm(checked.algorithm, policy, max_tokens=2, seed=0)


class Training:
    """Draws completions, rewards those that start with the target, and updates."""

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        num_queries: int,
        tokens: int,
        lr: float = LR,
        overlaps: bool = False,
    ) -> None:
        needs_reference = "ref_logprobs" in algorithm.needs
        reference = NonePrompt() if needs_reference else None
        self.policy, self.algorithm, self.num_queries = policy, algorithm, num_queries
        self.lr = lr
        self.updater = Updater(policy, algorithm, reference, temperature=1.0, token_budget=4096)
        own = [{"params": list(o.parameters), "lr": o.lr} for o in algorithm.own_parameters()]
        self.optimizer = torch.optim.Adam([{"params": policy.parameters(), "lr": lr}, *own])
        self.engine = NativeEngine(policy)
        self.sampling = SamplingSettings(max_tokens=tokens)
        self.step = 0
        self.behaviour = policy.prompt.copy() if overlaps else policy.prompt

    def run(self, steps: int, last_share: float = 1.0) -> None:
        """Some steps, over which the learning rate falls linearly to a share of it."""
        for number in range(steps):
            self.step += 1
            lr = self.lr * (1.0 + (last_share - 1.0) * number / steps)
            self.optimizer.param_groups[0]["lr"] = lr
            self.engine.sync(self.behaviour)
            ahead = self.behaviour is not self.policy.prompt
            if ahead:
                self.behaviour = self.policy.prompt.copy()
            groups = self.engine.generate(
                queries(self.num_queries), self.algorithm.group_size, self.sampling, self.step
            ).groups
            hits = [float(c.token_ids[0] == TARGET) for g in groups for c in g.completions]
            batch, clock = scored(groups, hits), PhaseClock()
            batch = replace(batch, prefetched=ahead)
            self.updater.learn(
                batch, self.optimizer, partial(float, lr), 1.0, clock, seed=self.step
            )


def first_token_logprobs(policy: Policy, num_queries: int, prompt: Any = None) -> Tensor:
    """Exact log-probabilities [queries, V] of the first token."""
    prefix = policy.prefix(prompt)
    asked = queries(num_queries)
    tree = policy.tree(asked, [[completion(TARGET)] for _ in asked], prefix, prompt)
    states = policy.logprobs(tree, prefix).states.detach()
    return head_logits(states, policy.forward.head).log_softmax(1)


def target_probability(policy: Policy, num_queries: int) -> float:
    return float(first_token_logprobs(policy, num_queries)[:, TARGET].exp().mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_policy_gradient_reaches_the_optimum(name: str) -> None:
    """Reward 1 for completions that start with one token, whatever follows."""
    policy = tiny_policy(prompt=FREE)
    train_to_optimum(Training(policy, make(policy, **ALGORITHMS[name]), num_queries=3, tokens=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "cispo", "rloo", "reinforce", "ppo"])
def test_batches_that_are_one_step_old_reach_it_too(name: str) -> None:
    policy = tiny_policy(prompt=FREE)
    algorithm = make(policy, **ALGORITHMS[name])
    train_to_optimum(Training(policy, algorithm, num_queries=3, tokens=2, overlaps=True))


def train_to_optimum(training: Training) -> None:
    """Until the expected reward is above 0.95 of its optimum, 1; fails when it is not in time."""
    policy = training.policy
    assert target_probability(policy, 3) < 0.1
    for _ in range(10):
        training.run(8)
        if target_probability(policy, 3) > 0.95:
            return
    pytest.fail(f"only {target_probability(policy, 3):.3f} after {training.step} steps")


OTHERS = [
    *((name, kind) for name in ("grpo", "rloo", "ppo", "reinforce") for kind in ("prefix", "lora")),
    *(("grpo", kind) for kind in ("prefix_low_rank", "ia3", "text_then_soft", "soft_then_prefix")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), OTHERS)
def test_every_representation_reaches_the_optimum(name: str, kind: str) -> None:
    """The same bandit; the learning rate is the same share of each representation's size.

    A prefix is free of its trust region here, as the soft prompts above are.
    """
    policy = tiny_policy()
    free: dict[str, Any] = {"max_offset": None} if kind.startswith("prefix") else {}
    policy.prompt = make_prompt(kind, policy, **free)
    lr = 0.25 * policy.prompt.scale(policy)
    algorithm = make(policy, **ALGORITHMS[name])
    train_to_optimum(Training(policy, algorithm, num_queries=3, tokens=2, lr=lr))


WITH_KL: dict[str, dict[str, Any]] = {
    "grpo_k2_loss": {
        "type": "grpo", "group_size": 48, "scale_rewards": "none", "kl_estimator": "k2",
    },
    "rloo_k1_reward": {"type": "rloo", "group_size": 48},
    "reinforce_k1_reward": {"type": "reinforce", "group_size": 48},
    "ppo_k1_reward": {
        "type": "ppo", "group_size": 48, "num_epochs": 1, "whiten_advantages": False,
        "value_head": {"lr": 0.01},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_KL)
def test_with_a_kl_the_optimum_is_the_tilted_reference(name: str) -> None:
    """The policy that maximises E[r] - c KL is p_ref exp(r / c) / Z, and its value c log Z."""
    coef = 0.2
    policy = tiny_policy(prompt=FREE)
    rewards = torch.zeros(policy.base.vocab_size)
    rewards[TARGET] = 1.0
    reference = first_token_logprobs(policy, 1, NonePrompt())[0]
    tilted = (reference + rewards / coef).log_softmax(0)
    best = float(coef * (reference + rewards / coef).logsumexp(0))

    def objective() -> float:
        logprobs = first_token_logprobs(policy, 1)[0]
        return float((logprobs.exp() * (rewards - coef * (logprobs - reference))).sum())

    start = objective()
    assert target_probability(policy, 1) < 0.1 < 0.5 < float(tilted[TARGET].exp()) < 0.6
    training = Training(policy, make(policy, kl_coef=coef, **WITH_KL[name]), 1, tokens=1)
    training.run(80, last_share=0.0)
    reached = target_probability(policy, 1)
    assert reached == pytest.approx(float(tilted[TARGET].exp()), abs=0.15)
    # A few tokens in the slot cannot put all other tokens exactly where the reference has them.
    assert start + 0.5 * (best - start) < objective() <= best
