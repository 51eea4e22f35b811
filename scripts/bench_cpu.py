"""The measurements behind the choices of the CPU path; each table pits two ways of doing one thing.

    python scripts/bench_cpu.py [--threads 2]

attention   forward + backward of [prefix | query | own] attention: `scaled_dot_product_attention`
            against the same written out in matrix products (`kernels.reference`)
linear      one linear layer of SmolLM2 in bf16: `nn.Linear` against packed weights (`model.frozen`)
decode      one decode step's attention of one layer: the cache sliced to its filled columns against
            the whole block with a mask (`engines.cache`)
head        log-probabilities, entropy and gradient of 1536 tokens: log_softmax over [M, V] with
            autograd against `kernels.lm_head`

Times are the minimum over repeats, in milliseconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.kernels.lm_head import Head, head_scores
from rlprompt.kernels.reference import mask_bias, masked_attention
from rlprompt.model.frozen import FrozenLinear, can_pack

HEADS, KV_HEADS, DIM = 9, 3, 64


def best(run: Callable[[], object], repeats: int = 7) -> float:
    """Fewest milliseconds of `repeats` calls after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def row(label: str, first: tuple[str, float], second: tuple[str, float]) -> None:
    """Print one comparison."""
    ratio = first[1] / second[1]
    print(f"{label:44}{first[0]} {first[1]:8.2f}   {second[0]} {second[1]:8.2f}   {ratio:5.2f}x")


def attention() -> None:
    """Training attention at several shapes."""
    for rows, tokens, shared in ((32, 48, 45), (32, 128, 50), (8, 256, 104)):
        query = torch.randn(rows, HEADS, tokens, DIM, dtype=torch.bfloat16).requires_grad_()
        key, value = (
            torch.randn(rows, KV_HEADS, shared + tokens, DIM, dtype=torch.bfloat16).requires_grad_()
            for _ in range(2)
        )
        own = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(tokens, shared, dtype=torch.bool), own], 1)
        mask = mask[None].expand(rows, -1, -1)
        bias, upstream = mask_bias(mask, query.dtype), torch.randn_like(query)

        def fused(q=query, k=key, v=value, b=bias, g=upstream) -> None:  # type: ignore[no-untyped-def]
            out = functional.scaled_dot_product_attention(q, k, v, b[:, None], enable_gqa=True)
            out.backward(g)

        def written_out(q=query, k=key, v=value, b=bias, g=upstream) -> None:  # type: ignore[no-untyped-def]
            masked_attention(q, k, v, b, DIM**-0.5).backward(g)

        label = f"attention {rows} x {tokens} after {shared}"
        row(label, ("sdpa", best(fused)), ("written out", best(written_out)))


def linear() -> None:
    """Linear layers at decode and training row counts."""
    for rows in (32, 1536):
        for inputs, outputs in ((576, 576), (576, 1536), (1536, 576)):
            layers = [
                nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16).requires_grad_(False)
                for _ in range(10)
            ]
            if not can_pack(layers[0]):
                print("linear: this machine or build of torch does not pack bf16 weights")
                return
            frozen = [FrozenLinear(layer) for layer in layers]
            x = torch.randn(rows, inputs, dtype=torch.bfloat16)
            with torch.no_grad():
                plain = best(lambda x=x, ls=layers: [layer(x) for layer in ls]) / 10
                packed = best(lambda x=x, ls=frozen: [layer(x) for layer in ls]) / 10
            row(f"linear {rows} x {inputs} -> {outputs}", ("plain", plain), ("packed", packed))


def decode() -> None:
    """Decode attention with 32 rows."""
    for filled, block in ((60, 64), (95, 96), (200, 224)):
        query = torch.randn(32, HEADS, 1, DIM, dtype=torch.bfloat16)
        key, value = (torch.randn(32, KV_HEADS, block, DIM, dtype=torch.bfloat16) for _ in "kv")
        mask = (torch.arange(block) < filled)[None, None].expand(32, 1, -1)
        bias = mask_bias(mask, torch.bfloat16)
        with torch.inference_mode():
            sliced = best(
                lambda q=query, k=key, v=value, b=bias, n=filled: masked_attention(
                    q, k[:, :, :n], v[:, :, :n], b[:, :, :n], DIM**-0.5
                )
            )
            whole = best(
                lambda q=query, k=key, v=value, b=bias: masked_attention(q, k, v, b, DIM**-0.5)
            )
        row(f"decode, {filled} of {block} columns", ("sliced", sliced), ("whole", whole))


def head() -> None:
    """LM head of SmolLM2 with gradient."""
    weight = torch.randn(49152, 576, dtype=torch.bfloat16) * 0.05
    hidden = torch.randn(1536, 576, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, 49152, (1536,))
    chunked = Head(lambda h: h @ weight.t(), lambda g: g @ weight, weight.dtype, 49152)

    def naive() -> None:
        logprobs = (hidden @ weight.t()).float().log_softmax(-1)
        with torch.no_grad():
            -(logprobs.exp() * logprobs).sum(-1)
        logprobs.gather(1, targets[:, None]).sum().backward()

    def ours() -> None:
        head_scores(hidden, targets, chunked).logprobs.sum().backward()

    row("head, 1536 tokens", ("log_softmax", best(naive, 3)), ("chunked", best(ours, 3)))


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, milliseconds")
    for table in (attention, linear, decode, head):
        table()


if __name__ == "__main__":
    main()
