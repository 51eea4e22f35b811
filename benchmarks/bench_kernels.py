"""Time the prefix-attention kernels against three peers on a GPU; without one, print the roofline.

    python benchmarks/bench_kernels.py [--json FILE] [--plot FILE] [--model ...] [--quick]

Peers (kernel_peers.py): `concat` copies the prefix to every row and calls SDPA (in decoding the
copies are in the cache already); `broadcast` is FlexAttention over one list of keys with a block
mask; `merge` is one call for the prefix, one for own keys, joined by their LSE.

First the results: every kernel and peer is compared with the float64 oracle, and our backward must
give the same bits twice. When that fails no speed is printed and the exit status is 1. The table
holds every point of the grid, losses included.

Beside each time stands the roofline: the longest of bytes / bandwidth and FLOPs / peak, from the
counts in `work`. It is calculated, and no kernel reaches it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kernel_peers import PEERS, Rows
from rlprompt.kernels.operands import Heads, KeyValue, Packed, Scoring, Spans
from rlprompt.kernels.oracle import rms_ratio
from rlprompt.kernels.reference import masked_attention
from rlprompt.kernels.triton.attention_rows import AttentionRows, attention_rows

IMPLEMENTATIONS = ("ours", *PEERS)
KINDS = ("forward", "training", "decode")
HEADS = {
    "smollm2-135m": Heads(9, 3, 64),
    "qwen3-8b": Heads(32, 8, 128),
    "llama-2-7b": Heads(32, 32, 128),
}
BATCHES, PREFIXES, TOKENS = (16, 64, 256), (32, 128, 512), (128, 1024)
TOLERANCE = 1e-2
"""RMS ratio to the float64 oracle in bfloat16, gradients included."""


class Device(NamedTuple):
    """Peak figures of a GPU's data sheet."""

    bytes_per_second: float
    flops: float
    """Dense bfloat16 matrix products."""


DEVICES = {
    "H100": Device(3.35e12, 989e12),  # SXM5
    "H200": Device(4.8e12, 989e12),
    "A100": Device(2.04e12, 312e12),  # 80 GB SXM4
    "MI300X": Device(5.3e12, 1307e12),
}


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    kind: str
    model: str
    batch: int
    prefix: int
    tokens: int
    """Own tokens of a row; for decoding its own columns."""

    @property
    def heads(self) -> Heads:
        return HEADS[self.model]

    @property
    def queries(self) -> int:
        return 1 if self.kind == "decode" else self.tokens


def grid(models: list[str], quick: bool) -> Iterator[Point]:
    for kind in KINDS:
        for model in models:
            for batch in BATCHES[:1] if quick else BATCHES:
                for prefix in PREFIXES:
                    for tokens in TOKENS[:1] if quick else TOKENS:
                        yield Point(kind, model, batch, prefix, tokens)


class Work(NamedTuple):
    """What an implementation cannot do without."""

    flops: float
    traffic: float
    """Bytes."""


def work(point: Point, implementation: str) -> Work:
    """FLOPs and bytes of an implementation in bfloat16.

    FLOPs: two products of 2 D per score forward, five backward, seven in ours, where queries and
    keys each compute the scores for themselves. Bytes: each tensor once where it is read or
    written, caches ignored; what implementations add are the copies of `concat`, the packing of
    `broadcast` and its gradients of all keys for every row, the partial outputs of `merge`.
    """
    heads, kv_heads, dim = point.heads
    batch, prefix, tokens = point.batch, point.prefix, point.tokens
    own_scores = tokens if point.kind == "decode" else tokens * (tokens + 1) / 2
    scores = batch * heads * (own_scores + point.queries * prefix)
    queries = 2.0 * batch * point.queries * heads * dim  # bytes of q, of o, of their gradients
    own = 2.0 * 2 * batch * tokens * kv_heads * dim  # bytes of keys and values
    shared = 2.0 * 2 * prefix * kv_heads * dim
    flops = 4.0 * dim * scores
    traffic = 2 * queries + own + shared
    training, decode = point.kind == "training", point.kind == "decode"
    if training:
        flops += 2.0 * dim * scores * (7 if implementation == "ours" else 5)
        traffic += 4 * queries + 2 * (own + shared)
    if implementation == "concat":
        copies = (batch - 1) * shared
        traffic += copies + (0 if decode else 2 * own + batch * shared)
        traffic += 2 * copies + batch * shared if training else 0
    if implementation == "broadcast":
        traffic += 0 if decode else 2 * (own + shared)
        traffic += 2 * batch * (own + shared) if training else 0
    if implementation == "merge":
        traffic += 8 * queries if training else 4 * queries
    return Work(flops, traffic)


def roofline(point: Point, implementation: str, device: Device) -> float:
    """Seconds below which the work cannot be done."""
    flops, traffic = work(point, implementation)
    return max(flops / device.flops, traffic / device.bytes_per_second)


def make_rows(point: Point, device: str, dtype: torch.dtype) -> Rows:
    """Random tensors laid out as projections are, tokens first; in training they want gradients."""
    heads, kv_heads, dim = point.heads
    made: list[Tensor] = []
    for tokens, count in [(point.queries, heads), *[(point.tokens, kv_heads)] * 2]:
        own = torch.randn(point.batch, tokens, count, dim, device=device, dtype=dtype)
        made.append(own.transpose(1, 2))
    for _ in range(2):
        made.append(torch.randn(kv_heads, point.prefix, dim, device=device, dtype=dtype))
    return Rows(*(t.requires_grad_(point.kind == "training") for t in made))


def packed_rows(point: Point, device: str) -> AttentionRows:
    """Rows behind each other."""
    positions = point.prefix + torch.arange(point.tokens, device=device).repeat(point.batch)
    lengths = torch.full((point.batch,), point.tokens, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return attention_rows(lengths, None, none, positions, point.tokens)


def ours(rows: Rows, point: Point) -> Callable[[], Tensor]:
    """Our kernels on the same tensors; returns [B, H, Q, D] like the peers."""
    from rlprompt.kernels.triton.attention import prefix_attention, prefix_decode

    device = str(rows.query.device)
    scoring = Scoring(point.heads.dim**-0.5)
    prefix = KeyValue(rows.prefix_key, rows.prefix_value)
    if point.kind == "decode":
        firsts = torch.zeros(point.batch, dtype=torch.int32, device=device)
        spans, own = Spans(firsts, firsts + point.tokens), KeyValue(rows.key, rows.value)

        def decode() -> Tensor:
            return prefix_decode(rows.query[:, :, 0], own, prefix, spans, scoring)[:, :, None]

        return decode
    layout = packed_rows(point, device)

    def attend() -> Tensor:
        packed = Packed(*(t.transpose(1, 2).flatten(0, 1) for t in rows[:3]))
        out = prefix_attention(packed, prefix, layout, scoring)
        split: Tensor = out.unflatten(0, (point.batch, point.tokens))
        return split.transpose(1, 2)

    return attend


def exact(rows: Rows, point: Point) -> Tensor:
    """The oracle: a masked softmax in float64."""
    copies = [p[None].expand(point.batch, -1, -1, -1) for p in rows[3:]]
    key, value = (torch.cat([c, own], 2) for c, own in zip(copies, rows[1:3], strict=True))
    keys = point.prefix + point.tokens
    mask = torch.ones(point.queries, keys, dtype=torch.bool, device=key.device)
    mask = mask.tril(keys - point.queries)
    return masked_attention(rows.query, key, value, mask[None], point.heads.dim**-0.5)


def functions(rows: Rows, point: Point, flex: Any) -> dict[str, Callable[[], Tensor]]:
    """Each implementation, ready to be called."""
    made: dict[str, Callable[[], Tensor]] = {"ours": ours(rows, point)}
    return made | {name: peer(rows, flex) for name, peer in PEERS.items()}


GATE = [Point(kind, model, 3, 77, 67) for kind in ("training", "decode") for model in HEADS]
"""Small odd shapes, on which results are compared."""


def gate(points: list[Point], device: str, flex: Any, dtype: torch.dtype) -> dict[str, float]:
    """Worst RMS ratio of each implementation to the oracle over some points, in all results.

    `ours, again` is the number of elements that differ between two backward passes.
    """
    worst = dict.fromkeys([*IMPLEMENTATIONS, "ours, again"], 0.0)
    for point in points:
        rows = make_rows(point, device, dtype)
        doubles = Rows(*(t.detach().double().requires_grad_(t.requires_grad) for t in rows))
        truth = results(lambda: exact(doubles, point), doubles)  # noqa: B023 - called here
        for name, function in functions(rows, point, flex).items():
            given = results(function, rows)
            errors = [rms_ratio(t, g) for t, g in zip(truth, given, strict=True)]
            worst[name] = max(worst[name], *errors)
            if name == "ours":
                again = results(function, rows)
                changed = sum(int((a != b).sum()) for a, b in zip(given, again, strict=True))
                worst["ours, again"] += changed
    return worst


def results(function: Callable[[], Tensor], rows: Rows) -> list[Tensor]:
    """The output, and the five gradients where they are wanted."""
    out = function()
    if not rows.query.requires_grad:
        return [out]
    generator = torch.Generator(device=out.device).manual_seed(0)
    upstream = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(rows), upstream)]


@dataclass(frozen=True)
class Measured:
    """One cell: calculated, and measured where a GPU is."""

    point: Point
    implementation: str
    gflop: float
    megabytes: float
    roofline_us: float
    """Calculated."""
    measured_us: float | None = None
    """Median; None = not measured, or out of memory."""


def calculate(points: list[Point], device: Device) -> list[Measured]:
    cells = []
    for point in points:
        for name in IMPLEMENTATIONS:
            flops, traffic = work(point, name)
            seconds = roofline(point, name, device)
            cells.append(Measured(point, name, flops / 1e9, traffic / 1e6, seconds * 1e6))
    return cells


def measure(cells: list[Measured], flex: Any) -> list[Measured]:
    """Fill in times, by Triton's do_bench, which flushes the L2 cache between calls."""
    done = []
    for cell in cells:
        rows = make_rows(cell.point, "cuda", torch.bfloat16)
        try:
            name = cell.implementation
            function = ours(rows, cell.point) if name == "ours" else PEERS[name](rows, flex)
            done.append(replace(cell, measured_us=1e3 * milliseconds(function, cell.point, rows)))
        except torch.OutOfMemoryError:
            done.append(cell)
        del rows
        torch.cuda.empty_cache()
    return done


def milliseconds(function: Callable[[], Tensor], point: Point, rows: Rows) -> float:
    from triton.testing import do_bench

    if point.kind == "training":
        upstream = torch.randn_like(function())
        call: Callable[[], Any] = lambda: torch.autograd.grad(function(), list(rows), upstream)  # noqa: E731
        return float(do_bench(call, return_mode="median"))
    with torch.no_grad():
        return float(do_bench(function, return_mode="median"))


def print_table(cells: list[Measured], title: str) -> None:
    """One line per point: roofline and, where measured, time of each implementation."""
    print(title)
    has_times = any(cell.measured_us is not None for cell in cells)
    columns = "".join(f"{name:>20}" for name in IMPLEMENTATIONS)
    print(f"{'kind':<9}{'model':<14}{'B':>4}{'P':>5}{'T':>6}{columns}   concat / ours")
    for i in range(0, len(cells), len(IMPLEMENTATIONS)):
        line = {c.implementation: c for c in cells[i : i + len(IMPLEMENTATIONS)]}
        point = cells[i].point
        text = f"{point.kind:<9}{point.model:<14}{point.batch:>4}{point.prefix:>5}{point.tokens:>6}"
        for cell in line.values():
            shown = f"{cell.roofline_us:.1f}"
            if has_times:
                time = "no memory" if cell.measured_us is None else f"{cell.measured_us:.1f}"
                shown = f"{time} ({shown})"
            text += f"{shown:>20}"
        print(f"{text}{ratio(line):>14}")


def ratio(line: dict[str, Measured]) -> str:
    """How many times the time of ours `concat` takes; below 1 is a loss."""
    mine, other = line["ours"], line["concat"]
    if mine.measured_us is not None and other.measured_us is not None:
        return f"{other.measured_us / mine.measured_us:.2f}x"
    return f"{other.roofline_us / mine.roofline_us:.2f}x"


def plot(cells: list[Measured], path: Path, title: str) -> None:
    """Time over prefix length at the middle batch, one panel per kind and model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batch, tokens = (sorted({getattr(c.point, n) for c in cells}) for n in ("batch", "tokens"))
    middle, longest = batch[len(batch) // 2], tokens[-1]
    models = list(dict.fromkeys(c.point.model for c in cells))
    figure, panels = pyplot.subplots(
        len(models), len(KINDS), figsize=(4 * len(KINDS), 3 * len(models)), squeeze=False
    )
    for panel_row, model in zip(panels, models, strict=True):
        for panel, kind in zip(panel_row, KINDS, strict=True):
            for name in IMPLEMENTATIONS:
                line = [
                    (c.point.prefix, c.measured_us or c.roofline_us)
                    for c in cells
                    if (c.point.kind, c.point.model, c.implementation) == (kind, model, name)
                    and (c.point.batch, c.point.tokens) == (middle, longest)
                ]
                panel.plot(*zip(*line, strict=True), marker="o", label=name)
            panel.set_title(f"{kind}, {model}", fontsize=9)
            panel.set_xlabel("prefix tokens")
            panel.set_ylabel("microseconds")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(f"{title}\n{middle} rows, {longest} own tokens", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def known_device(name: str) -> str:
    found = [known for known in DEVICES if known in name]
    if not found:
        raise SystemExit(f"no peak figures for {name}: add them to DEVICES, or choose --device")
    return found[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    parser.add_argument("--plot", type=Path, help="draw time over prefix length (.png, .svg)")
    parser.add_argument("--model", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--device", choices=DEVICES, help="whose peaks the roofline uses")
    parser.add_argument("--quick", action="store_true", help="the smallest batch and length only")
    given = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if has_gpu and importlib.util.find_spec("triton") is None:
        raise SystemExit("error: Triton is not installed; run `pip install 'rlprompt[triton]'`")
    name = given.device or (known_device(torch.cuda.get_device_name()) if has_gpu else "H100")
    cells = calculate(list(grid(given.model, given.quick)), DEVICES[name])
    title = (
        f"CALCULATED, nothing was measured: roofline of {name}, microseconds per layer, bfloat16"
    )
    record: dict[str, Any] = {
        "roofline_device": name,
        "measured": has_gpu,
        "torch": torch.__version__,
    }
    if has_gpu:
        flex = torch.compile(torch.nn.attention.flex_attention.flex_attention, dynamic=False)
        errors = gate(GATE, "cuda", flex, torch.bfloat16)
        record |= {"device": torch.cuda.get_device_name(), "errors": errors}
        print("RMS ratio to the oracle:", errors)
        if errors.pop("ours, again") or max(errors.values()) > TOLERANCE:
            print("results are wrong: no speed is worth printing", file=sys.stderr)
            return 1
        cells = measure(cells, flex)
        title = f"median microseconds per layer on {record['device']} (roofline, calculated)"
    print_table(cells, title)
    if given.json:
        rows = [{**asdict(cell.point), **asdict(cell)} for cell in cells]
        for row in rows:
            del row["point"]
        given.json.write_text(json.dumps({**record, "cells": rows}, indent=1) + "\n")
    if given.plot:
        plot(cells, given.plot, title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
