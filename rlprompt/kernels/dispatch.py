"""Which attention runs: Triton kernels on a GPU that they are made for, matrix products elsewhere.

The choice is made once per device, dtype and heads, by comparing results, and logged. Triton is
imported only where it is asked for.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch
from torch import Tensor

from rlprompt.kernels.operands import Heads, KeyValue, Packed, Scoring, Spans
from rlprompt.kernels.self_check import Kind, attention_fault, head_fault
from rlprompt.kernels.triton.attention_rows import MAX_HEAD_DIM, AttentionRows

logger = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@lru_cache
def uses_triton(
    kind: Kind, device: torch.device, dtype: torch.dtype, heads: Heads, scoring: Scoring
) -> bool:
    """Whether attention of this kind goes through the Triton kernels.

    Both ways compute the same; written out, attention holds a score for each query and key. The
    first question compiles the kernels and holds them against attention written out.

    Args:
        kind: the kernels: of packed tokens with gradients, or of decoding.
        device: the device.
        dtype: the dtype of queries, keys and values.
        heads: the heads of the layer.
        scoring: how its scores come about.
    """
    if device.type != "cuda":
        return False
    reason = _obstacle(device, dtype, heads.dim)
    if reason is None:
        reason = attention_fault(kind, device, dtype, heads, scoring)
    if reason is None:
        logger.info("attention (%s): Triton kernels (%s, head dim %d)", kind, dtype, heads.dim)
        return True
    logger.warning("attention (%s): written out, which takes more memory, because %s", kind, reason)
    return False


def _obstacle(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'rlprompt[triton]')"
    if dtype not in _DTYPES:
        return f"the kernels do not compute in {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head dim {head_dim} is beyond {MAX_HEAD_DIM}"
    if dtype == torch.float32 and head_dim > 128:
        return f"float32 tiles of head dim {head_dim} do not fit a GPU's registers"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than Ampere"
    return None


@lru_cache
def uses_triton_head(
    device: torch.device, dtype: torch.dtype, vocab_size: int, softcap: float | None
) -> bool:
    """Whether rows of logits are scored by the Triton kernel; see `uses_triton`.

    Args:
        device: the device.
        dtype: the dtype of the logits.
        vocab_size: the logits of a row.
        softcap: the soft cap of the head; None = no cap.
    """
    if device.type != "cuda" or _obstacle(device, dtype, 0) is not None:
        return False
    reason = head_fault(device, dtype, vocab_size, softcap)
    if reason is not None:
        logger.warning("logits: scored in PyTorch, because of the Triton kernels %s", reason)
    return reason is None


def fused_head_rows(
    softcap: float | None,
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    grad: bool,
    spread: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`head_rows`; imports Triton."""
    from rlprompt.kernels.triton.head_rows import head_rows

    return head_rows(logits, targets, temperature, softcap, grad, spread)


def fused_attention(
    packed: Packed, prefix: KeyValue, rows: AttentionRows, scoring: Scoring
) -> Tensor:
    """`prefix_attention`; imports Triton."""
    from rlprompt.kernels.triton.attention import prefix_attention

    return prefix_attention(packed, prefix, rows, scoring)


def fused_decode(
    query: Tensor, own: KeyValue, prefix: KeyValue, spans: Spans, scoring: Scoring
) -> Tensor:
    """`prefix_decode`; imports Triton."""
    from rlprompt.kernels.triton.attention import prefix_decode

    return prefix_decode(query, own, prefix, spans, scoring)
