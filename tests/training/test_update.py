"""Updates: micro-batches change nothing, clipping acts from the second update on, NaN is caught."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlprompt.algorithms.advantages import Normalizer
from rlprompt.algorithms.base import MicroSignal, TokenLosses
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.forward.tree import TokenTree
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.runs.learner import NotFiniteError
from rlprompt.training.rows import rows_of, view_of
from rlprompt.training.update import PhaseClock, Updater
from tests.fixtures.runs import completion, queries, sampled_batch, scored, tiny_policy

ONE, MANY = 100_000, 64


def learn(
    policy: Policy,
    batch: RolloutBatch,
    *,
    budget: int = ONE,
    lr: float = 0.0,
    reference: Prompt | None = None,
    max_grad_norm: float | None = None,
    temperature: float = 1.0,
    importance_cap: float | None = None,
    **settings: Any,
) -> dict[str, float]:
    """One `Updater.learn` with plain gradient descent; its metrics."""
    algorithm = GRPO(GRPOSettings(group_size=4, **settings), 10)
    updater = Updater(
        policy,
        algorithm,
        reference,
        temperature=temperature,
        token_budget=budget,
        importance_cap=importance_cap,
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    _, metrics = updater.learn(batch, optimizer, lambda: lr, max_grad_norm, PhaseClock())
    return metrics


def gradient(policy: Policy) -> torch.Tensor:
    (parameter,) = policy.parameters()
    assert parameter.grad is not None
    return parameter.grad.clone()


@pytest.mark.parametrize("normalizer", ["sequence", "token", "constant"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_many_micro_batches_give_the_gradient_of_one(family: str, normalizer: Normalizer) -> None:
    policy = tiny_policy(family)
    batch = sampled_batch(policy)
    settings: dict[str, Any] = {
        "normalizer": normalizer,
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "reference": NonePrompt(),
    }
    whole_metrics = learn(policy, batch, budget=ONE, **settings)
    whole = gradient(policy)
    cut_metrics = learn(policy, batch, budget=MANY, **settings)
    cut = gradient(policy)
    assert whole.norm() > 1e-4
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-5 * float(whole.abs().max()))
    assert cut_metrics == pytest.approx(whole_metrics, abs=2e-5)


def test_gradient_is_that_of_the_plain_loss() -> None:
    """The two-stage backward against autograd through prefix and completions in one graph."""
    policy = tiny_policy()
    batch = sampled_batch(policy)
    learn(policy, batch, budget=MANY)
    ours = gradient(policy)

    algorithm = GRPO(GRPOSettings(group_size=4), 10)
    signal = algorithm.signal(view_of(batch, batch.rewards.total, rows_of(batch)))
    weights = algorithm.token_weights(signal.counted_lengths)
    policy.prompt.parameters()[0].grad = None
    prefix = policy.prefix()
    tree = policy.tree(
        [group.query for group in batch.groups],
        [group.completions for group in batch.groups],
        prefix,
    )
    scores = policy.logprobs(tree, prefix)
    # On policy the surrogate's gradient is that of -w * A * log p.
    (-(weights * signal.advantages)[:, None] * scores.logprobs * scores.mask).sum().backward()
    torch.testing.assert_close(ours, gradient(policy), rtol=0, atol=1e-6)


def test_a_prompt_that_changes_between_sampling_and_learning_shows_in_the_gap() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    name = "sampling/sampling_logp_difference"
    same = learn(policy, batch)
    assert same[f"{name}/mean"] < same[f"{name}/max"] < 1e-4
    with torch.no_grad():
        policy.parameters()[0].mul_(-1)
    assert learn(policy, batch)[f"{name}/mean"] > 1e-2


def with_drawn(batch: RolloutBatch, factor: float) -> RolloutBatch:
    """The batch as if every token had been drawn with so many times its probability."""
    groups = [
        replace(
            group,
            completions=tuple(
                replace(
                    each,
                    sampling_logprobs=tuple(v + math.log(factor) for v in each.sampling_logprobs),
                )
                for each in group.completions
            ),
        )
        for group in batch.groups
    ]
    return replace(batch, groups=tuple(groups))


@pytest.mark.parametrize(("factor", "weight", "cut"), [(2.0, 0.5, 0.0), (0.5, 1.5, 1.0)])
def test_tokens_that_were_drawn_elsewhere_are_weighed(
    factor: float, weight: float, cut: float
) -> None:
    policy = tiny_policy("llama", torch.float64)
    batch = sampled_batch(policy)
    plain = learn(policy, batch, importance_cap=1.5)
    assert plain["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-6)
    expected = gradient(policy)
    metrics = learn(policy, with_drawn(batch, factor), importance_cap=1.5)
    torch.testing.assert_close(gradient(policy), weight * expected, rtol=1e-3, atol=1e-6)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(weight, rel=1e-5)
    assert metrics["sampling/importance_sampling_ratio/truncated"] == cut
    gap = metrics["sampling/sampling_logp_difference/mean"]
    assert gap == pytest.approx(math.log(2.0), rel=1e-5)
    learn(policy, with_drawn(batch, factor))  # without a cap nothing is corrected
    torch.testing.assert_close(gradient(policy), expected, rtol=1e-5, atol=1e-12)


def test_later_updates_keep_the_weight_of_the_first_policy() -> None:
    """What drew the tokens against the policy before the first update, whatever came since."""
    policy = tiny_policy()
    batch = with_drawn(sampled_batch(policy), 2.0)
    metrics = learn(policy, batch, lr=0.5, importance_cap=3.0, num_epochs=3)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(0.5, rel=1e-3)


def test_a_batch_drawn_ahead_is_corrected_by_its_own_ratio_alone() -> None:
    policy = tiny_policy("llama", torch.float64)
    batch = replace(with_drawn(sampled_batch(policy), 0.9), prefetched=True)
    learn(policy, batch)
    expected = gradient(policy)
    metrics = learn(policy, batch, importance_cap=1.5)
    torch.testing.assert_close(gradient(policy), expected, rtol=0, atol=0)
    assert "sampling/importance_sampling_ratio/truncated" not in metrics


def test_temperature_of_the_sampling_is_that_of_the_scores() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy, temperature=0.6)
    name = "sampling/sampling_logp_difference/max"
    assert learn(policy, batch, temperature=0.6)[name] < 1e-4
    assert learn(policy, batch, temperature=1.0)[name] > 1e-2


def test_clipping_acts_from_the_second_update_on() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    once = learn(policy, batch, lr=0.5, num_epochs=1)
    assert once["clip_ratio/region_mean"] == 0.0
    policy = tiny_policy()
    thrice = learn(policy, batch, lr=0.5, num_epochs=3, budget=MANY)
    assert thrice["clip_ratio/low_mean"] > 0 and thrice["clip_ratio/high_mean"] > 0
    assert thrice["clip_ratio/region_mean"] == pytest.approx(
        thrice["clip_ratio/low_mean"] + thrice["clip_ratio/high_mean"]
    )
    # What the engine sampled with is compared with the first update only.
    assert thrice["sampling/sampling_logp_difference/max"] < 1e-4


def test_every_update_gets_its_own_rate_and_moves_the_prompt() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    rates = iter([0.1, 0.2, 0.3])
    updater = Updater(
        policy, GRPO(GRPOSettings(group_size=4, num_epochs=3), 10), None, temperature=1.0,
        token_budget=ONE,
    )  # fmt: skip
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    before = policy.parameters()[0].detach().clone()
    clock = PhaseClock()
    _, metrics = updater.learn(batch, optimizer, lambda: next(rates), 1.0, clock)
    assert metrics["learning_rate"] == 0.3 and list(rates) == []
    assert not torch.equal(policy.parameters()[0], before)
    assert set(clock.seconds) == {"prefill", "forward", "backward", "optimizer"}


class SmallMemory(Policy):
    """A policy on a machine whose memory holds a number of packed tokens."""

    room = 0
    raises: type[RuntimeError] = torch.OutOfMemoryError

    def logprobs(self, tree: TokenTree, *args: Any, **kwargs: Any) -> TokenScores:
        if len(tree.token_ids) > self.room:
            raise self.raises("DefaultCPUAllocator: can't allocate memory")
        return super().logprobs(tree, *args, **kwargs)


@pytest.mark.parametrize("raises", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_the_micro_batches_and_changes_no_result(
    raises: type[RuntimeError], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, metrics = [], []
    batch = sampled_batch(tiny_policy(), count=6)
    for room in (10**6, 150):
        policy = tiny_policy()
        policy.__class__ = SmallMemory
        assert isinstance(policy, SmallMemory)
        policy.room, policy.raises = room, raises
        with caplog.at_level(logging.WARNING):
            metrics.append(
                learn(policy, batch, reference=NonePrompt(), kl_coef=0.1, lr=0.1, budget=1024)
            )
        prompts.append(policy.parameters()[0].detach())
    warned = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert warned[-1] == "out of memory: micro-batches have 128 tokens from now on"
    assert len(warned) == 3
    assert (prompts[0] - prompts[1]).abs().max() < 1e-5
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)


def test_memory_that_holds_no_micro_batch_is_an_error() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    policy.__class__ = SmallMemory
    with pytest.raises(InputError, match=r"memory ran out .* 64 tokens, the smallest.*max_tokens"):
        learn(policy, batch, budget=1024)
    shards: Any = SimpleNamespace(ends=nullcontext)
    policy.base = replace(policy.base, shards=shards)
    with pytest.raises(InputError, match=r"micro-batches of 1024 tokens, .*training.token_budget"):
        learn(policy, batch, budget=1024)


def test_kl_is_measured_to_the_reference() -> None:
    policy = tiny_policy(prompt=SoftSettings(num_virtual_tokens=None, init_text="the sun"))
    batch = sampled_batch(policy)
    itself = learn(policy, batch, reference=TextPrompt("the sun"), kl_coef=0.1, budget=MANY)
    assert itself["kl"] == pytest.approx(0.0, abs=1e-6)
    assert itself["loss/kl"] == pytest.approx(0.0, abs=1e-6)
    base = learn(policy, batch, reference=NonePrompt(), kl_coef=0.1, budget=MANY)
    assert base["kl"] > 0.01
    assert base["loss"] == pytest.approx(base["loss/rl"] + base["loss/kl"], abs=1e-6)
    assert "kl" not in learn(policy, batch)


class Recording(GRPO):
    """GRPO that keeps what it was asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(GRPOSettings(group_size=4, **settings), 10)
        self.asked: list[tuple[TokenScores, MicroSignal]] = []

    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        self.asked.append((scores, micro))
        return super().losses(scores, micro)


def learn_recorded(policy: Policy, batch: RolloutBatch, **settings: Any) -> tuple[Any, Recording]:
    algorithm = Recording(**settings)
    updater = Updater(policy, algorithm, None, temperature=1.0, token_budget=ONE)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    return updater.learn(batch, optimizer, lambda: 0.5, None, PhaseClock())[1], algorithm


def test_ratios_are_to_the_policy_before_the_first_update() -> None:
    policy = tiny_policy()
    _, algorithm = learn_recorded(policy, sampled_batch(policy), num_epochs=3)
    first, second, third = (scores.logprobs for scores, _ in algorithm.asked)
    assert not torch.allclose(first, second) and not torch.allclose(second, third)
    old = [micro.old_logprobs for _, micro in algorithm.asked]
    assert old[0] is None
    for later in old[1:]:
        assert later is not None and torch.equal(later, first) and not later.requires_grad


def test_masked_completions_count_in_no_metric_but_the_sampling_gap() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    assert 0 < int(batch.terminated.sum()) < 12
    metrics, algorithm = learn_recorded(policy, batch, mask_truncated=True)
    ((scores, micro),) = algorithm.asked
    counted = scores.mask & (micro.weights > 0)
    assert int(counted.sum()) == int(batch.lengths[batch.terminated].sum())
    assert metrics["entropy"] == pytest.approx(float(scores.entropy[counted].mean()), rel=1e-5)
    name = "sampling/sampling_logp_difference/mean"
    assert metrics[name] == pytest.approx(learn(tiny_policy(), batch)[name], rel=1e-3)


def test_a_batch_of_truncated_completions_teaches_nothing_and_has_no_means() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy, max_tokens=3, min_tokens=3, stop_token_ids=())
    assert not bool(batch.terminated.any())
    metrics = learn(policy, batch, mask_truncated=True)
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    assert "entropy" not in metrics


def test_completions_of_one_token_can_be_learned_from() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy, max_tokens=1)
    assert learn(policy, batch, budget=MANY)["grad_norm"] > 0


def test_equal_rewards_leave_the_prompt_alone() -> None:
    policy = tiny_policy()
    batch = scored(sampled_batch(policy).groups, [0.3] * 12)
    before = policy.parameters()[0].detach().clone()
    metrics = learn(policy, batch, lr=1.0)
    assert metrics["frac_reward_zero_std"] == 1.0
    assert torch.equal(policy.parameters()[0], before)


def test_the_base_gets_no_gradient() -> None:
    policy = tiny_policy()
    learn(policy, sampled_batch(policy), lr=0.1, num_epochs=2)
    assert all(p.grad is None for p in policy.base.model.parameters())


def test_a_loss_that_is_not_finite_is_caught_before_the_optimizer() -> None:
    policy = tiny_policy()
    batch = sampled_batch(policy)
    (parameter,) = policy.parameters()
    with torch.no_grad():
        parameter[0, 0] = math.nan
    before = parameter.detach().clone()
    with pytest.raises(NotFiniteError, match="loss/rl, gradient norm is not finite"):
        learn(policy, batch, lr=0.1, max_grad_norm=1.0)
    assert torch.equal(parameter.nan_to_num(), before.nan_to_num())


class Exploding(torch.optim.SGD):
    """An optimizer whose update overflows."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data[0, 0] = math.inf


def test_an_update_that_breaks_the_prompt_is_caught() -> None:
    policy = tiny_policy(prompt=SoftSettings(num_virtual_tokens=4, max_norm_ratio=None))
    optimizer = Exploding(policy.parameters(), lr=0.1)
    updater = Updater(
        policy, GRPO(GRPOSettings(group_size=4), 10), None, temperature=1.0, token_budget=ONE
    )
    with pytest.raises(NotFiniteError, match=r"learning rate 0\.1 is not finite"):
        updater.learn(sampled_batch(policy), optimizer, lambda: 0.1, None, PhaseClock())


def next_token_probability(policy: Policy, token: int) -> float:
    """The mean probability that a completion starts with `token`, over the queries."""
    prefix = policy.prefix()
    asked = queries(3)
    tree = policy.tree(asked, [[completion(token)] for _ in asked], prefix)
    return float(policy.logprobs(tree, prefix).logprobs.detach().exp().mean())


def test_grpo_finds_a_known_optimum() -> None:
    """Reward 1 for completions that start with one token: its probability rises above 90 %."""
    policy = tiny_policy(prompt=SoftSettings(num_virtual_tokens=8, max_norm_ratio=None))
    token = 83
    before = next_token_probability(policy, token)
    engine = NativeEngine(policy)
    algorithm = GRPO(GRPOSettings(group_size=16, num_epochs=2), 1)
    updater = Updater(policy, algorithm, None, temperature=1.0, token_budget=4096)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.05)
    for step in range(40):
        engine.sync(policy.prompt)
        groups = engine.generate(queries(3), 16, SamplingSettings(max_tokens=1), step).groups
        hits = [float(c.token_ids[0] == token) for g in groups for c in g.completions]
        updater.learn(scored(groups, hits), optimizer, lambda: 0.05, 1.0, PhaseClock())
    assert before < 0.1
    assert next_token_probability(policy, token) > 0.9
