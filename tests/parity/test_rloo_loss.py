"""RLOO against TRL's own `RLOOTrainer`: advantages, loss, gradients and metrics, same tensors.

As in `test_grpo_loss`, the trainer is a bare object that runs TRL's unchanged methods. Where
rlprompt differs on purpose: equal rewards give advantages of exactly 0 (TRL's leave-one-out mean in
float32 leaves rounding errors), and a masked completion's KL stays in the baseline.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import BatchView, MicroSignal, Signal, TokenLosses
from rlprompt.algorithms.reinforce import RLOO, RLOOSettings
from rlprompt.policy import TokenScores
from tests.parity.test_grpo_loss import (
    EOS,
    GROUP,
    LENGTHS,
    MAX_TOKENS,
    PAD,
    REWARDS,
    TERMINATED,
    Accelerator,
    Batch,
)

trl = pytest.importorskip("trl")


def bare_trainer(beta: float, normalize: bool, mask_truncated: bool) -> Any:
    """An `RLOOTrainer` without a model, with the attributes that its two methods read."""
    logs: dict[str, Any] = defaultdict(list)
    logs |= {"rewards": defaultdict(list), "extra": defaultdict(list)}
    trainer = object.__new__(trl.RLOOTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(LENGTHS),
            report_to=[],
        ),
        state=SimpleNamespace(global_step=0),
        beta=beta,
        epsilon_low=0.15,
        epsilon_high=0.28,
        num_generations=GROUP,
        normalize_advantages=normalize,
        reward_clip_range=None,
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["r"],
        mask_truncated_completions=mask_truncated,
        aux_loss_enabled=False,
        use_vllm=False,
        tools=None,
        environments=None,
        ref_model="reference",
        pad_to_multiple_of=None,
        pad_token_id=PAD,
        eos_token_id=EOS,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        processing_class=SimpleNamespace(batch_decode=lambda *a, **k: [""] * len(LENGTHS)),
        _metrics={"train": defaultdict(list)},
        _logs=logs,
        _pending_extra_logs={},
        _pending_metrics={},
    )
    return trainer


def trl_loss(trainer: Any, batch: Batch, rewards: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's advantages, loss, and its gradient with respect to the log-probabilities."""
    ids = batch.token_ids()
    trainer._generate = lambda prompts: ([[3]] * len(ids), ids, [""] * len(ids))
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards)[:, None]

    def score(model: Any, *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        return (batch.ref if model == "reference" else batch.old), None, None

    trainer._get_per_token_logps_and_entropies = score
    inputs = trainer._generate_and_score_completions([{"prompt": "q"} for _ in ids])
    leaf = batch.logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, batch.entropy, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert leaf.grad is not None
    return inputs["advantages"], loss.detach(), leaf.grad


def our_loss(
    algorithm: RLOO, batch: Batch, rewards: list[float]
) -> tuple[Signal, TokenLosses, Tensor]:
    view = BatchView(
        torch.tensor(rewards),
        torch.tensor(LENGTHS),
        TERMINATED,
        GROUP,
        old_logprobs=batch.old,
        ref_logprobs=batch.ref if algorithm.needs else None,
    )
    signal = algorithm.signal(view)
    weights = algorithm.token_weights(signal.counted_lengths)
    leaf = batch.logprobs.clone().requires_grad_()
    micro = MicroSignal(
        advantages=signal.advantages[:, None],
        weights=weights[:, None] * batch.mask,
        old_logprobs=batch.old,
        ref_logprobs=batch.ref if algorithm.needs else None,
    )
    scores = TokenScores(leaf, batch.entropy, batch.mask, torch.empty(0, 0))
    losses = algorithm.losses(scores, micro)
    losses.total().backward()
    assert leaf.grad is not None
    return signal, losses, leaf.grad


@pytest.mark.parametrize(("kl_coef", "mask_truncated"), [(0.0, False), (0.0, True), (0.07, False)])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_loss_and_gradient_equal_trls(
    kl_coef: float, normalize: bool, mask_truncated: bool
) -> None:
    batch = Batch()
    # Completions of up to 9 tokens: with smaller noise some ratios stay inside the clip range.
    batch.old = batch.logprobs + 0.5 * (batch.old - batch.logprobs)
    trainer = bare_trainer(kl_coef, normalize, mask_truncated)
    advantages, theirs, their_grad = trl_loss(trainer, batch, REWARDS)
    settings = RLOOSettings(
        group_size=GROUP,
        num_epochs=2,
        clip_low=0.15,
        clip_high=0.28,
        kl_coef=kl_coef,
        normalize_advantages=normalize,
        mask_truncated=mask_truncated,
    )
    signal, losses, our_grad = our_loss(RLOO(settings, MAX_TOKENS), batch, REWARDS)
    logged = trainer._metrics["train"]
    assert losses.row_metrics is not None and losses.metrics is not None
    torch.testing.assert_close(signal.advantages, advantages, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)
    assert our_grad.abs().max() > 1e-3
    counts = signal.counted_lengths > 0
    # A masked completion adds a constant to TRL's loss: its ratio is 1 whatever the prompt does.
    constant = -(advantages * ~counts).sum() / len(LENGTHS)
    torch.testing.assert_close(losses.total().detach() + constant, theirs, rtol=0, atol=1e-6)
    for name, values in losses.row_metrics.items():
        total = float((values * counts).sum()) / len(LENGTHS)
        assert total == pytest.approx(logged[name][0], abs=1e-6), name
    assert logged["clip_ratio/region_mean"][0] > 0


def test_difference_the_kl_of_a_masked_completion_stays_in_the_baseline() -> None:
    """TRL masks it too, so that its siblings are compared with a reward that has no KL in it."""
    batch = Batch()
    theirs = trl_loss(bare_trainer(0.07, False, True), batch, REWARDS)[0]
    settings = RLOOSettings(group_size=GROUP, kl_coef=0.07, mask_truncated=True)
    ours = our_loss(RLOO(settings, MAX_TOKENS), batch, REWARDS)[0].advantages
    everything = trl_loss(bare_trainer(0.07, False, False), batch, REWARDS)[0]
    torch.testing.assert_close(ours, everything, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.parametrize(
    "rewards",
    [
        REWARDS,
        [math.nan] * 4 + [1.0, 2.0, math.nan, 4.0],
        [math.nan] * 3 + [5.0, 0.1, -0.1, 0.3, 0.2],
        [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
    ],
    ids=["mixed", "unscored_group", "lone_score", "flat_group"],
)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_advantages_equal_trls(rewards: list[float], normalize: bool) -> None:
    theirs = trl_loss(bare_trainer(0.0, normalize, False), Batch(), rewards)[0]
    settings = RLOOSettings(group_size=GROUP, normalize_advantages=normalize)
    signal, _, _ = our_loss(RLOO(settings, MAX_TOKENS), Batch(), rewards)
    torch.testing.assert_close(signal.advantages, theirs, rtol=0, atol=1e-5)
