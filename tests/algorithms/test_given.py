"""Supervised tuning, preferences and distillation: their losses, and that they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import Algorithm, BatchView, MicroSignal
from rlprompt.algorithms.distill import Distill, DistillSettings
from rlprompt.algorithms.dpo import DPO, DPOSettings
from rlprompt.algorithms.supervised import Supervised, SupervisedSettings
from rlprompt.kernels.lm_head import head_logits
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.training.update import PhaseClock, Updater
from rlprompt.types import Group
from tests.fixtures.runs import completion, queries, sampled_batch, scored, tiny_policy

FREE = SoftSettings(num_virtual_tokens=8, max_norm_ratio=None)
TEACHER = "she is in here, he is out there"


def learn(
    policy: Policy, algorithm: Algorithm, batch: RolloutBatch, steps: int, lr: float = 0.05
) -> list[dict[str, float]]:
    """Metrics of each step on the same batch."""
    reference = NonePrompt() if "ref_logprobs" in algorithm.needs else None
    teacher = TextPrompt(TEACHER) if "teacher_states" in algorithm.needs else None
    updater = Updater(
        policy, algorithm, reference, temperature=1.0, token_budget=4096, teacher=teacher
    )
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    return [updater.learn(batch, optimizer, lambda: lr, 1.0, PhaseClock())[1] for _ in range(steps)]


def given(*answers: tuple[int, ...]) -> RolloutBatch:
    """The same answers to three queries."""
    groups = [Group(q, tuple(completion(*ids) for ids in answers)) for q in queries(3)]
    return scored(groups, [float("nan")] * 3 * len(answers))


@pytest.mark.parametrize(("normalizer", "expected"), [("token", 11 / 5), ("sequence", 7 / 4)])
def test_supervised_is_the_mean_negative_log_likelihood(normalizer: Any, expected: float) -> None:
    algorithm = Supervised(SupervisedSettings(normalizer=normalizer), 8)
    lengths = torch.tensor([4, 1])
    mask = torch.arange(4)[None] < lengths[:, None]
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0], [-1.0, 0.0, 0.0, 0.0]])
    unscored = torch.full((2,), torch.nan)
    signal = algorithm.signal(BatchView(unscored, lengths, lengths > 0, 1))
    weights = algorithm.token_weights(signal.counted_lengths)[:, None] * mask
    scores = TokenScores(logprobs, torch.zeros(2, 4), mask, torch.empty(0, 0))
    micro = MicroSignal(signal.advantages[:, None], weights, None, None)
    assert float(algorithm.losses(scores, micro).total()) == pytest.approx(expected)


def test_supervised_learns_to_say_what_it_is_given() -> None:
    policy = tiny_policy(prompt=FREE)
    rows = learn(policy, Supervised(SupervisedSettings(), 8), given((83, 12)), 40)
    assert rows[0]["target_logprob"] < -2 and rows[-1]["target_logprob"] > -0.2
    assert rows[-1]["loss"] == pytest.approx(-rows[-1]["target_logprob"], rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_preferences_are_learned(loss: Any) -> None:
    policy = tiny_policy(prompt=FREE)
    algorithm = DPO(DPOSettings(loss=loss), 8)
    rows = learn(policy, algorithm, given((83, 12), (14, 15, 16)), 20)
    assert rows[-1]["rewards/accuracies"] == 1.0
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.3
    assert rows[-1]["loss"] < rows[0]["loss"]


def next_token(policy: Policy, batch: RolloutBatch, prompt: Prompt) -> Tensor:
    """Log-probabilities [M, V] at every completion token, from whole logits."""
    prefix = policy.prefix(prompt)
    asked = [group.query for group in batch.groups]
    tree = policy.tree(asked, [group.completions for group in batch.groups], prefix, prompt)
    states = policy.logprobs(tree, prefix).states.detach()
    return head_logits(states, policy.forward.head).log_softmax(1)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_distillation_is_the_kl_between_two_prompts(divergence: Any) -> None:
    policy = tiny_policy(dtype=torch.float64, prompt=FREE)
    batch = sampled_batch(policy)
    settings = DistillSettings(teacher=TEACHER, divergence=divergence)
    (metrics,) = learn(policy, Distill(settings, 8, policy.forward.head), batch, 1, lr=1e-9)
    student = next_token(policy, batch, policy.prompt)
    teacher = next_token(policy, batch, TextPrompt(TEACHER))
    one, other = (teacher, student) if divergence == "forward_kl" else (student, teacher)
    expected = (one.exp() * (one - other)).sum(1).mean()
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert metrics["loss/kl"] == pytest.approx(metrics["teacher_kl"])


def test_a_prompt_that_is_its_teacher_has_nothing_to_learn() -> None:
    settings = SoftSettings(num_virtual_tokens=None, init_text=TEACHER)
    policy = tiny_policy(dtype=torch.float64, prompt=settings)
    algorithm = Distill(DistillSettings(teacher=TEACHER), 8, policy.forward.head)
    (metrics,) = learn(policy, algorithm, sampled_batch(policy), 1)
    assert metrics["teacher_kl"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["grad_norm"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "options",
    [{}, {"divergence": "reverse_kl"}, {"divergence": "jensen_shannon", "mixture": 0.5}],
    ids=["forward", "reverse", "jensen_shannon"],
)
def test_distillation_comes_close_to_the_teacher(options: dict[str, Any]) -> None:
    policy = tiny_policy(prompt=FREE)
    algorithm = Distill(DistillSettings(teacher=TEACHER, **options), 8, policy.forward.head)
    rows = learn(policy, algorithm, sampled_batch(policy), 40, lr=0.03)
    assert rows[-1]["teacher_kl"] < 0.5 * rows[0]["teacher_kl"]
