"""DPO and IPO against TRL's own `DPOTrainer._compute_loss`, on the same log-probabilities.

The model that TRL is given returns leaves in place of log-probabilities. TRL 1.16 has no label
smoothing for `sigmoid`; its `aot` is the smoothed loss with sorted ratios, so that one pair at a
time it is the same.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.base import BatchView, MicroSignal, TokenLosses
from rlprompt.algorithms.dpo import DPO, DPOSettings
from rlprompt.policy import TokenScores

trl = pytest.importorskip("trl")

LENGTHS = [6, 2, 1, 7, 4, 4]
"""Chosen and rejected in turn, as rlprompt has them; TRL has all chosen ones first."""
WIDTH = 7
MASK = torch.arange(WIDTH)[None] < torch.tensor(LENGTHS)[:, None]
TRL_ORDER = [0, 2, 4, 1, 3, 5]


def noise(seed: int, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(LENGTHS), WIDTH, generator=generator)


LOGPROBS = -noise(0, 1.0).abs()
REF = LOGPROBS + noise(1, 0.7)


class Accelerator:
    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    def gather_for_metrics(self, value: Tensor) -> Tensor:
        return value


def trl_loss(
    rows: list[int], loss_type: str, beta: float, smoothing: float
) -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    """TRL's loss on rows in its order, the gradient at their log-probabilities, and its metrics."""
    leaf = LOGPROBS[rows].clone().requires_grad_()
    mask = MASK[rows]

    def outputs(logprobs: Tensor) -> SimpleNamespace:
        zeros = torch.zeros_like(mask, dtype=torch.float32)
        pad = logprobs.new_zeros(len(rows), 0)
        return SimpleNamespace(
            log_probs=torch.cat([pad, logprobs * mask], dim=1),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=mask,
        )

    trainer = object.__new__(trl.DPOTrainer)
    trainer.__dict__.update(
        accelerator=Accelerator(),
        model=torch.nn.Identity(),
        ref_model=lambda **_: outputs(REF[rows]),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    # A first token that is the query's: TRL shifts the mask by one.
    query = torch.zeros(len(rows), 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([query, mask.long()], dim=1),
        "attention_mask": torch.cat([query + 1, mask.long()], dim=1),
        "completion_mask": torch.cat([query, mask.long()], dim=1),
    }
    loss = trainer._compute_loss(lambda **_: outputs(leaf), inputs, return_outputs=False)
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad, trainer._metrics["train"]


def our_loss(settings: DPOSettings, rows: slice) -> tuple[TokenLosses, Tensor]:
    algorithm = DPO(settings, max_tokens=8)
    lengths = torch.tensor(LENGTHS)[rows]
    unscored = torch.full((len(lengths),), torch.nan)
    ended = torch.ones(len(lengths), dtype=torch.bool)
    signal = algorithm.signal(BatchView(unscored, lengths, ended, 2, ref_logprobs=REF[rows]))
    weights = algorithm.token_weights(signal.counted_lengths)
    leaf = LOGPROBS[rows].clone().requires_grad_()
    mask = MASK[rows]
    micro = MicroSignal(signal.advantages[:, None], weights[:, None] * mask, None, REF[rows])
    scores = TokenScores(leaf, torch.zeros_like(leaf), mask, torch.empty(0, 0))
    losses = algorithm.losses(scores, micro)
    losses.total().backward()
    assert leaf.grad is not None
    return losses, leaf.grad


@pytest.fixture(autouse=True)
def no_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no model whose checkpointing could be switched off."""
    module = "trl.trainer.dpo_trainer.disable_gradient_checkpointing"
    monkeypatch.setattr(module, lambda *_: nullcontext())


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_gradient_and_metrics_equal_trls(loss_type: Any, beta: float) -> None:
    theirs, their_grad, logged = trl_loss(TRL_ORDER, loss_type, beta, 0.0)
    losses, our_grad = our_loss(DPOSettings(loss=loss_type, kl_coef=beta), slice(None))
    torch.testing.assert_close(losses.total().detach(), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_grad[TRL_ORDER], their_grad, rtol=0, atol=1e-6)
    assert our_grad.abs().max() > 1e-2
    assert losses.row_metrics is not None
    for name, values in losses.row_metrics.items():
        assert float(values.mean()) == pytest.approx(logged[name][0], abs=1e-5), name


@pytest.mark.parametrize("pair", [0, 1, 2])
def test_label_smoothing_equals_trls(pair: int) -> None:
    rows = [2 * pair, 2 * pair + 1]
    theirs, their_grad, _ = trl_loss(rows, "aot", 0.3, 0.1)
    settings = DPOSettings(kl_coef=0.3, label_smoothing=0.1)
    losses, our_grad = our_loss(settings, slice(rows[0], rows[1] + 1))
    torch.testing.assert_close(losses.total().detach(), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_grad, their_grad, rtol=0, atol=1e-6)
