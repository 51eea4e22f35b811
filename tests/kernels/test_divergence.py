"""The chunked divergences against log_softmax and autograd written out, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.kernels import divergence
from rlprompt.kernels.divergence import Divergence, head_divergence
from rlprompt.kernels.lm_head import Head

WIDTH, VOCAB = 12, 37
KINDS: list[Divergence] = ["forward_kl", "reverse_kl", "jensen_shannon"]


def head_of(softcap: float | None, dtype: torch.dtype = torch.float64) -> tuple[Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, generator=generator).to(dtype)
    head = Head(
        project=lambda hidden: hidden @ weight.t(),
        pull_back=lambda grad: grad @ weight,
        dtype=dtype,
        vocab_size=VOCAB,
        softcap=softcap,
    )
    return head, weight


def states(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, WIDTH, dtype=torch.float64, generator=generator)


def naive(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    kind: Divergence,
    mixture: float = 0.5,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The definitions, with whole [M, V] tensors."""

    def distribution(hidden: Tensor) -> Tensor:
        logits = hidden @ weight.t()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return (logits / temperature).log_softmax(-1)

    s, t = distribution(student), distribution(teacher)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    if kind == "reverse_kl":
        return (s.exp() * (s - t)).sum(-1)
    mixed = (mixture * t.exp() + (1 - mixture) * s.exp()).log()
    left, right = (t.exp() * (t - mixed)).sum(-1), (s.exp() * (s - mixed)).sum(-1)
    return mixture * left + (1 - mixture) * right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 4, 11])
@pytest.mark.parametrize(
    ("softcap", "temperature", "mixture"), [(None, 1.0, 0.5), (None, 0.7, 0.1), (5.0, 2.0, 0.9)]
)
def test_values_and_gradient_are_those_of_autograd(
    monkeypatch: pytest.MonkeyPatch,
    kind: Divergence,
    tokens: int,
    softcap: float | None,
    temperature: float,
    mixture: float,
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_TOKENS", 4)  # token counts lie on both sides of it
    head, weight = head_of(softcap)
    student, teacher = states(tokens, 1).requires_grad_(), states(tokens, 2).requires_grad_()
    upstream = states(tokens, 3)[:, 0]
    ours = head_divergence(student, teacher, head, kind, mixture=mixture, temperature=temperature)
    theirs = naive(student, teacher.detach(), weight, kind, mixture, temperature, softcap)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    (ours * upstream).sum().backward()
    assert teacher.grad is None and student.grad is not None
    (expected,) = torch.autograd.grad((theirs * upstream).sum(), student)
    torch.testing.assert_close(student.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_have_no_distance_and_no_gradient(kind: Divergence) -> None:
    head, _ = head_of(None)
    student = states(5, 1).requires_grad_()
    ours = head_divergence(student, student.detach(), head, kind)
    ours.sum().backward()
    assert student.grad is not None
    assert ours.abs().max() < 1e-14 and student.grad.abs().max() < 1e-14


@pytest.mark.parametrize(("mixture", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_jensen_shannon_tends_to_either_kl(mixture: float, limit: Divergence) -> None:
    head, weight = head_of(None)
    student, teacher = 0.3 * states(5, 1), 0.3 * states(5, 2)
    ours = head_divergence(student, teacher, head, "jensen_shannon", mixture=mixture)
    expected = naive(student, teacher, weight, limit)
    torch.testing.assert_close(ours / (mixture * (1 - mixture)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_without_a_gradient_are_the_same(kind: Divergence) -> None:
    head, _ = head_of(5.0)
    student, teacher = states(9, 1), states(9, 2)
    wanted = head_divergence(student.clone().requires_grad_(), teacher, head, kind)
    plain = head_divergence(student, teacher, head, kind)
    assert torch.equal(plain, wanted) and not plain.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_very_confident_logits_stay_finite(kind: Divergence) -> None:
    head, _ = head_of(None, torch.float32)
    student = (1000 * states(4, 1).float()).requires_grad_()
    ours = head_divergence(student, 1000 * states(4, 2).float(), head, kind)
    ours.sum().backward()
    assert torch.isfinite(ours).all() and (ours >= -1e-4).all()
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_hidden_states_give_float32_values_and_a_bf16_gradient(kind: Divergence) -> None:
    head, weight = head_of(None, torch.bfloat16)
    student = states(5, 1).bfloat16().requires_grad_()
    teacher = states(5, 2).bfloat16()
    ours = head_divergence(student, teacher, head, kind)
    wide = student.detach().double().requires_grad_()
    exact = naive(wide, teacher.double(), weight.double(), kind)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact.detach(), rtol=0, atol=0.1)
    ours.sum().backward()
    (expected,) = torch.autograd.grad(exact.sum(), wide)
    assert student.grad is not None and student.grad.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(student.grad.double().flatten(), expected.flatten(), 0)
    assert float(cosine) > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_values_in_float32_are_exact_over_a_large_vocabulary(kind: Divergence) -> None:
    rows = 3.0 * torch.randn(8, 151936)
    head = Head(lambda hidden: hidden @ rows, lambda grad: grad @ rows.t(), rows.dtype, 151936)
    student, teacher = torch.eye(8)[:4], torch.eye(8)[4:]
    ours = head_divergence(student, teacher, head, kind)
    wide = rows.double().t()
    theirs = naive(student.double(), teacher.double(), wide, kind)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=2e-6)
