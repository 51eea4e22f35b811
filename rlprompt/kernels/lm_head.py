"""Log-probability and entropy of chosen tokens without ever holding [M, V] logits.

Letters: M scored tokens, C tokens per chunk, d model width, V vocabulary.

The loss reaches the head through one number per token, so the gradient of the hidden state is that
number times a vector that the forward can already compute:

    d log p(y) / dh = (W[y] - sum_v p_v W_v) / tau
    d H / dh        = -(sum_v p_v (log p_v + H) W_v) / tau

Each chunk therefore costs two matrix products in all (logits, and p @ W); nothing is recomputed in
the backward, and no [C, V] tensor outlives its chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlprompt.kernels.cpu.ops import head_scores as cpp_scores
from rlprompt.kernels.dispatch import fused_head_rows, uses_triton_head

CHUNK_TOKENS = 128
"""C: two float32 buffers of 128 x 49152 are 50 MB."""
FUSED_CHUNK_TOKENS = 1024
"""C on a GPU, where a chunk is one buffer in the head's dtype: 300 MB for a vocabulary of 150k."""


_DOT_COLUMNS = 2048
"""Columns of a block of `row_dot`: the products of a chunk's rows are 1 MB."""


class HeadOutput(NamedTuple):
    """Per-token results of the LM head."""

    logprobs: Tensor
    """[M] natural-log probability of the target token, float32 (float64 of a float64 base)."""
    entropy: Tensor
    """[M] entropy of the next-token distribution in nats, float32 or float64 alike."""


class Head(NamedTuple):
    """A frozen LM head: a linear map without bias, in both directions."""

    project: Callable[[Tensor], Tensor]
    """[M, d] hidden states -> [M, V] logits."""
    pull_back: Callable[[Tensor], Tensor]
    """[M, V] gradients of the logits -> [M, d] gradients of the hidden states."""
    dtype: torch.dtype
    """What both compute in."""
    vocab_size: int
    """V."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) when given (Gemma 2)."""
    cpp: bool = False
    """Whether the C++ kernels score rows of logits; without a soft cap only."""


def head_logits(hidden: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """Next-token logits [M, V] of hidden states [M, d], in float32 or the base's float64.

    Hidden states that are a strided slice make the matrix product copy the weights (1.4 s instead
    of 0.1 s on SmolLM2), so they are made contiguous first.

    Args:
        hidden: [M, d].
        head: the frozen head.
        out: [M, V] to write to; None allocates.
    """
    logits = head.project(hidden.contiguous())
    if out is None:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    else:
        logits = out.copy_(logits)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def row_dot(left: Tensor, right: Tensor) -> Tensor:
    """Inner products [C] of the rows of two [C, V], without a third of that size.

    On a CPU, `torch.bmm` adds up a row number by number: in float32 an entropy over 150k tokens was
    1e-3 nats off. Sums over blocks of columns are exact to the last digits.
    """
    if left.device.type != "cpu":
        return torch.bmm(left[:, None], right[:, :, None]).view(-1)
    total = left.new_zeros(left.shape[0], dtype=torch.float64)
    for a, b in zip(left.split(_DOT_COLUMNS, dim=1), right.split(_DOT_COLUMNS, dim=1), strict=True):
        total += (a * b).sum(dim=1)
    return total.to(left.dtype)


class _Workspace:
    """Two [C, V] buffers that all chunks share.

    Fresh memory of this size is mapped page by page at its first use, which costs more than the
    arithmetic: reusing it makes the head a third faster on a CPU.
    """

    def __init__(self, rows: int, vocab: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self._buffers = torch.empty(2, rows, vocab, dtype=dtype, device=like.device)

    def take(self, rows: int) -> Tensor:
        """Both buffers, [2, rows, V], holding anything."""
        return self._buffers[:, :rows]


class _Call(NamedTuple):
    """What is the same for all chunks."""

    head: Head
    temperature: float
    wants_logprob_grad: bool
    wants_entropy_grad: bool


class _Scored(NamedTuple):
    """A chunk's results, and the two directions [C, d] of the module docstring where wanted."""

    logprobs: Tensor
    entropy: Tensor
    logprob_direction: Tensor | None
    entropy_direction: Tensor | None


def _chunk(hidden: Tensor, targets: Tensor, call: _Call, buffers: Tensor) -> _Scored:
    """Score a chunk in PyTorch, with [2, C, V] of working space."""
    head, wants_grad = call.head, call.wants_logprob_grad
    logits = head_logits(hidden, head, buffers[0])
    slope = 1 - (logits / head.softcap) ** 2 if head.softcap is not None and wants_grad else None
    if call.temperature != 1.0:
        logits.div_(call.temperature)
    top = logits.amax(dim=1, keepdim=True)
    target = logits.gather(1, targets[:, None]).squeeze(1)
    logits.sub_(top)
    weights = torch.exp(logits, out=buffers[1])  # [C, V], unnormalised
    total = weights.sum(dim=1, keepdim=True)
    # H = log Z - sum_v p_v l_v with logits relative to their maximum
    mean_logit = row_dot(weights, logits)[:, None] / total
    log_total = total.log()
    logprobs = target - (top + log_total).squeeze(1)
    entropy = (log_total - mean_logit).squeeze(1)
    logprob_direction = entropy_direction = None
    if wants_grad:
        probs = weights.div_(total)
        if call.wants_entropy_grad:
            surprise = logits.sub_(log_total).add_(entropy[:, None]).mul_(probs)
            entropy_direction = _through(surprise, head, slope).div_(-call.temperature)
        place = targets[:, None]
        pull = probs.neg_().scatter_add_(1, place, torch.ones_like(place, dtype=probs.dtype))
        logprob_direction = _through(pull, head, slope).div_(call.temperature)
    return _Scored(logprobs, entropy, logprob_direction, entropy_direction)


def _through(grad_logits: Tensor, head: Head, slope: Tensor | None) -> Tensor:
    if slope is not None:
        grad_logits = grad_logits * slope
    return head.pull_back(grad_logits.to(head.dtype))


RowScores = Callable[[Tensor, Tensor, float, bool, Tensor | None], tuple[Tensor, Tensor]]
"""A kernel that scores rows of logits in place; see `kernels.cpu.ops.head_scores`."""


def _kernel_chunk(hidden: Tensor, targets: Tensor, call: _Call, scores: RowScores) -> _Scored:
    """What `_chunk` gives; the logits stay in the head's dtype and become their gradient."""
    head, tau, grad = call.head, call.temperature, call.wants_logprob_grad
    logits = head.project(hidden.contiguous())
    spread = torch.empty_like(logits) if grad and call.wants_entropy_grad else None
    logprobs, entropy = scores(logits, targets, tau, grad, spread)
    pull = head.pull_back(logits).div_(tau) if grad else None
    spread_pull = None if spread is None else head.pull_back(spread).div_(tau)
    return _Scored(logprobs, entropy, pull, spread_pull)


def _row_kernel(head: Head, device: torch.device) -> RowScores | None:
    """The kernel of this device, or None: then the rows are scored in PyTorch."""
    if head.cpp:
        return cpp_scores
    if uses_triton_head(device, head.dtype, head.vocab_size, head.softcap):
        return partial(fused_head_rows, head.softcap)
    return None


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        temperature: float,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = ctx.needs_input_grad[0]
        call = _Call(head, temperature, wants_grad, wants_grad and entropy_grad)
        scores = _row_kernel(head, hidden.device)
        tokens = CHUNK_TOKENS if hidden.device.type == "cpu" else FUSED_CHUNK_TOKENS
        chunks = zip(hidden.split(tokens), targets.split(tokens), strict=True)
        if scores is not None:
            pieces = [_kernel_chunk(h, t, call, scores) for h, t in chunks]
        else:
            space = _Workspace(min(tokens, hidden.shape[0]), head.vocab_size, hidden)
            pieces = [_chunk(h, t, call, space.take(h.shape[0])) for h, t in chunks]
        logprobs, entropy, pull, spread = zip(*pieces, strict=True)
        ctx.save_for_backward(
            torch.cat(pull) if call.wants_logprob_grad else None,
            torch.cat(spread) if call.wants_entropy_grad else None,
        )
        entropies = torch.cat(entropy)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropies)
        return torch.cat(logprobs), entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        pull, spread = ctx.saved_tensors
        out = grads[0][:, None].to(pull.dtype) * pull
        if spread is not None:
            out = out + grads[1][:, None].to(spread.dtype) * spread
        return out, None, None, None, None


def head_scores(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    temperature: float = 1.0,
    entropy_grad: bool = False,
) -> HeadOutput:
    """Log-probability and entropy of each target under softmax(logits / temperature).

    Args:
        hidden: [M, d] hidden states after the final norm, M >= 1.
        targets: int64 [M].
        head: the frozen head; its weight gets no gradient.
        temperature: the sampling temperature, tau > 0; logits are divided by it, so that these are
            the log-probabilities of the distribution that was sampled from.
        entropy_grad: whether the entropy is part of the loss; without it the entropy is a metric
            only and costs no matrix product.

    Returns:
        `HeadOutput`. The backward is exact for one upstream number per token; calling it
        twice, or differentiating it again, is not supported.
    """
    arguments = (hidden, targets, head, temperature, entropy_grad)
    logprobs, entropy = _HeadScores.apply(*arguments)  # type: ignore[no-untyped-call]
    return HeadOutput(logprobs, entropy)
