"""The floor under a training step of a frozen decoder: its bare matrix products in bfloat16.

Forward is `x @ W.T` and the gradient with respect to the input is `dy @ W`, for every projection
of every layer with the model's own, distinct weights (so caches behave as in a real pass), plus
the LM head for the completion positions. No autograd, no attention, no norms, no loss. Weights of
a frozen base may be laid out in advance, so each part is timed in several layouts and the fastest
one counts:

    plain         the checkpoint's layout
    transposed    a contiguous copy of `W.T` (backward only)
    packed        oneDNN's blocked layout for this number of tokens
    fused_*       q, k, v and gate, up as one product each

Inputs are reused between products, which keeps them in cache: the floor errs on the low side.

    python -m benchmarks.peers.gemm_floor --model DIR --tokens 1536 --head-tokens 1536 [--repeats 5]
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.peers.worker import (
    claim_stdout,
    environment,
    parse_settings,
    serve,
    setting,
    versions,
)

HEAD_CHUNKS = (128, 256, 512)
"""Completion positions per LM head product; chunked because the whole output leaves the cache."""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_PROJECTION = re.compile(r"layers\.(\d+)\..*?(\w+_proj)\.weight$")

Pass = Callable[[], None]


def load_weights(model_dir: str) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Read the projections of each layer, by name, and the LM head, all as bfloat16.

    Returns:
        One dict per layer (`q_proj`, ... -> [out, in]) and the head [V, d_model], which is the
        embedding where the two are tied.

    Raises:
        ValueError: The folder holds no safetensors with Llama-style projection names.
    """
    layers: dict[int, dict[str, Tensor]] = {}
    heads: dict[str, Tensor] = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
                if match := _PROJECTION.search(name):
                    tensor = file.get_tensor(name).bfloat16()
                    layers.setdefault(int(match[1]), {})[match[2]] = tensor
                elif name.endswith(("lm_head.weight", "embed_tokens.weight")):
                    heads[name.split(".")[-2]] = file.get_tensor(name).bfloat16()
    if not layers or not heads:
        raise ValueError(f"{model_dir} has no safetensors with layers.N.*_proj.weight and a head.")
    return [layers[index] for index in sorted(layers)], heads.get("lm_head", heads["embed_tokens"])


def fuse(layer: dict[str, Tensor]) -> list[Tensor]:
    """Concatenate the projections that share an input: [out, in] each."""
    groups = [names for names in FUSED if all(name in layer for name in names)]
    taken = {name for names in groups for name in names}
    joined = [torch.cat([layer[name] for name in names]) for names in groups]
    return joined + [weight for name, weight in layer.items() if name not in taken]


def pack(weight: Tensor, num_rows: int) -> Tensor:
    """Reorder [out, in] into oneDNN's layout for `num_rows` input rows (an opaque tensor)."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)
    return packed


def packed_linear(inputs: Tensor, packed: Tensor) -> Tensor:
    """`inputs @ W.T` with a weight from `pack`."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, None, "none", [], "")
    return result


class GemmFloor:
    """The products of one forward and input-gradient backward, ready to be timed.

    Args:
        model_dir: Folder with the base's safetensors.
        num_tokens: Positions that pass through the layers, all rows together.
        num_head_tokens: Completion positions whose logits are needed.
    """

    def __init__(self, model_dir: str, num_tokens: int, num_head_tokens: int) -> None:
        """Load the weights and lay them out in every way that is timed."""
        layers, head = load_weights(model_dir)
        single = [weight for layer in layers for weight in layer.values()]
        fused = [weight for layer in layers for weight in fuse(layer)]
        self.num_tokens, self.num_head_tokens = num_tokens, num_head_tokens
        self.parts: dict[str, dict[str, Pass]] = {
            "layers_forward": {
                **self._forward_passes("", single),
                **self._forward_passes("fused_", fused),
            },
            "layers_backward": {
                **self._backward_passes("", single),
                **self._backward_passes("fused_", fused),
            },
            "head_forward": {},
            "head_backward": {},
        }
        for chunk in HEAD_CHUNKS:
            self._add_head(head, min(chunk, num_head_tokens))

    def measure(self) -> dict[str, dict[str, float]]:
        """Time every layout of every part once: part -> layout -> seconds."""
        return {
            part: {layout: _time(run) for layout, run in passes.items()}
            for part, passes in self.parts.items()
        }

    def _forward_passes(self, prefix: str, weights: Sequence[Tensor]) -> dict[str, Pass]:
        inputs = self._inputs(weight.shape[1] for weight in weights)
        packed = [(weight.shape[1], pack(weight, self.num_tokens)) for weight in weights]

        def plain() -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)

        def in_blocks() -> None:
            for width, weight in packed:
                packed_linear(inputs[width], weight)

        return {prefix + "plain": plain, prefix + "packed": in_blocks}

    def _backward_passes(self, prefix: str, weights: Sequence[Tensor]) -> dict[str, Pass]:
        inputs = self._inputs(weight.shape[0] for weight in weights)
        transposed = [weight.t().contiguous() for weight in weights]

        def plain() -> None:
            for weight in weights:
                inputs[weight.shape[0]].matmul(weight)

        passes = self._forward_passes("", transposed)
        return {
            prefix + "plain": plain,
            prefix + "transposed": passes["plain"],
            prefix + "packed": passes["packed"],
        }

    def _add_head(self, head: Tensor, chunk: int) -> None:
        num_chunks, rest = divmod(self.num_head_tokens, chunk)
        sizes = [chunk] * num_chunks + [rest] * (rest > 0)
        hidden = torch.randn(chunk, head.shape[1]).bfloat16()
        logits = torch.randn(chunk, head.shape[0]).bfloat16()
        grads = torch.empty_like(hidden)
        forward, backward = pack(head, chunk), pack(head.t().contiguous(), chunk)

        def plain_forward() -> None:
            for size in sizes:
                torch.mm(hidden[:size], head.t(), out=logits[:size])

        def packed_forward() -> None:
            for size in sizes:
                packed_linear(hidden[:size], forward)

        def plain_backward() -> None:
            for size in sizes:
                torch.mm(logits[:size], head, out=grads[:size])

        def packed_backward() -> None:
            for size in sizes:
                packed_linear(logits[:size], backward)

        self.parts["head_forward"].update(
            {f"plain_{chunk}": plain_forward, f"packed_{chunk}": packed_forward}
        )
        self.parts["head_backward"].update(
            {f"plain_{chunk}": plain_backward, f"packed_{chunk}": packed_backward}
        )

    def _inputs(self, widths: Any) -> dict[int, Tensor]:
        return {width: torch.randn(self.num_tokens, width).bfloat16() for width in set(widths)}


def _time(run: Pass) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        run()
    return time.perf_counter() - start


def gemm_floor_seconds(
    model_dir: str, num_tokens: int, num_head_tokens: int, repeats: int
) -> dict[str, Any]:
    """Measure the floor: per part, the layout with the lowest median of `repeats` timings.

    Args:
        model_dir: Folder with the base's safetensors.
        num_tokens: Positions through the layers, all rows together.
        num_head_tokens: Completion positions through the LM head.
        repeats: Timings of each layout, taken in turns after one warm-up.

    Returns:
        `floor_seconds` (sum of the best layouts), `unfused_seconds` (the same without the fused
        ones), `plain_seconds` (the checkpoint's layout everywhere), `best` (part -> layout),
        `parts` (part -> layout -> median seconds) and the settings. The weights in all layouts
        take about 2 GB for a 135M base: call it in a process whose memory is not measured.
    """
    floor = GemmFloor(model_dir, num_tokens, num_head_tokens)
    floor.measure()
    timings = [floor.measure() for _ in range(repeats)]
    settings = {
        "model": model_dir,
        "num_tokens": num_tokens,
        "num_head_tokens": num_head_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    return {**settings, **summarise(timings)}


def summarise(timings: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Turn results of `GemmFloor.measure` into medians and the floor (see gemm_floor_seconds)."""
    parts = {
        part: {
            layout: statistics.median(timing[part][layout] for timing in timings)
            for layout in timings[0][part]
        }
        for part in timings[0]
    }
    return {
        "floor_seconds": _lowest(parts),
        "unfused_seconds": _lowest(parts, "fused"),
        "plain_seconds": _lowest(parts, "fused", "packed", "transposed"),
        "best": {part: min(layouts, key=layouts.__getitem__) for part, layouts in parts.items()},
        "parts": parts,
    }


def _lowest(parts: dict[str, dict[str, float]], *excluded: str) -> float:
    return sum(
        min(
            seconds
            for layout, seconds in layouts.items()
            if not any(word in layout for word in excluded)
        )
        for layouts in parts.values()
    )


@dataclass(frozen=True)
class FloorSettings:
    """What to multiply; stated in every JSON."""

    model: str = field(metadata={"help": "Folder of the base model."})
    tokens: int = setting(1536, "Positions through the layers, all rows together.")
    head_tokens: int = setting(1536, "Completion positions through the LM head.")
    repeats: int = setting(0, "Timings per layout; 0 = be a worker, one timing per step.")
    threads: int = setting(0, "torch.set_num_threads; 0 leaves torch's choice.")


def main(argv: list[str] | None = None) -> None:
    """Read the flags and print one result or be a worker."""
    settings = parse_settings(FloorSettings, __doc__ or "", argv)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    out = claim_stdout()
    if settings.repeats:
        result = gemm_floor_seconds(
            settings.model, settings.tokens, settings.head_tokens, settings.repeats
        )
        out.write(json.dumps({**result, "versions": versions("torch")}) + "\n")
        return
    floor = GemmFloor(settings.model, settings.tokens, settings.head_tokens)
    ready = {
        "settings": asdict(settings),
        "environment": environment(),
        "versions": versions("torch"),
    }
    serve(lambda: {"parts": floor.measure()}, {"settings": asdict(settings), **ready}, out)


if __name__ == "__main__":
    main()
