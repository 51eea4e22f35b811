"""The C++ kernels as functions with gradients, and whether they are used here.

Letters: N packed tokens, B rows, H heads, H_kv key/value heads, D head dim, d model width,
I width of the gated activation, P prefix tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.errors import InputError
from rlprompt.kernels.cpu import build
from rlprompt.kernels.cpu.cache_layout import LANES
from rlprompt.kernels.operands import KeyValue, Packed
from rlprompt.kernels.reference import masked_attention

logger = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]
_MOST_DIMS = 512


def serves_dim(dim: int) -> bool:
    """Whether the attention kernels take heads of this size."""
    return dim % LANES == 0 and dim <= _MOST_DIMS


def status(folder: Path) -> tuple[bool, str]:
    """Whether the kernels can be used here, or why not; builds them if need be."""
    return _loaded(folder)


def outlook(folder: Path) -> str:
    """What a run would say of the kernels here, in a few words, without building them."""
    try:
        built = build.is_built(folder)
    except build.BuildError as error:
        return f"not used: {error}"
    if not built:
        return "built at the first run in bfloat16"
    usable, why = status(folder)
    return "used" if usable else f"not used: {why}"


@cache
def _loaded(folder: Path) -> tuple[bool, str]:
    try:
        build.load(folder)
        _check()
    except build.BuildError as error:
        return False, str(error)
    except (RuntimeError, AssertionError) as error:
        return (
            False,
            f"they fail their check ({(str(error).splitlines() or [type(error).__name__])[0]})",
        )
    return True, ""


def choose(choice: Choice, folder: Path, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model of this dtype and device runs with the kernels; says so in the log.

    Args:
        choice: `model.cpu_kernels` of a recipe.
        folder: the folder where built kernels are kept.
        dtype: the dtype of the model.
        device: the device of the model.

    Raises:
        InputError: they are asked for and cannot be used.
    """
    if choice == "off":
        return False
    if device.type != "cpu" or dtype != torch.bfloat16:
        precision = str(dtype).removeprefix("torch.")
        usable = False
        why = f"they serve bfloat16 on a CPU, and this base is {precision} on {device.type}"
    else:
        usable, why = status(folder)
    if not usable and choice == "on":
        raise InputError(
            f"model.cpu_kernels is on, but the C++ kernels cannot be used: {why}; mend that, or "
            "set it to auto"
        )
    logger.info("C++ kernels: %s", "used" if usable else f"not used, {why}")
    return usable


def _ops() -> Any:
    return torch.ops.rlprompt_cpu


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        out: Tensor = _ops().rms_norm(x, weight, eps)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        return _ops().rms_norm_backward(grad, x, weight, ctx.eps, None), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, weight * x / rms(x), over the last dimension; the gradient reaches x only."""
    x = x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    plain: Tensor = _ops().rms_norm(x, weight, eps)
    return plain


class _BranchNorm(torch.autograd.Function):
    """One backward adds up what reaches the sum through the norm and beside it."""

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, update: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total, normed = _branched(residual, update, weight, eps)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.adds = update is not None
        return total, normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        total, weight = ctx.saved_tensors
        beside, through = (grad.contiguous() for grad in grads)
        out: Tensor = _ops().rms_norm_backward(through, total, weight, ctx.eps, beside)
        return out, out if ctx.adds else None, None, None


def _branched(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if update is None:
        return residual, _ops().rms_norm(residual, weight, eps)
    total, normed = _ops().add_rms_norm(residual, update, weight, eps)
    return total, normed


def branch_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The residual stream after an update, and its RMS norm, for the branch that comes next.

    Args:
        residual: [..., d].
        update: what a branch adds to it, [..., d]; None = nothing.
        weight: the weight of the norm, [d]; it gets no gradient.
        eps: the epsilon of the norm.

    Returns:
        The sum and its norm, [..., d] each.
    """
    residual = residual.contiguous()
    update = update if update is None else update.contiguous()
    if torch.is_grad_enabled() and (
        residual.requires_grad or (update is not None and update.requires_grad)
    ):
        out: tuple[Tensor, Tensor] = _BranchNorm.apply(residual, update, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return _branched(residual, update, weight, eps)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.shape = qkv.shape
        return _turned(qkv, cos, sin, kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        dense = [g if g.stride(-1) == 1 else g.contiguous() for g in grads]
        return _ops().rotary_backward(*dense, cos, sin).view(ctx.shape), None, None, None


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    dim = cos.shape[-1]
    split = qkv.view(qkv.shape[-2], -1, dim)
    heads = split.shape[1] - 2 * kv_heads
    _ops().rotary_(split, cos, sin, heads + kv_heads)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Turn queries and keys by their positions (Su et al., 2021), in place.

    Args:
        qkv: the common projection, [N, (H + 2 H_kv) D] with or without a batch of one, dense. It
            is overwritten, so nothing else may need its values.
        cos: [N, D], of the tensor's type.
        sin: [N, D].
        kv_heads: the number of key/value heads, H_kv.

    Returns:
        q [N, H, D], k and v [N, H_kv, D]: views of one block.
    """
    if torch.is_grad_enabled() and qkv.requires_grad:
        out: tuple[Tensor, Tensor, Tensor] = _Rotary.apply(qkv, cos, sin, kv_heads)  # type: ignore[no-untyped-call]
        return out
    return _turned(qkv, cos, sin, kv_heads)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = _ops().silu_mul(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        out: Tensor = _ops().silu_mul_backward(grads[0].contiguous(), x)
        return out


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) * up of x = [gate | up], dense [..., 2 I] -> [..., I]."""
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _SiluMul.apply(x)  # type: ignore[no-untyped-call]
        return out.view(shape)
    plain: Tensor = _ops().silu_mul(x)
    return plain.view(shape)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, spans, scaling = inputs
        prefixes = [p.to(tensors[0].dtype).contiguous() for p in tensors[3:]]
        ctx.save_for_backward(*tensors[:3], *prefixes, spans)
        ctx.scaling = scaling
        ctx.prefix_dtype = tensors[3].dtype
        out: Tensor = _ops().tree_attention(*tensors[:3], *prefixes, spans, scaling)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0] if grads[0].stride(-1) == 1 else grads[0].contiguous()
        out = _ops().tree_attention_backward(grad, *ctx.saved_tensors, ctx.scaling)
        dq, dk, dv, d_prefix_keys, d_prefix_values = out
        wide = ctx.prefix_dtype
        return dq, dk, dv, d_prefix_keys.to(wide), d_prefix_values.to(wide), None, None


def tree_attention(packed: Packed, prefix: KeyValue, spans: Tensor, scaling: float) -> Tensor:
    """Attention of packed tokens over [prefix | their query | their own causal keys].

    Args:
        packed: queries, keys and values, bfloat16, dense in D; D a multiple of `LANES`.
        prefix: keys and values [H_kv, P, D] of any float type; their gradient is summed in float32.
        spans: int64 [R, 4], for each query and each completion its first packed token, its number
            of tokens, and the same two of the query that a completion follows (0, 0 for a query).
            Completions of one group stand behind each other.
        scaling: factor on the scores.

    Returns:
        [N, H, D].
    """
    out: Tensor = _TreeAttention.apply(*packed, *prefix, spans, scaling)  # type: ignore[no-untyped-call]
    return out


def decode_attention(
    new: Packed,
    cache: Tensor,
    layer: int,
    table: Tensor,
    shared: int,
    column: int,
    scaling: float,
) -> Tensor:
    """Write one column of a layer's cache and attend to what each row sees of it.

    Args:
        new: queries, keys and values of one new token per row, N = B.
        cache: [2 L, at least B, H_kv, S, D], dense, keys of all layers first; this layer's stand
            in the kernel's order (`rlprompt.kernels.cpu.cache_layout`).
        layer: the number of the layer.
        table: int64 [2, B or more], dense: of each row, how much shorter its query is than the
            longest one, and the row whose shared columns are read in place of its own, which are
            equal.
        shared: columns of prefix and query in a row with the longest query.
        column: the one to write, of such a row.
        scaling: factor on the scores.

    Returns:
        [B, H, D].
    """
    out: Tensor = _ops().decode_attention(*new, cache, layer, table, [shared, column], scaling)
    return out


def head_scores(
    logits: Tensor, targets: Tensor, temperature: float, grad: bool, spread: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of rows of logits, and their gradients.

    Args:
        logits: [M, V], dense. Where `grad`, they become the gradient of each target's
            log-probability in the scaled logits.
        targets: int64 [M].
        temperature: the temperature that logits are divided by.
        grad: whether gradients are wanted.
        spread: [M, V] of the type of `logits` that gets the gradient of the entropy; None = not
            wanted.

    Returns:
        Both float32 [M].
    """
    other = logits.new_empty(0) if spread is None else spread
    logprobs, entropy = _ops().head_scores_(logits, targets, temperature, grad, other)
    return logprobs, entropy


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, banned: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Draw a token per row by inverting the cumulative distribution.

    Args:
        logits: [B, V], dense.
        uniform: float64 [B] in [0, 1).
        temperature: the temperature, above 0, that logits are divided by.
        banned: int64 ids that are not drawn; None = none.

    Returns:
        Token ids int64 [B], and their float32 log-probabilities with banned tokens counted in.
    """
    never = torch.empty(0, dtype=torch.int64) if banned is None else banned
    tokens, logprobs = _ops().draw(logits, uniform, temperature, never)
    return tokens, logprobs


def _check() -> None:
    """A small case of each kernel against plain torch; raises AssertionError."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        x, weight = torch.randn(5, 32).bfloat16(), torch.randn(16).bfloat16()
        gate, up = x.chunk(2, -1)
        _close(silu_mul(x), functional.silu(gate) * up)
        scale = torch.rsqrt(gate.float().square().mean(-1, keepdim=True) + 1e-5)
        _close(rms_norm(gate, weight, 1e-5), (gate.float() * scale).bfloat16() * weight)
        logits, targets = torch.randn(3, 300).bfloat16(), torch.tensor([0, 7, 299])
        expected = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        _close(head_scores(logits.clone(), targets, 1.0, False, None)[0], expected)
        tokens, _ = draw(logits, torch.rand(3, dtype=torch.float64), 1.0, None)
        assert bool(((tokens >= 0) & (tokens < 300)).all()), "a drawn token does not exist"
        q, k, v = (torch.randn(4, h, 16).bfloat16().requires_grad_() for h in (4, 2, 2))
        prefix = torch.randn(2, 2, 3, 16).bfloat16().requires_grad_()
        spans = torch.tensor([[0, 4, 0, 0]])
        ours = tree_attention(Packed(q, k, v), KeyValue(prefix[0], prefix[1]), spans, 0.25)
        own = (k.transpose(0, 1), v.transpose(0, 1))
        both = [torch.cat([prefix[i], own[i]], 1)[None] for i in range(2)]
        mask = torch.arange(7)[None] <= torch.arange(4)[:, None] + 3
        plain = masked_attention(q.transpose(0, 1)[None], both[0], both[1], mask[None], 0.25)
        plain = plain[0].transpose(0, 1)
        _close(ours, plain)
        upstream, inputs = torch.randn(4, 4, 16).bfloat16(), (q, k, v, prefix)
        pairs = zip(*(torch.autograd.grad(o, inputs, upstream) for o in (ours, plain)), strict=True)
        for gradient, expected in pairs:
            _close(gradient, expected, 1e-1)


def _close(ours: Tensor, expected: Tensor, atol: float = 2e-2) -> None:
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2e-2, atol=atol)
