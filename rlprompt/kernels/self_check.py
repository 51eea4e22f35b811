"""Whether the Triton kernels compile here, and give what attention written out gives.

Asked once for each shape of heads that a base has, before its first use, with the constants of that
use: what is compiled for the check is what runs afterwards. A compiler or a driver that is new can
break a kernel without a word; a base then runs without it, as on a CPU.

Letters: N packed tokens, B decoding rows, S own columns, P prefix tokens, H heads, H_kv key/value
heads, D head dim, C rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlprompt.kernels.operands import Heads, KeyValue, Packed, Scoring, Spans
from rlprompt.kernels.oracle import oracle_attention, rms_ratio
from rlprompt.kernels.triton.attention_rows import attention_rows

Kind = Literal["tree", "decode"]
"""Attention of packed tokens with its gradients, or of one new token per row."""
TOLERANCE = {
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.float32: 2e-4,
    torch.float64: 1e-10,
}
"""RMS of the difference from float64 over the RMS of the truth: some roundings, of results and of
the weights between two products. A wrong tile, mask or scale is off by a tenth at least."""


class _Sizes(NamedTuple):
    """Tokens of a check: across the borders of tiles, and no multiple of one."""

    prefix: int
    queries: tuple[int, int]
    completions: tuple[int, int]


_COMPILED = _Sizes(150, (5, 70), (67, 9))
_INTERPRETED = _Sizes(17, (2, 9), (9, 1))
"""Tiles are of 16 there, and a program takes its time."""


def attention_fault(
    kind: Kind, device: torch.device, dtype: torch.dtype, heads: Heads, scoring: Scoring
) -> str | None:
    """What is wrong with the attention kernels; None = they can be used.

    Args:
        kind: the kernels to ask for.
        device: the device that they run on.
        dtype: the dtype of queries, keys and values.
        heads: the heads of the layers.
        scoring: how their scores come about.
    """
    check = _tree if kind == "tree" else _decode
    return _fault(dtype, lambda: check(device, dtype, heads, scoring))


def head_fault(
    device: torch.device, dtype: torch.dtype, vocab_size: int, softcap: float | None
) -> str | None:
    """What is wrong with the kernel that scores rows of logits; None = it can be used.

    Args:
        device: the device that it runs on.
        dtype: the dtype of the logits.
        vocab_size: the logits of a row.
        softcap: the soft cap of the head; None = no cap.
    """
    return _fault(dtype, lambda: _head(device, dtype, vocab_size, softcap))


def _fault(dtype: torch.dtype, check: Callable[[], dict[str, float]]) -> str | None:
    """What a check that compares results finds."""
    try:
        # A check may be the first thing in a rollout, where nothing has gradients.
        with torch.inference_mode(False), torch.enable_grad():
            gaps = check()
    except Exception as error:  # compilers and drivers raise what they like
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"their first use here failed ({said})"
    wrong = {name: gap for name, gap in gaps.items() if not gap <= TOLERANCE[dtype]}
    if not wrong:
        return None
    named = ", ".join(f"{name} by {gap:.2g}" for name, gap in wrong.items())
    return f"their results differ from attention written out ({named}, relative RMS)"


def _made(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[Sequence[int]]
) -> list[Tensor]:
    """Random numbers of these shapes, the same ones each time, which touch no global state."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tuple(s), generator=generator).to(device, dtype) for s in shapes]


def _gaps(
    names: Sequence[str], ours: Sequence[Tensor], exact: Sequence[Tensor]
) -> dict[str, float]:
    return {name: rms_ratio(e, o) for name, o, e in zip(names, ours, exact, strict=True)}


def _sizes() -> _Sizes:
    from rlprompt.kernels.triton.attention_tiles import interpreting

    return _INTERPRETED if interpreting() else _COMPILED


def _tree(
    device: torch.device, dtype: torch.dtype, heads: Heads, scoring: Scoring
) -> dict[str, float]:
    """Outputs and gradients of a packed batch: two queries, the first with two completions."""
    from rlprompt.kernels.triton.attention import prefix_attention

    sizes = _sizes()
    lengths = [*sizes.queries, *sizes.completions]
    starts = [sizes.prefix, sizes.prefix, *[sizes.prefix + sizes.queries[0]] * 2]
    positions = [s + i for s, length in zip(starts, lengths, strict=True) for i in range(length)]
    rows = attention_rows(
        torch.tensor(sizes.queries, device=device),
        torch.tensor(sizes.completions, device=device),
        torch.tensor([0, 0], device=device),
        torch.tensor(positions, device=device),
        max(lengths),
    )
    own, shared = (sum(lengths), heads.keys, heads.dim), (heads.keys, sizes.prefix, heads.dim)
    query = (sum(lengths), heads.queries, heads.dim)
    *given, upstream = _made(device, dtype, [query, own, own, shared, shared, query])
    ours = [t.requires_grad_() for t in given]
    exact = [t.detach().double().requires_grad_() for t in given]
    out = prefix_attention(Packed(*ours[:3]), KeyValue(*ours[3:]), rows, scoring)
    truth = oracle_attention(Packed(*exact[:3]), KeyValue(*exact[3:]), rows.table, scoring)
    grads = torch.autograd.grad(out, ours, upstream)
    true_grads = torch.autograd.grad(truth, exact, upstream.double())
    names = ["outputs", *(f"gradients of {n}" for n in ("queries", "keys", "values"))]
    names += ["gradients of the prefix's keys", "gradients of the prefix's values"]
    return _gaps(names, [out.detach(), *grads], [truth.detach(), *true_grads])


def _decode(
    device: torch.device, dtype: torch.dtype, heads: Heads, scoring: Scoring
) -> dict[str, float]:
    """Outputs of new tokens: rows that see all their columns, one, and some in the middle."""
    from rlprompt.kernels.triton.attention import prefix_decode

    prefix, columns = _sizes().prefix, _sizes().queries[1] + 2
    own, shared = (3, heads.keys, columns, heads.dim), (heads.keys, prefix, heads.dim)
    made = _made(device, dtype, [(3, heads.queries, heads.dim), own, own, shared, shared])
    firsts, lengths = [0, 3, 4], [columns, 1, columns - 7]
    spans = Spans(*(torch.tensor(t, dtype=torch.int32, device=device) for t in (firsts, lengths)))
    out = prefix_decode(made[0], KeyValue(*made[1:3]), KeyValue(*made[3:]), spans, scoring)
    truth = []
    for row, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        key, value = (t[row, :, first : first + length].transpose(0, 1).double() for t in made[1:3])
        query = made[0][row].double().expand(length, -1, -1)
        table = torch.tensor([[0, length, 0, 0]])
        before = KeyValue(made[3].double(), made[4].double())
        truth.append(oracle_attention(Packed(query, key, value), before, table, scoring)[-1])
    return _gaps(["outputs"], [out], [torch.stack(truth)])


def _head(
    device: torch.device, dtype: torch.dtype, vocab_size: int, softcap: float | None
) -> dict[str, float]:
    """Log-probabilities, entropies and both gradients of three rows."""
    from rlprompt.kernels.triton.head_rows import head_rows

    temperature = 0.7
    (logits,) = _made(device, dtype, [(3, vocab_size)])
    targets = torch.tensor([0, vocab_size // 2, vocab_size - 1], device=device)
    exact = logits.double().requires_grad_()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    scores = (capped / temperature).log_softmax(1)
    logprobs = scores.gather(1, targets[:, None])[:, 0]
    entropies = -(scores.exp() * scores).sum(1)
    pull, spread = (
        torch.autograd.grad(total, exact, retain_graph=True)[0] * temperature
        for total in (logprobs.sum(), entropies.sum())
    )
    taken = torch.empty_like(logits)
    ours = head_rows(logits, targets, temperature, softcap, True, taken)
    names = ["log-probabilities", "entropies", "their gradients", "gradients of the entropy"]
    return _gaps(names, [*ours, logits, taken], [logprobs, entropies, pull, spread])
