"""PPO against a plain reference, token by token: eq. 7 of the paper, CleanRL's published formulas.

The reference walks through all completions as one stream of steps with `done` flags, as CleanRL
does with its environments, and knows no padding.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import BatchView, MicroSignal, Signal, TokenLosses
from rlprompt.algorithms.ppo import PPO, BaseShape, PPOSettings
from rlprompt.algorithms.value_head import ValueHeadSettings
from rlprompt.policy import TokenScores

LENGTHS = torch.tensor([5, 1, 3, 4])
TERMINATED = torch.tensor([True, True, False, True])
MASK = torch.arange(5)[None] < LENGTHS[:, None]
WIDTH, MAX_TOKENS = 6, 5
REWARDS = [1.0, -0.5, 2.0, 0.25]


def noise(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or MASK.shape), generator=generator, dtype=torch.float64)


OLD = -noise(0).abs() * MASK
REF = (OLD + 0.3 * noise(1)) * MASK
VALUES = noise(2) * MASK


def ppo(**settings: Any) -> PPO:
    shape = BaseShape(WIDTH, torch.device("cpu"), torch.float64)
    algorithm = PPO(PPOSettings(**settings), MAX_TOKENS, shape)
    head = algorithm._head  # one that has learned nothing gives zeros
    with torch.no_grad():
        head.outer.weight.copy_(noise(3, 1, head.outer.in_features))
    return algorithm


def signal_of(algorithm: PPO, rewards: list[float] = REWARDS) -> Signal:
    scores = torch.tensor(rewards)
    ref = REF if "ref_logprobs" in algorithm.needs else None
    return algorithm.signal(BatchView(scores, LENGTHS, TERMINATED, 1, OLD, ref, VALUES))


def stream(table: Tensor) -> list[float]:
    """The tokens of all completions behind each other."""
    return [float(v) for row, n in zip(table, LENGTHS.tolist(), strict=True) for v in row[:n]]


def reference_rewards(kl_coef: float, penalty: float) -> list[float]:
    rewards = [-kl_coef * (old - ref) for old, ref in zip(stream(OLD), stream(REF), strict=True)]
    last = -1
    for score, length, ended in zip(REWARDS, LENGTHS.tolist(), TERMINATED.tolist(), strict=True):
        last += length
        rewards[last] += score - (0.0 if ended else penalty)
    return rewards


def reference_gae(
    rewards: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """CleanRL's loop; `dones[t]` says that step t begins a new episode."""
    values = stream(VALUES)
    starts = [0]
    for length in LENGTHS.tolist():
        starts.append(starts[-1] + length)
    dones = [float(t in starts) for t in range(len(rewards) + 1)]
    advantages = [0.0] * len(rewards)
    lastgaelam = 0.0
    for t in reversed(range(len(rewards))):
        nextnonterminal = 1.0 - dones[t + 1]
        nextvalue = values[t + 1] if t + 1 < len(values) else 0.0
        delta = rewards[t] + gamma * nextvalue * nextnonterminal - values[t]
        lastgaelam = delta + gamma * lam * nextnonterminal * lastgaelam
        advantages[t] = lastgaelam
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def normalised(values: list[float], shift: bool = True) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return [(v - mean) / math.sqrt(variance) + (0.0 if shift else mean) for v in values]


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize(("kl_coef", "penalty"), [(0.0, 0.0), (0.2, 1.5)])
def test_advantages_and_returns_equal_the_reference(
    kl_coef: float, penalty: float, gamma: float, lam: float, whiten: bool
) -> None:
    signal = signal_of(
        ppo(
            kl_coef=kl_coef, missing_eos_penalty=penalty, gamma=gamma, gae_lambda=lam,
            whiten_rewards=whiten, whiten_advantages=whiten,
        )
    )  # fmt: skip
    rewards = reference_rewards(kl_coef, penalty)
    advantages, returns = reference_gae(
        normalised(rewards, shift=False) if whiten else rewards, gamma, lam
    )
    tolerance = 1e-7 if whiten else 1e-10  # ours adds 1e-8 to variances
    assert signal.returns is not None
    assert stream(signal.returns) == pytest.approx(returns, abs=tolerance)
    wanted = normalised(advantages) if whiten else advantages
    assert stream(signal.advantages) == pytest.approx(wanted, abs=tolerance)
    assert not signal.advantages[~MASK].any() and not signal.returns[~MASK].any()


def losses_of(algorithm: PPO, signal: Signal, logprobs: Tensor, states: Tensor) -> TokenLosses:
    entropy = noise(5).abs() * MASK
    weights = algorithm.token_weights(signal.counted_lengths)[:, None] * MASK
    assert signal.returns is not None
    micro = MicroSignal(signal.advantages, weights.double(), OLD, None, VALUES, signal.returns)
    return algorithm.losses(TokenScores(logprobs, entropy, MASK, states), micro)


@pytest.mark.parametrize("clip_value", [None, 0.2])
def test_losses_and_gradients_equal_the_reference(clip_value: float | None) -> None:
    algorithm = ppo(clip_value=clip_value, value_coef=0.5, clip_low=0.2, clip_high=0.3)
    signal = signal_of(algorithm)
    logprobs = (OLD + 0.4 * noise(4)).requires_grad_()
    states = noise(6, int(MASK.sum()), WIDTH)
    losses = losses_of(algorithm, signal, logprobs, states)
    losses.total().backward()
    values = algorithm.values(states).tolist()

    news, olds = stream(logprobs.detach()), stream(OLD)
    advantages, old_values = stream(signal.advantages), stream(VALUES)
    assert signal.returns is not None
    returns = stream(signal.returns)
    pg, vf, grads, clipped = [], [], [], 0
    for t, advantage in enumerate(advantages):
        ratio = math.exp(news[t] - olds[t])
        first = -advantage * ratio
        second = -advantage * min(max(ratio, 1 - 0.2), 1 + 0.3)
        pg.append(max(first, second))
        grads.append(first if first >= second else 0.0)  # d ratio / d logprob = ratio
        clipped += first < second
        unclipped = (values[t] - returns[t]) ** 2
        step = values[t] - old_values[t]
        if clip_value is not None:
            step = min(max(step, -clip_value), clip_value)
        vf.append(0.5 * max(unclipped, (old_values[t] + step - returns[t]) ** 2))
    count = len(pg)
    assert losses.rl is not None and losses.value is not None
    assert losses.rl.item() == pytest.approx(sum(pg) / count, rel=1e-6)  # weights are float32
    assert losses.value.item() == pytest.approx(0.5 * sum(vf) / count, rel=1e-6)
    assert logprobs.grad is not None
    assert stream(logprobs.grad) == pytest.approx([g / count for g in grads], abs=1e-7)
    assert losses.metrics is not None and clipped > 0
    mean = (losses.metrics["policy/clipfrac_avg"] * MASK).sum() / count
    assert float(mean) == pytest.approx(clipped / count)
    approxkl = (losses.metrics["policy/approxkl_avg"] * MASK).sum() / count
    gaps = [0.5 * (new - old) ** 2 for new, old in zip(news, olds, strict=True)]
    assert float(approxkl) == pytest.approx(sum(gaps) / count)


def test_objective_metrics_are_means_over_completions() -> None:
    metrics = signal_of(ppo(kl_coef=0.2, missing_eos_penalty=1.5)).metrics
    scores = sum(REWARDS) / 4 - 1.5 / 4
    kl = sum(a - b for a, b in zip(stream(OLD), stream(REF), strict=True)) / 4
    assert metrics["objective/scores"] == pytest.approx(scores)
    assert metrics["objective/kl"] == pytest.approx(kl)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.2 * kl)
    assert metrics["objective/rlhf_reward"] == pytest.approx(scores - 0.2 * kl)
    assert metrics["objective/entropy"] == pytest.approx(-sum(stream(OLD)) / 4)
    assert metrics["val/num_eos_tokens"] == 3.0
    assert metrics["val/explained_variance"] < 1.0


def test_a_completion_that_was_not_scored_takes_no_part() -> None:
    """The others have what they have in a batch without it."""
    algorithm = ppo()
    rewards = [1.0, -0.5, math.nan, 0.25]
    with_it = signal_of(algorithm, rewards)
    rest = [0, 1, 3]
    scores = torch.tensor(rewards)[rest]
    view = BatchView(scores, LENGTHS[rest], TERMINATED[rest], 1, OLD[rest], None, VALUES[rest])
    without = algorithm.signal(view)
    assert with_it.counted_lengths.tolist() == [5, 1, 0, 4]
    assert not with_it.advantages[2].any()
    torch.testing.assert_close(with_it.advantages[rest], without.advantages)
    for name, value in without.metrics.items():
        if name != "val/num_eos_tokens":
            assert with_it.metrics[name] == pytest.approx(value), name


def test_the_value_loss_teaches_the_head_and_not_the_prompt() -> None:
    algorithm = ppo()
    states = noise(6, int(MASK.sum()), WIDTH).requires_grad_()
    losses = losses_of(algorithm, signal_of(algorithm), OLD.clone().requires_grad_(), states)
    assert losses.value is not None
    losses.value.backward()
    assert states.grad is None
    (own,) = algorithm.own_parameters()
    assert own.lr == 1e-3
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters)


def test_its_state_is_the_value_head_and_an_adapting_weight() -> None:
    first = ppo(kl_coef=0.1, kl_target=0.05)
    signal_of(first)
    extra = first.after_batch({"kl": 10.0, "loss/rl": 1.0, "loss/value": 0.2})
    assert extra["kl_coef"] > 0.1
    assert extra["loss/policy_avg"] == 1.0 and extra["loss/value_avg"] == pytest.approx(2.0)
    shape = BaseShape(WIDTH, torch.device("cpu"), torch.float64)
    second = PPO(PPOSettings(kl_coef=0.1, kl_target=0.05), MAX_TOKENS, shape, seed=9)
    second.load_state_dict(first.state_dict())
    states = noise(6, 4, WIDTH)
    assert torch.equal(first.values(states), second.values(states))
    assert second.kl_coef == first.kl_coef
    with pytest.raises(ValueError, match="another shape"):
        smaller = PPOSettings(value_head=ValueHeadSettings(hidden_size=3))
        PPO(smaller, 5, shape).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="kl_coef"):
        PPO(PPOSettings(), 5, shape).load_state_dict(first.state_dict())
