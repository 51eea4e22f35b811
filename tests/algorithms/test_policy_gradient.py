"""Settings that all policy gradients share: what is refused, and what each one does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlprompt.algorithms.base import BatchView
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.algorithms.make import AnyAlgorithmSettings
from rlprompt.algorithms.reinforce import RLOO, Reinforce, ReinforceSettings, RLOOSettings
from rlprompt.errors import InputError

RATIOS: list[dict[str, Any]] = [
    {"type": "grpo", "clip_low": 0.1},
    {"type": "rloo", "clip_high": 0.3},
    {"type": "grpo", "ratio": "sequence_mean"},
    {"type": "grpo", "surrogate": "cispo"},
]
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"type": "grpo", "surrogate": "cispo", "clip_low": 0.1, "num_epochs": 2},
        "clip_low has no effect with surrogate: cispo",
    ),
    (
        {"type": "grpo", "ratio": "sequence_mean", "normalizer": "token", "num_epochs": 2},
        "use normalizer: sequence",
    ),
    ({"type": "grpo", "kl_in": "reward"}, "kl_in has no effect while kl_coef is 0"),
    ({"type": "ppo", "kl_in": "loss"}, "kl_in has no effect while kl_coef is 0"),
    ({"type": "grpo", "kl_target": 0.1}, "kl_target has no effect while kl_coef is 0"),
    ({"type": "grpo", "kl_coef": 0.1, "kl_horizon": 5}, "kl_horizon has no effect without"),
    ({"type": "grpo", "kl_coef": 0.1, "kl_estimator": "k1"}, "its expected gradient is zero"),
    ({"type": "rloo", "kl_coef": 0.1, "kl_in": "loss"}, "its expected gradient is zero"),
    ({"type": "dpo", "loss": "ipo", "label_smoothing": 0.1}, "no effect with loss: ipo"),
    ({"type": "dpo", "rejected_column": "chosen"}, "are both 'chosen'"),
    ({"type": "distill", "teacher": " "}, "teacher is blank"),
    ({"type": "distill", "teacher": "a", "mixture": 0.1}, "divergence: forward_kl"),
    ({"type": "distill", "teacher": "a", "completion_column": "b"}, "completions: teacher"),
    (
        {"type": "distill", "teacher": "a", "completions": "given", "group_size": 2},
        "group_size has no effect with completions: given",
    ),
    ({"type": "reinforce", "max_draws": 2}, "Extra inputs"),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG)
def test_settings_without_effect_are_refused(settings: dict[str, Any], sentence: str) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyAlgorithmSettings)
    with pytest.raises(ValidationError, match=sentence):
        adapter.validate_python(settings)


@pytest.mark.parametrize("settings", RATIOS)
def test_a_ratio_needs_later_updates_or_batches_drawn_ahead(settings: dict[str, Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyAlgorithmSettings)
    _, name = settings
    made = adapter.validate_python(settings)
    with pytest.raises(ValueError, match=rf"algorithm\.{name} has no effect with one update per"):
        made.check_ratio(prefetched=False)
    made.check_ratio(prefetched=True)
    adapter.validate_python({**settings, "num_epochs": 2}).check_ratio(prefetched=False)


def view(rewards: list[float], **extra: Any) -> BatchView:
    count = len(rewards)
    lengths = extra.pop("lengths", torch.tensor([2, 4] * (count // 2)))
    return BatchView(torch.tensor(rewards), lengths, lengths < 4, 2, **extra)


def test_a_kl_in_the_reward_is_summed_over_the_completion() -> None:
    old = torch.tensor([[-1.0, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -1.5, 9.0, 9.0], [-1.0, -1.0, -1.0, -1.0]])
    settings = RLOOSettings(group_size=2, kl_coef=0.1)
    algorithm = RLOO(settings, 4)
    assert algorithm.needs == {"old_logprobs", "ref_logprobs"}
    signal = algorithm.signal(view([1.0, 0.0], old_logprobs=old, ref_logprobs=ref))
    assert signal.advantages.tolist() == pytest.approx([0.85, -0.85])
    in_loss = RLOO(RLOOSettings(kl_coef=0.1, kl_in="loss", kl_estimator="k2"), 4)
    assert in_loss.needs == {"ref_logprobs"}


def test_the_overlong_penalty_is_part_of_the_reward() -> None:
    settings = GRPOSettings(group_size=2, overlong_margin=2, scale_rewards="none")
    signal = GRPO(settings, 4).signal(view([1.0, 1.0]))
    assert signal.advantages.tolist() == [0.5, -0.5]
    # What the rewards themselves say about the group is told as it is.
    assert signal.metrics == {"frac_reward_zero_std": 1.0}
    with pytest.raises(InputError, match=r"overlong_margin is 5, sampling\.max_tokens is 4"):
        GRPO(GRPOSettings(overlong_margin=5), 4)


def test_the_kl_weight_adapts_and_is_kept() -> None:
    settings = GRPOSettings(group_size=2, kl_coef=0.1, kl_target=0.5, kl_horizon=20)
    algorithm = GRPO(settings, 4)
    algorithm.signal(view([1.0, 0.0]))
    assert algorithm.after_batch({"kl": 5.0}) == {"kl_coef": pytest.approx(0.1 * 1.02)}
    assert algorithm.after_batch({}) == {"kl_coef": pytest.approx(0.102)}
    other = GRPO(settings, 4)
    other.load_state_dict(algorithm.state_dict())
    assert other.kl_coef == algorithm.kl_coef
    fixed = GRPO(GRPOSettings(kl_coef=0.1), 4)
    assert fixed.after_batch({"kl": 5.0}) == {} and fixed.state_dict() == {}
    with pytest.raises(ValueError, match="kl_coef"):
        fixed.load_state_dict(algorithm.state_dict())


def test_dynamic_sampling_keeps_groups_whose_rewards_differ() -> None:
    for algorithm in (GRPO(GRPOSettings(max_draws=3), 4), RLOO(RLOOSettings(max_draws=3), 4)):
        assert algorithm.max_draws == 3
        assert algorithm.keeps(torch.tensor([1.0, 0.0]))
        assert not algorithm.keeps(torch.tensor([1.0, 1.0]))
        assert not algorithm.keeps(torch.tensor([1.0, float("nan")]))


def test_reinforce_needs_something_to_compare_with() -> None:
    algorithm = Reinforce(ReinforceSettings(), 4)
    assert algorithm.signal(view([1.0, 0.0])).advantages.tolist() == [0.5, -0.5]
    lone = BatchView(torch.ones(1), torch.tensor([2]), torch.tensor([True]), 1)
    with pytest.raises(InputError, match="at least two completions per step"):
        algorithm.signal(lone)
