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
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Default C: 256 x 49152 fp32 logits are 50 MB."""


class HeadOutput(NamedTuple):
    """Per-token results of the LM head."""

    logprobs: Tensor
    """[M] natural-log probability of the target token, float32."""
    entropy: Tensor
    """[M] entropy of the next-token distribution in nats, float32."""


class Head(NamedTuple):
    """A frozen LM head: a linear map without bias, in both directions."""

    project: Callable[[Tensor], Tensor]
    """[M, d] hidden states -> [M, V] logits."""
    pull_back: Callable[[Tensor], Tensor]
    """[M, V] gradients of the logits -> [M, d] gradients of the hidden states."""
    dtype: torch.dtype
    """What both compute in."""
    softcap: float | None = None
    """Logits become softcap * tanh(logits / softcap) when given (Gemma 2)."""


def head_logits(hidden: Tensor, head: Head) -> Tensor:
    """Next-token logits, float32 [M, V] of contiguous hidden states [M, d].

    Hidden states that are a strided slice make the matrix product copy the weights (1.4 s instead of
    0.1 s on SmolLM2), so they are made contiguous first.
    """
    logits = head.project(hidden.contiguous()).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def _chunk(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-probs [C], entropy [C], and the two directions [C, d] of the module docstring."""
    logits = head_logits(hidden, head)
    slope = 1 - (logits / head.softcap) ** 2 if head.softcap is not None and any(wanted) else None
    logits = logits.div_(temperature)
    target = logits.gather(1, targets[:, None]).squeeze(1)
    top = logits.max(dim=1, keepdim=True).values
    weights = logits.sub_(top).exp()  # [C, V], unnormalised
    total = weights.sum(dim=1, keepdim=True)
    # H = log Z - sum_v p_v l_v with logits relative to their maximum
    mean_logit = torch.linalg.vecdot(weights, logits).unsqueeze(1) / total
    log_total = total.log()
    logprobs = target - (top + log_total).squeeze(1)
    entropy = (log_total - mean_logit).squeeze(1)
    if not any(wanted):
        return logprobs, entropy, None, None
    probs = weights.div_(total)
    entropy_direction = None
    if wanted[1]:
        surprise = logits - log_total + entropy[:, None]
        entropy_direction = -_through(probs * surprise, head, slope) / temperature
    logprob_direction = None
    if wanted[0]:
        place = targets[:, None]
        pull = probs.neg_().scatter_add_(1, place, torch.ones_like(place, dtype=probs.dtype))
        logprob_direction = _through(pull, head, slope) / temperature
    return logprobs, entropy, logprob_direction, entropy_direction


def _through(grad_logits: Tensor, head: Head, slope: Tensor | None) -> Tensor:
    if slope is not None:
        grad_logits = grad_logits * slope
    return head.pull_back(grad_logits.to(head.dtype))


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, head: Head, temperature: float, entropy_grad: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[0] and entropy_grad)
        pieces = [
            _chunk(h, t, head, temperature, wanted)
            for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        logprobs, entropy, pull, spread = zip(*pieces, strict=True)
        ctx.save_for_backward(
            torch.cat(pull) if wanted[0] else None,  # type: ignore[arg-type]
            torch.cat(spread) if wanted[1] else None,  # type: ignore[arg-type]
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
        temperature: sampling temperature tau > 0; logits are divided by it, so that these are the
            log-probabilities of the distribution that was sampled from.
        entropy_grad: whether the entropy is part of the loss; without it the entropy is a metric
            only and costs no matrix product.

    Returns:
        `HeadOutput` in float32. The backward is exact for one upstream number per token; calling it
        twice, or differentiating it again, is not supported.
    """
    logprobs, entropy = _HeadScores.apply(hidden, targets, head, temperature, entropy_grad)
    return HeadOutput(logprobs, entropy)
