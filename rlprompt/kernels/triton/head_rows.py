"""Scores of rows of logits, and their gradients, in two passes over each row: the head on a GPU.

The two matrix products of the LM head are cuBLAS's (or hipBLAS's); what lies between them, written
out in PyTorch, is ten passes over [C, V] in float32. This kernel reads a row twice and writes the
gradient in place of the logits, in their dtype, as Liger-Kernel (arXiv 2410.10989) does for its
cross entropy; the entropy and its gradient come with it.

Letters: C tokens of a chunk, V vocabulary, BV logits per step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlprompt.kernels.triton.attention_tiles import interpreting

BLOCK, WARPS = 4096, 8
"""Logits per step, 16 for each thread."""
INTERPRETER_BLOCK = 16


@triton.jit
def load_logits(
    LOGITS, v, there, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Capped and scaled logits, -inf where there are none, and d capped / d raw."""
    raw = tl.load(LOGITS + v, mask=there, other=0.0).to(ACC)
    slope = tl.full([1], 1.0, dtype=ACC)
    if SOFTCAP > 0.0:
        unit = 1.0 - 2.0 / (1.0 + tl.exp(raw * (2.0 / SOFTCAP)))  # tanh
        slope = 1.0 - unit * unit
        raw = unit * SOFTCAP
    return tl.where(there, raw * SCALE, float("-inf")), slope


@triton.jit
def head_rows_kernel(
    LOGITS, TARGETS, LOGPROBS, ENTROPIES, SPREAD,
    row_stride, spread_stride,
    V: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GRAD: tl.constexpr,
    SPREADS: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row: see `head_rows`. The sums are those of an online softmax."""
    row = tl.cast(tl.program_id(0), tl.int64)
    LOGITS += row * row_stride
    SPREAD += row * spread_stride
    target = tl.load(TARGETS + row)
    chosen, _ = load_logits(LOGITS, target + tl.arange(0, 1), tl.arange(0, 1) == 0,
                            SCALE, SOFTCAP, ACC)  # fmt: skip
    place = tl.arange(0, BV)
    top = tl.max(chosen, 0)
    total = top * 0.0  # sum of exp(l - top), and of exp(l - top) (l - top)
    weighted = top * 0.0
    for v0 in range(0, V, BV):
        logits, _ = load_logits(LOGITS, v0 + place, v0 + place < V, SCALE, SOFTCAP, ACC)
        new_top = tl.maximum(top, tl.max(logits, 0))
        decay = tl.exp(top - new_top)
        weighted = (weighted + total * (top - new_top)) * decay
        total = total * decay
        weights = tl.exp(logits - new_top)
        total += tl.sum(weights, 0)
        weighted += tl.sum(tl.where(v0 + place < V, weights * (logits - new_top), 0.0), 0)
        top = new_top
    log_total = tl.log(total)
    entropy = log_total - weighted / total
    tl.store(LOGPROBS + row, tl.sum(chosen, 0) - top - log_total)
    tl.store(ENTROPIES + row, entropy)
    if GRAD:
        for v0 in range(0, V, BV):
            v = v0 + place
            logits, slope = load_logits(LOGITS, v, v < V, SCALE, SOFTCAP, ACC)
            surprise = logits - top - log_total  # log p
            probs = tl.exp(surprise)
            pull = tl.where(v == target, 1.0 - probs, -probs) * slope
            if SPREADS:
                spread = tl.where(v < V, -probs * (surprise + entropy), 0.0) * slope
                tl.store(SPREAD + v, spread.to(SPREAD.dtype.element_ty), mask=v < V)
            tl.store(LOGITS + v, pull.to(LOGITS.dtype.element_ty), mask=v < V)


def head_rows(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    grad: bool,
    spread: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of rows of logits, and their gradients.

    Args:
        logits: [C, V], rows contiguous. Where `grad`, they become the gradient of each target's
            log-probability in capped-and-divided logits, times d capped / d raw; what is left to
            multiply by is 1 / temperature.
        targets: int64 [C].
        temperature: the temperature that logits are divided by, after the cap.
        softcap: the soft cap, by which logits first become softcap * tanh(logits / softcap).
        grad: whether gradients are wanted.
        spread: [C, V] that gets the gradient of the entropy likewise; None = not wanted.

    Returns:
        Both [C], float32 (float64 of float64 logits).
    """
    rows, vocab = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs, entropies = logits.new_empty(2, rows, dtype=dtype).unbind()
    other = logits if spread is None else spread
    with torch.cuda.device_of(logits):
        head_rows_kernel[(rows,)](
            logits, targets, logprobs, entropies, other, logits.stride(0), other.stride(0),
            V=vocab, SCALE=1.0 / temperature, SOFTCAP=softcap or 0.0,
            GRAD=grad, SPREADS=grad and spread is not None,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            BV=INTERPRETER_BLOCK if interpreting() else BLOCK, num_warps=WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    return logprobs, entropies
