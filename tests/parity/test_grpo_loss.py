"""GRPO against TRL's own `GRPOTrainer`: advantages, loss, gradients, metrics on the same tensors.

The trainer is a bare object that runs TRL's unchanged methods `_generate_and_score_completions` and
`_compute_loss`; only what would need a model (generation, rewards, log-probabilities) is given.

Where rlprompt differs on purpose:

- equal rewards give advantages of exactly 0; TRL's float32 mean leaves rounding errors, which its
  division by `std + 1e-4` turns into advantages when rewards are large;
- `frac_reward_zero_std` is always about groups (TRL: about the batch under `scale_rewards=batch`),
  and counts a group with fewer than two scored completions, which teaches nothing either;
- `clip_ratio/*` of GSPO is a mean over the completions that count; TRL's over all of them;
- the entropy bonus has the normaliser of the loss; TRL takes the mean over tokens for every loss.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.advantages import Scale, group_advantages
from rlprompt.algorithms.base import BatchView, MicroSignal, Signal, TokenLosses
from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.policy import TokenScores
from rlprompt.rollout.collect import completion_metrics
from rlprompt.types import Completion, Group, Query
from tests.fixtures.runs import scored

trl = pytest.importorskip("trl")

EOS, PAD, MAX_TOKENS, GROUP = 1, 0, 9, 4
LENGTHS = [9, 3, 1, 7, 5, 9, 2, 4]
TERMINATED = torch.tensor([False, True, True, True, True, False, True, True])
REWARDS = [0.5, -1.0, 2.0, 0.25, 1.0, 1.0, 3.0, float("nan")]


class Accelerator:
    """One process."""

    device = torch.device("cpu")
    num_processes = 1
    process_index = 0

    def gather(self, value: Tensor) -> Tensor:
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        return value


def bare_trainer(loss_type: str, scale: str, beta: float, low: float, high: float) -> Any:
    """A `GRPOTrainer` without a model, with the attributes that its two methods read."""
    logs: dict[str, Any] = defaultdict(list)
    logs |= {"rewards": defaultdict(list), "extra": defaultdict(list)}
    trainer = object.__new__(trl.GRPOTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            delta=None,
            use_bias_correction_kl=False,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            per_device_train_batch_size=len(LENGTHS),
            report_to=[],
        ),
        state=SimpleNamespace(global_step=0),
        loss_type="grpo" if loss_type == "gspo" else loss_type,
        scale_rewards=scale,
        beta=beta,
        epsilon_low=low,
        epsilon_high=1 + high if loss_type == "cispo" else high,  # there a bound of the ratio
        num_iterations=1,
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=1,
        importance_sampling_level="sequence" if loss_type == "gspo" else "token",
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["r"],
        mask_truncated_completions=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=False,
        environment_factories=None,
        environments=None,
        tools=None,
        ref_model=object(),
        pad_to_multiple_of=None,
        eos_token_ids=[EOS],
        _tokenizer=SimpleNamespace(pad_token_id=PAD),
        processing_class=SimpleNamespace(batch_decode=lambda *a, **k: [""] * len(LENGTHS)),
        _metrics={"train": defaultdict(list)},
        _logs=logs,
        _pending_extra_logs={},
        _pending_metrics={},
    )
    return trainer


class Batch:
    """Log-probabilities of ragged completions under three policies, with noise in the padding."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(LENGTHS), MAX_TOKENS)
        self.mask = torch.arange(MAX_TOKENS)[None] < torch.tensor(LENGTHS)[:, None]
        self.logprobs = -3 * torch.rand(shape, generator=generator)
        self.old = self.logprobs + 0.4 * torch.randn(shape, generator=generator)
        self.ref = self.logprobs + 0.3 * torch.randn(shape, generator=generator)
        self.entropy = 2 * torch.rand(shape, generator=generator)

    def token_ids(self) -> list[list[int]]:
        return [
            [5] * (length - 1) + [EOS if ended else 7]
            for length, ended in zip(LENGTHS, TERMINATED.tolist(), strict=True)
        ]


def trl_inputs(trainer: Any, batch: Batch, rewards: list[float]) -> dict[str, Tensor]:
    """What TRL makes of generated completions: masks, advantages, token counts."""
    ids = batch.token_ids()
    trainer._generate = lambda prompts: (
        *([[3]] * len(ids), ids, None, [""] * len(ids)),
        *(None, {}, None, None),
    )
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards)[:, None]
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (batch.ref, None, None)
    inputs: dict[str, Tensor] = trainer._generate_and_score_completions(
        [{"prompt": "q"} for _ in ids]
    )
    return inputs


def trl_loss(
    trainer: Any, batch: Batch, old: Tensor | None, rewards: list[float]
) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient with respect to the log-probabilities."""
    inputs = trl_inputs(trainer, batch, rewards)
    if old is not None:
        inputs["old_per_token_logps"] = old
    leaf = batch.logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, batch.entropy, None)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def view(rewards: list[float]) -> BatchView:
    return BatchView(torch.tensor(rewards), torch.tensor(LENGTHS), TERMINATED, GROUP)


def our_loss(
    algorithm: GRPO, batch: Batch, old: Tensor | None, rewards: list[float]
) -> tuple[Tensor, Tensor, Signal, TokenLosses]:
    signal = algorithm.signal(view(rewards))
    weights = algorithm.token_weights(signal.counted_lengths)
    leaf = batch.logprobs.clone().requires_grad_()
    micro = MicroSignal(
        advantages=signal.advantages[:, None],
        weights=weights[:, None] * batch.mask,
        old_logprobs=old,
        ref_logprobs=batch.ref if algorithm.needs else None,
    )
    losses = algorithm.losses(
        TokenScores(leaf, batch.entropy, batch.mask, torch.empty(0, 0)), micro
    )
    total = losses.total()
    total.backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad, signal, losses


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"normalizer": "sequence", "clip_low": 0.15, "clip_high": 0.28},
    "dapo": {"normalizer": "token", "clip_low": 0.15, "clip_high": 0.28},
    "bnpo": {"normalizer": "token", "clip_low": 0.15, "clip_high": 0.28},
    "dr_grpo": {"normalizer": "constant", "clip_low": 0.15, "clip_high": 0.28},
    "gspo": {"clip_low": 0.03, "clip_high": 0.04, "ratio": "sequence_mean"},
    "cispo": {"normalizer": "token", "surrogate": "cispo", "clip_high": 0.28},
}
"""Our settings for TRL's `loss_type`; GSPO is TRL's importance sampling level "sequence"."""


KL: dict[str, dict[str, Any]] = {
    "no_kl": {"kl_coef": 0.0},
    "kl": {"kl_coef": 0.07},
    "kl_corrected": {"kl_coef": 0.07, "kl_bias_correction": True},
}
"""Ours; TRL corrects the KL unless `use_bias_correction_kl` is False."""


@pytest.mark.parametrize("mask_truncated", [False, True], ids=["all", "mask_truncated"])
@pytest.mark.parametrize("updated", [False, True], ids=["first_update", "later_update"])
@pytest.mark.parametrize("kl", KL)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_gradient_and_metrics_equal_trls(
    loss_type: str, kl: str, updated: bool, mask_truncated: bool
) -> None:
    batch, options = Batch(), LOSSES[loss_type]
    low, high = options.get("clip_low", 0.2), options["clip_high"]
    kl_coef = KL[kl]["kl_coef"]
    trainer = bare_trainer(loss_type, "group", kl_coef, low, high)
    trainer.args.use_bias_correction_kl = "kl_bias_correction" in KL[kl]
    trainer.mask_truncated_completions = mask_truncated
    old = batch.old if updated else None
    theirs, their_grad = trl_loss(trainer, batch, old, REWARDS)
    settings = GRPOSettings(
        group_size=GROUP,
        num_epochs=2,
        mask_truncated=mask_truncated,
        **KL[kl],
        **options,
    )
    ours, our_grad, signal, losses = our_loss(GRPO(settings, MAX_TOKENS), batch, old, REWARDS)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)
    assert our_grad.abs().max() > 1e-3

    counted = batch.mask & (signal.counted_lengths > 0)[:, None]
    logged = trainer._metrics["train"]
    assert losses.metrics is not None
    theirs_by_ours = {name: name for name in ["entropy", *(["kl"] if kl_coef else [])]}
    if loss_type == "cispo":
        theirs_by_ours["clip_ratio/high_mean"] = "cispo_clip_ratio"
    else:
        theirs_by_ours |= {name: name for name in losses.metrics if name.startswith("clip_ratio/")}
    for name, theirs_name in theirs_by_ours.items():
        mean = (losses.metrics[name] * counted).sum() / counted.sum()
        assert float(mean) == pytest.approx(logged[theirs_name][0], abs=1e-6), name
    # Of completions rather than tokens; TRL counts those masked out too, as not clipped.
    rows = counted.any(dim=1)
    for name, values in (losses.row_metrics or {}).items():
        total = float((values * rows).sum()) / (len(rows) if mask_truncated else rows.sum())
        assert float(total) == pytest.approx(logged[name][0], abs=1e-6), name
    if updated:
        name = "cispo_clip_ratio" if loss_type == "cispo" else "clip_ratio/region_mean"
        assert logged[name][0] > 0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards",
    [
        REWARDS,
        [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0],
        [float("nan")] * 4 + [1.0, 2.0, float("nan"), 4.0],
        [float("nan")] * 3 + [5.0, 0.1, -0.1, 0.3, 0.2],
        [float("nan")] * 8,
        [float("nan")] * 7 + [2.0],
    ],
    ids=["mixed", "flat_group", "unscored_group", "lone_score", "nothing_scored", "one_score"],
)
def test_advantages_equal_trls(scale: Scale, rewards: list[float]) -> None:
    trainer = bare_trainer("grpo", scale, 0.0, 0.2, 0.2)
    theirs = trl_inputs(trainer, Batch(), rewards)["advantages"]
    settings = GRPOSettings(group_size=GROUP, scale_rewards=scale)
    signal = GRPO(settings, MAX_TOKENS).signal(view(rewards))
    torch.testing.assert_close(signal.advantages, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_frac_reward_zero_std_equals_trls(scale: Scale) -> None:
    rewards = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    trainer = bare_trainer("grpo", scale, 0.0, 0.2, 0.2)
    trl_inputs(trainer, Batch(), rewards)
    settings = GRPOSettings(group_size=GROUP, scale_rewards=scale)
    signal = GRPO(settings, MAX_TOKENS).signal(view(rewards))
    assert trainer._metrics["train"]["frac_reward_zero_std"] == [0.5]
    assert signal.metrics["frac_reward_zero_std"] == 0.5


def test_reward_and_its_deviation_equal_trls() -> None:
    trainer = bare_trainer("grpo", "group", 0.0, 0.2, 0.2)
    trl_inputs(trainer, Batch(), REWARDS)
    groups = [
        Group(Query(()), tuple(Completion(tuple(ids), (0.0,) * len(ids), "", True) for ids in four))
        for four in zip(*[iter(Batch().token_ids())] * GROUP, strict=True)
    ]
    ours = completion_metrics(scored(groups, REWARDS))
    for name in ("reward", "reward_std"):
        assert ours[name] == pytest.approx(trainer._metrics["train"][name][0], abs=1e-6)


def test_difference_equal_large_rewards_teach_nothing_here() -> None:
    rewards = [1000.3] * GROUP + [0.1, 0.2, 0.3, 0.4]
    theirs = trl_inputs(bare_trainer("grpo", "group", 0.0, 0.2, 0.2), Batch(), rewards)
    ours = group_advantages(torch.tensor(rewards), GROUP, "group")
    assert ours[:GROUP].tolist() == [0.0] * GROUP
    torch.testing.assert_close(ours[GROUP:], theirs["advantages"][GROUP:], rtol=0, atol=1e-5)


def test_difference_entropy_bonus_follows_the_normalizer() -> None:
    batch = Batch()
    settings = GRPOSettings(group_size=GROUP, entropy_coef=0.1, normalizer="token")
    *_, losses = our_loss(GRPO(settings, MAX_TOKENS), batch, None, REWARDS)
    trainer = bare_trainer("dapo", "group", 0.0, 0.2, 0.2)
    without = trl_loss(trainer, batch, None, REWARDS)[0]
    trainer.entropy_coef, trainer._entropy_bonus_enabled = 0.1, True
    trainer.accelerator.sync_gradients = False
    bonus = trl_loss(trainer, batch, None, REWARDS)[0] - without
    assert losses.ce is not None
    torch.testing.assert_close(losses.ce.detach(), bonus, rtol=0, atol=1e-6)  # token: the same

    per_sequence = GRPO(settings.model_copy(update={"normalizer": "sequence"}), MAX_TOKENS)
    *_, losses = our_loss(per_sequence, batch, None, REWARDS)
    assert losses.ce is not None
    means = (batch.entropy * batch.mask).sum(1) / batch.mask.sum(1)
    torch.testing.assert_close(losses.ce.detach(), -0.1 * means.mean(), rtol=0, atol=1e-6)
