"""GRPO's signal and losses against those of TRL, on the same rewards and log-probabilities.

TRL's own methods run on a trainer that was never constructed: it holds only the attributes that
`_compute_loss` and `_generate_and_score_completions` read, and the model's forward is replaced by
given tensors. What TRL computes from them is untouched.
"""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import MicroSignal
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.algorithms.losses import clipped_surrogate, kl_k3
from rlprompt.policy import TokenScores

grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer")

B, T, MAX_TOKENS = 8, 11, 16
NORMALIZERS = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo"}


def bare_trainer(**attributes: Any) -> Any:
    """A GRPOTrainer without model, data or configuration, in training mode on one process."""
    trainer = object.__new__(grpo_trainer.GRPOTrainer)
    trainer.__dict__.update(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            sync_gradients=True,
            gather=lambda value: value,
            reduce=lambda value, reduction: value,
        ),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        beta=0.0,
        use_vllm=False,
        _metrics={"train": defaultdict(list)},
    )
    trainer.__dict__.update(attributes)
    return trainer


def trl_loss(
    settings: GRPOSettings,
    scores: TokenScores,
    old: Tensor | None,
    ref: Tensor | None,
    advantages: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss of one batch, and its metrics. Shapes: [B, T] but for advantages, [B]."""
    trainer = bare_trainer(
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        beta=settings.kl_coef,
        epsilon_low=settings.clip_low,
        epsilon_high=settings.clip_high,
        loss_type=NORMALIZERS[settings.normalizer],
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        entropy_coef=settings.entropy_coef,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=settings.entropy_coef != 0.0,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        _get_per_token_logps_and_entropies=lambda *_, **__: (scores.logprobs, scores.entropy, None),
    )
    inputs = {
        "prompt_ids": torch.ones(B, 3, dtype=torch.long),
        "prompt_mask": torch.ones(B, 3, dtype=torch.long),
        "completion_ids": torch.ones(B, T, dtype=torch.long),
        "completion_mask": scores.mask.long(),
        "advantages": advantages,
        "num_items_in_batch": scores.mask.sum(),
    }
    inputs |= {} if old is None else {"old_per_token_logps": old}
    inputs |= {} if ref is None else {"ref_per_token_logps": ref}
    loss = trainer._compute_loss(trainer.model, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_advantages(rewards: Tensor, group_size: int, scale: str) -> tuple[Tensor, float]:
    """TRL's advantages [B] of given rewards [B], and its `frac_reward_zero_std`."""
    count = len(rewards)
    completion_ids = [[5, 6]] * count
    trainer = bare_trainer(
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        environment_factories=None,
        environments=None,
        tools=[],
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        num_iterations=1,
        num_generations=group_size,
        scale_rewards=scale,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        _logs=defaultdict(deque, rewards=defaultdict(deque), extra=defaultdict(deque)),
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: (
            [[1]] * count,
            completion_ids,
            None,
            [""] * count,
            None,
            {},
            None,
            [],
        ),
        _calculate_rewards=lambda *_: rewards[:, None],
    )
    output = trainer._generate_and_score_completions([{"prompt": "q"}] * count)
    return output["advantages"], trainer._metrics["train"]["frac_reward_zero_std"][-1]


def given_scores() -> TokenScores:
    """Log-probabilities with gradient and entropies of completions of different lengths."""
    lengths = torch.tensor([11, 1, 5, 8, 2, 11, 3, 7])
    leaf = (-3 * torch.rand(B, T)).requires_grad_()
    return TokenScores(leaf, torch.rand(B, T), torch.arange(T) < lengths[:, None])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(("kl_coef", "off_policy"), [(0.0, False), (0.0, True), (0.3, True)])
def test_loss_and_gradient_equal_those_of_trl(
    normalizer: Any, kl_coef: float, off_policy: bool
) -> None:
    settings = GRPOSettings(
        group_size=4, normalizer=normalizer, kl_coef=kl_coef, clip_low=0.1, clip_high=0.3
    )
    scores = given_scores()
    leaf, mask = scores.logprobs, scores.mask
    old = (leaf + 0.4 * torch.randn(B, T)).detach() if off_policy else None
    ref = (leaf + torch.randn(B, T)).detach() if kl_coef else None
    algorithm = GRPO(settings, max_tokens=MAX_TOKENS)
    signal = algorithm.signal(torch.randn(B), mask.sum(1), torch.ones(B, dtype=torch.bool))

    theirs, _ = trl_loss(settings, scores, old, ref, signal.advantages)
    (their_grad,) = torch.autograd.grad(theirs, leaf)
    micro = MicroSignal(signal.advantages[:, None], signal.weights[:, None] * mask, old, ref)
    ours = algorithm.losses(scores, micro).total()
    (our_grad,) = torch.autograd.grad(ours, leaf)

    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_grad, their_grad)
    assert our_grad.abs().sum() > 0


def test_clip_and_kl_metrics_are_token_means_of_our_per_token_values() -> None:
    settings = GRPOSettings(group_size=4, kl_coef=0.3, clip_low=0.1, clip_high=0.3)
    scores = given_scores()
    leaf, advantages = scores.logprobs, torch.randn(B)
    old = (leaf + 0.4 * torch.randn(B, T)).detach()
    ref = (leaf + torch.randn(B, T)).detach()

    _, theirs = trl_loss(settings, scores, old, ref, advantages)
    clipped = clipped_surrogate(leaf, old, advantages[:, None], 0.1, 0.3)
    ours = {
        "clip_ratio/low_mean": clipped.clipped_low,
        "clip_ratio/high_mean": clipped.clipped_high,
        "clip_ratio/region_mean": clipped.clipped_low | clipped.clipped_high,
        "kl": kl_k3(leaf, ref),
        "entropy": scores.entropy,
    }
    for name, values in ours.items():
        token_mean = values[scores.mask].float().mean().item()
        assert token_mean == pytest.approx(theirs[name], abs=1e-6), name
        assert token_mean > 0, name


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_those_of_trl(scale: Any) -> None:
    rewards = torch.randn(16)
    rewards[4:8] = 1.5
    rewards[9] = torch.nan
    settings = GRPOSettings(group_size=4, scale_rewards=scale)
    ours = GRPO(settings, MAX_TOKENS).signal(
        rewards, torch.full((16,), 2), torch.ones(16, dtype=torch.bool)
    )
    theirs, their_share = trl_advantages(rewards, 4, scale)

    torch.testing.assert_close(ours.advantages, theirs)
    assert ours.advantages[9] == 0
    if scale != "batch":  # TRL then asks whether the batch's deviation is zero
        assert ours.metrics["frac_reward_zero_std"] == their_share == 0.25
