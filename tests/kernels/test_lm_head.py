"""The chunked LM head against log_softmax and autograd written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.kernels import lm_head
from rlprompt.kernels.cpu import ops
from rlprompt.kernels.lm_head import Head, head_logits, head_scores, row_dot
from rlprompt.model.files.fetch import cache_dir

WIDTH, VOCAB = 12, 37


def _head(softcap: float | None, dtype: torch.dtype = torch.float64) -> tuple[Head, Tensor]:
    weight = torch.randn(VOCAB, WIDTH, dtype=dtype)
    head = Head(
        project=lambda hidden: hidden @ weight.t(),
        pull_back=lambda grad: grad @ weight,
        dtype=dtype,
        vocab_size=VOCAB,
        softcap=softcap,
    )
    return head, weight


def _naive(
    hidden: Tensor, targets: Tensor, weight: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = hidden @ weight.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.7), (5.0, 0.7)])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_scores_and_gradient_are_those_of_log_softmax(
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    softcap: float | None,
    temperature: float,
    entropy_grad: bool,
) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_TOKENS", 4)  # token counts lie on both sides of its borders
    head, weight = _head(softcap)
    hidden = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(VOCAB, (tokens,))
    upstream = torch.randn(2, tokens, dtype=torch.float64)

    scores = head_scores(hidden, targets, head, temperature, entropy_grad)
    loss = (scores.logprobs * upstream[0]).sum()
    expected = _naive(hidden, targets, weight, temperature, softcap)
    expected_loss = (expected[0] * upstream[0]).sum()
    if entropy_grad:
        loss = loss + (scores.entropy * upstream[1]).sum()
        expected_loss = expected_loss + (expected[1] * upstream[1]).sum()

    torch.testing.assert_close(scores.logprobs, expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(scores.entropy, expected[1], rtol=0, atol=1e-12)
    assert scores.entropy.requires_grad == entropy_grad
    (grad,) = torch.autograd.grad(loss, hidden)
    (expected_grad,) = torch.autograd.grad(expected_loss, hidden)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)


def test_scores_without_a_gradient_are_the_same() -> None:
    head, _ = _head(5.0)
    hidden = torch.randn(9, WIDTH, dtype=torch.float64)
    targets = torch.randint(VOCAB, (9,))
    wanted = head_scores(hidden.clone().requires_grad_(), targets, head, 0.5)
    plain = head_scores(hidden, targets, head, 0.5)
    torch.testing.assert_close(plain.logprobs, wanted.logprobs, rtol=0, atol=0)
    torch.testing.assert_close(plain.entropy, wanted.entropy, rtol=0, atol=0)
    assert not plain.logprobs.requires_grad


def test_bf16_hidden_states_give_float32_scores_and_a_bf16_gradient() -> None:
    head, weight = _head(None, torch.bfloat16)
    hidden = torch.randn(5, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCAB, (5,))
    scores = head_scores(hidden, targets, head)
    exact = _naive(hidden.double(), targets, weight.double(), 1.0, None)[0]
    assert scores.logprobs.dtype == torch.float32
    torch.testing.assert_close(scores.logprobs.double(), exact, rtol=0, atol=0.1)
    (grad,) = torch.autograd.grad(scores.logprobs.sum(), hidden, retain_graph=True)
    (exact_grad,) = torch.autograd.grad(exact.sum(), hidden)
    assert grad.dtype == torch.bfloat16
    assert torch.cosine_similarity(grad.float().flatten(), exact_grad.float().flatten(), 0) > 0.999


def test_very_confident_logits_stay_finite() -> None:
    head, weight = _head(None, torch.float32)
    hidden = (1000 * torch.randn(4, WIDTH)).requires_grad_()
    targets = (hidden @ weight.t()).argmin(1)
    scores = head_scores(hidden, targets, head, entropy_grad=True)
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    assert torch.isfinite(scores.logprobs).all()
    assert (scores.entropy >= -1e-4).all()
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_logits_of_a_strided_slice_are_those_of_its_copy() -> None:
    head, weight = _head(None)
    wide = torch.randn(6, 2 * WIDTH, dtype=torch.float64)
    logits = head_logits(wide[:, ::2], head)
    torch.testing.assert_close(logits, wide[:, ::2] @ weight.t(), rtol=0, atol=1e-12)


def _table_head(logits: Tensor, *, cpp: bool = False) -> Head:
    """A head whose logits are given, row by row, by one-hot hidden states."""
    return Head(
        lambda hidden: hidden.to(logits.dtype) @ logits,
        lambda grad: grad @ logits.t(),
        logits.dtype,
        logits.shape[1],
        cpp=cpp,
    )


@pytest.mark.parametrize("size", [0.0, 0.5, 3.0, 8.0, 30.0])
@pytest.mark.parametrize("vocab", [2049, 49152, 151936])
def test_entropy_in_float32_is_exact_to_the_last_digits(vocab: int, size: float) -> None:
    logits = size * torch.randn(6, vocab)
    targets = torch.randint(vocab, (6,))
    wanted = logits.double().log_softmax(-1)
    entropy = -(wanted.exp() * wanted).sum(-1)
    scores = head_scores(torch.eye(6), targets, _table_head(logits))
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=2e-7, atol=2e-6)
    chosen = wanted.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(scores.logprobs.double(), chosen, rtol=2e-7, atol=2e-5)


@pytest.mark.skipif(
    not ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu")),
    reason="the CPU kernels cannot be used here",
)
@pytest.mark.parametrize("size", [0.5, 3.0, 8.0])
def test_entropy_by_the_kernel_is_as_exact(size: float) -> None:
    logits = (size * torch.randn(4, 151936)).bfloat16()
    wanted = logits.double().log_softmax(-1)
    entropy = -(wanted.exp() * wanted).sum(-1)
    head = _table_head(logits, cpp=True)
    scores = head_scores(torch.eye(4).bfloat16(), torch.zeros(4, dtype=torch.int64), head)
    torch.testing.assert_close(scores.entropy.double(), entropy, rtol=2e-7, atol=5e-6)


@pytest.mark.parametrize("columns", [1, 2048, 2049, 70001])
def test_inner_products_of_rows_are_those_of_float64(columns: int) -> None:
    left, right = torch.rand(5, columns), torch.rand(5, columns)
    wanted = (left.double() * right.double()).sum(1)
    torch.testing.assert_close(row_dot(left, right).double(), wanted, rtol=2e-7, atol=0)
    assert row_dot(left.double(), right.double()).dtype == torch.float64
