"""Divergence between student and teacher over the whole vocabulary, never holding [M, V] logits.

Letters: M scored tokens, C tokens per chunk, d model width, V vocabulary, tau temperature, S and T
the student's and the teacher's distribution, b the mixture weight, X = b T + (1 - b) S.

Both run through the same frozen head, so a teacher is given as hidden states [M, d]. As in
`kernels.lm_head`, the loss reaches the student through one number per token, and the forward can
compute the direction of the gradient; per logit of the student, before the division by tau:

    KL(T || S)                          S - T
    KL(S || T)                          S (log S/T - KL(S || T))
    b KL(T || X) + (1 - b) KL(S || X)   S (f - sum_v S_v f_v)  with f = (1 - b) log S/X

The last one is the generalised Jensen-Shannon divergence (Agarwal et al., 2024, arXiv 2306.13649,
eq. 1). Divided by b (1 - b), it tends to the first as b goes to 0 and to the second as b goes to 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlprompt.kernels.lm_head import CHUNK_TOKENS, Head, head_logits, row_dot

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class _Call(NamedTuple):
    """What is the same for all chunks."""

    head: Head
    divergence: Divergence
    mixture: float
    temperature: float
    wants_grad: bool


def _log_softmax_(logits: Tensor, space: Tensor) -> Tensor:
    """Turn logits [C, V] into log-probabilities in place, with [C, V] of working space."""
    logits.sub_(logits.amax(dim=1, keepdim=True))
    total = torch.exp(logits, out=space).sum(dim=1, keepdim=True)
    return logits.sub_(total.log_())


def _forward_kl(student: Tensor, teacher: Tensor, call: _Call, space: Tensor) -> Tensor:
    """See `_pieces`; leaves the gradient in `student`."""
    probs = torch.exp(teacher, out=space)
    value = row_dot(probs, teacher.sub_(student))
    if call.wants_grad:
        student.exp_().sub_(probs)
    return value


def _reverse_kl(student: Tensor, teacher: Tensor, call: _Call, space: Tensor) -> Tensor:
    """See `_pieces`; leaves the gradient in `student`."""
    probs = torch.exp(student, out=space)
    gap = torch.sub(student, teacher, out=teacher)
    value = row_dot(probs, gap)
    if call.wants_grad:
        torch.mul(probs, gap.sub_(value[:, None]), out=student)
    return value


def _jensen_shannon(student: Tensor, teacher: Tensor, call: _Call, space: Tensor) -> Tensor:
    """See `_pieces`; leaves the gradient in `student`."""
    b = call.mixture
    mixed = torch.logaddexp(teacher + math.log(b), student + math.log1p(-b), out=space)
    teacher_probs = teacher.exp()
    value = b * row_dot(teacher_probs, teacher.sub_(mixed))
    gap = torch.sub(student, mixed, out=mixed)
    probs = student.exp_()
    student_part = row_dot(probs, gap)
    if call.wants_grad:
        probs.mul_(gap.sub_(student_part[:, None])).mul_(1.0 - b)
    return value + (1.0 - b) * student_part


_RULES = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
}


def _chunk(
    student: Tensor, teacher: Tensor, call: _Call, buffers: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Divergence [C] and its direction [C, d] in the student's hidden states."""
    head, count = call.head, student.shape[0]
    logits, other, space = (buffer[:count] for buffer in buffers)
    head_logits(student, head, logits)
    head_logits(teacher, head, other)
    slope = None
    if head.softcap is not None and call.wants_grad:
        slope = 1 - (logits / head.softcap) ** 2
    if call.temperature != 1.0:
        logits.div_(call.temperature)
        other.div_(call.temperature)
    _log_softmax_(logits, space)
    _log_softmax_(other, space)
    value = _RULES[call.divergence](logits, other, call, space)
    if not call.wants_grad:
        return value, None
    if slope is not None:
        logits.mul_(slope)
    return value, head.pull_back(logits.to(head.dtype)).div_(call.temperature)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, call: _Call) -> Tensor:
        call = call._replace(wants_grad=ctx.needs_input_grad[0])
        dtype = torch.promote_types(student.dtype, torch.float32)
        shape = (3, min(CHUNK_TOKENS, student.shape[0]), call.head.vocab_size)
        buffers = torch.empty(shape, dtype=dtype, device=student.device)
        pieces = [
            _chunk(s, t, call, buffers)
            for s, t in zip(student.split(CHUNK_TOKENS), teacher.split(CHUNK_TOKENS), strict=True)
        ]
        values, directions = zip(*pieces, strict=True)
        ctx.save_for_backward(torch.cat(directions) if call.wants_grad else None)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (direction,) = ctx.saved_tensors
        return grads[0][:, None].to(direction.dtype) * direction, None, None


def head_divergence(
    student: Tensor,
    teacher: Tensor,
    head: Head,
    divergence: Divergence,
    *,
    mixture: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence per token between the next-token distributions of two hidden states.

    Args:
        student: [M, d] hidden states after the final norm, M >= 1; gets the gradient.
        teacher: [M, d] at the same tokens; gets none.
        head: the frozen head of both; its weight gets no gradient.
        divergence: the divergence: `forward_kl` is KL(teacher || student), `reverse_kl` KL(student
            || teacher), `jensen_shannon` the generalised one.
        mixture: the teacher's share of the mixture, b in (0, 1); for `jensen_shannon` only.
        temperature: the temperature, tau > 0, that both logits are divided by. The result is not
            multiplied by tau^2.

    Returns:
        [M] in nats, float32 (float64 of a float64 base). The backward is exact; calling it twice,
        or differentiating it again, is not supported.
    """
    call = _Call(head, divergence, mixture, temperature, wants_grad=False)
    out: Tensor = _HeadDivergence.apply(student, teacher.detach(), call)  # type: ignore[no-untyped-call]
    return out
