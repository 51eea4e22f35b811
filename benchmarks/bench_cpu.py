"""The measurements behind the choices of the CPU path; each table pits two ways of doing one thing.

    python benchmarks/bench_cpu.py [--threads 2]

attention   forward + backward of [prefix | query | own] attention: `scaled_dot_product_attention`
            against the same written out in matrix products (`kernels.reference`)
linear      one linear layer of SmolLM2 in bf16: `nn.Linear` against packed weights
            (`model.cpu.packed_linear`)
decode      one decode step's attention of one layer: the cache sliced to its filled columns against
            the whole block with a mask (`engines.cache`)
head        log-probabilities, entropy and gradient of 1536 tokens: log_softmax over [M, V] with
            autograd, against `kernels.lm_head` in plain torch, and that against its C++ kernel
kernels     the other C++ kernels (`kernels.cpu`) at a training micro-batch of 800 tokens, forward
            and backward, against plain torch
rows        all linear layers of SmolLM2 for 8 to 1024 rows: oneDNN's product against the kernel's
step        one decode step of SmolLM2 for 32 rows: the base's own modules, the one call of the C++
            kernels, and the floor, max(weights / bandwidth, FLOPs / peak), with both measured here
agreement   how far sampling log-probabilities are from those of the training forward, in nats, with
            and without the kernels

    python benchmarks/bench_cpu.py --only step --only agreement

Times are the minimum over repeats, in milliseconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.cpu import ops
from rlprompt.kernels.cpu.product import packed_product, product_chunk
from rlprompt.kernels.lm_head import Head, head_scores
from rlprompt.kernels.reference import mask_bias, masked_attention
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.packed_linear import PackedLinear, can_pack, pack_weight
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.attention import LayerCall
from rlprompt.model.forward.tree import TreeContext, build_tree
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import PrefixKV, Query

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


def row(label: str, times: dict[str, float]) -> None:
    """Print one comparison of two times, in milliseconds by the name of what took them."""
    first, second = times.values()
    shown = "   ".join(f"{name} {time:8.2f}" for name, time in times.items())
    print(f"{label:44}{shown}   {first / second:5.2f}x")


def attention() -> None:
    """Training attention at several shapes."""
    for rows, tokens, shared in ((32, 48, 45), (32, 128, 50), (8, 256, 104)):
        attention_row(rows, tokens, shared)


def attention_row(rows: int, tokens: int, shared: int) -> None:
    """Rows of own tokens, each after the same number of shared ones."""
    query = torch.randn(rows, HEADS, tokens, DIM, dtype=torch.bfloat16).requires_grad_()
    key, value = (
        torch.randn(rows, KV_HEADS, shared + tokens, DIM, dtype=torch.bfloat16).requires_grad_()
        for _ in range(2)
    )
    own = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = torch.cat([torch.ones(tokens, shared, dtype=torch.bool), own], 1)
    mask = mask[None].expand(rows, -1, -1)
    bias, upstream = mask_bias(mask, query.dtype), torch.randn_like(query)

    def fused() -> None:
        out = functional.scaled_dot_product_attention(
            query, key, value, bias[:, None], enable_gqa=True
        )
        out.backward(upstream)

    def written_out() -> None:
        masked_attention(query, key, value, bias, DIM**-0.5).backward(upstream)

    label = f"attention {rows} x {tokens} after {shared}"
    row(label, {"sdpa": best(fused), "written out": best(written_out)})


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
            frozen = [PackedLinear(layer) for layer in layers]
            x = torch.randn(rows, inputs, dtype=torch.bfloat16)
            with torch.no_grad():
                plain = best(partial(through, layers, x)) / 10
                packed = best(partial(through, frozen, x)) / 10
            row(f"linear {rows} x {inputs} -> {outputs}", {"plain": plain, "packed": packed})


def through(layers: Iterable[nn.Module], x: Tensor) -> None:
    """The same input through each layer."""
    for layer in layers:
        layer(x)


def decode() -> None:
    """Decode attention with 32 rows."""
    for filled, block in ((60, 64), (95, 96), (200, 224)):
        query = torch.randn(32, HEADS, 1, DIM, dtype=torch.bfloat16)
        key, value = (torch.randn(32, KV_HEADS, block, DIM, dtype=torch.bfloat16) for _ in "kv")
        mask = (torch.arange(block) < filled)[None, None].expand(32, 1, -1)
        bias = mask_bias(mask, torch.bfloat16)
        with torch.inference_mode():
            sliced = best(partial(sliced_attention, query, key, value, bias, filled))
            whole = best(partial(masked_attention, query, key, value, bias, DIM**-0.5))
        row(f"decode, {filled} of {block} columns", {"sliced": sliced, "whole": whole})


def sliced_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, filled: int) -> None:
    """Attention to the first columns of a block; slicing belongs to the work."""
    key, value, bias = (tensor[:, :, :filled] for tensor in (key, value, bias))
    masked_attention(query, key, value, bias, DIM**-0.5)


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

    plain = best(ours, 3)
    row("head, 1536 tokens", {"log_softmax": best(naive, 3), "chunked": plain})
    if kernels_usable():
        chunked = chunked._replace(cpp=True)
        row("head, 1536 tokens", {"chunked": plain, "kernel": best(ours, 3)})


def kernels_usable() -> bool:
    """Whether the C++ kernels are there; says so otherwise."""
    usable, why = ops.status(cache_dir() / "kernels")
    if not usable:
        print(f"C++ kernels: not used, {why}")
    return usable


def kernels() -> None:
    """Element-wise kernels and tree attention."""
    if not kernels_usable():
        return
    tokens, width, inner = 800, 576, 1536
    x, weight = torch.randn(tokens, width).bfloat16().requires_grad_(), torch.ones(width).bfloat16()
    upstream = torch.randn(tokens, width).bfloat16()

    def plain_norm() -> None:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        (weight * normed.bfloat16()).backward(upstream)

    def norm() -> None:
        ops.rms_norm(x, weight, 1e-5).backward(upstream)

    row(f"norm, {tokens} x {width}", {"plain": best(plain_norm), "kernel": best(norm)})
    gates = torch.randn(tokens, 2 * inner).bfloat16().requires_grad_()
    gate, up = (t.detach().contiguous().requires_grad_() for t in gates.chunk(2, 1))
    above = torch.randn(tokens, inner).bfloat16()

    def plain_silu() -> None:
        (functional.silu(gate) * up).backward(above)

    def silu() -> None:
        ops.silu_mul(gates).backward(above)

    row(f"silu x up, {tokens} x {inner}", {"plain": best(plain_silu), "kernel": best(silu)})
    for rows, length in ((16, 48), (16, 128), (4, 256)):
        for shared in (19, 512):
            tree_row(rows, length, shared)


def tree_row(rows: int, length: int, shared: int) -> None:
    """Tree attention of two groups under one prefix."""
    completions = [[[0] * (length + 1)] * (rows // 2)] * 2
    tree = build_tree([[0] * 22] * 2, completions, shared, torch.device("cpu"))
    heads = (HEADS, KV_HEADS, KV_HEADS)
    tensors = [torch.randn(1, h, tree.num_tokens, DIM).bfloat16().requires_grad_() for h in heads]
    prefix = [torch.randn(KV_HEADS, shared, DIM, requires_grad=True) for _ in range(2)]
    upstream = torch.randn(1, HEADS, tree.num_tokens, DIM).bfloat16()

    def run(cpp: bool) -> None:
        context = TreeContext(tree, PrefixKV([prefix[0]], [prefix[1]]))
        call = LayerCall(0, tensors[0], tensors[1], tensors[2], 0.125, None, None, cpp)
        context.attend(call).backward(upstream)

    label = f"tree attention {rows} x {length} after {shared} + 22"
    row(label, {"plain": best(lambda: run(False)), "kernel": best(lambda: run(True))})


def rows() -> None:
    """The kernel's product against oneDNN's, all layers of the base in turn."""
    if not kernels_usable():
        return
    shapes = ((960, 576), (576, 576), (3072, 576), (576, 1536))
    weights = [pack_weight(torch.randn(shape).bfloat16()) for _ in range(30) for shape in shapes]
    chunks = [product_chunk(weight, None) for weight in weights]
    if not all(chunks):
        print("the kernel's product: not used, this oneDNN packs or sums in another way")
        return
    for count in (8, 32, 64, 128, 256, 512, 1024):
        products_row(count, weights, chunks)


def products_row(count: int, weights: list[Tensor], chunks: list[int]) -> None:
    """All products for so many rows."""
    inputs = {width: torch.randn(count, width).bfloat16() for width in (576, 1536)}

    def theirs() -> None:
        for weight in weights:
            product = torch.ops.mkldnn._linear_pointwise
            product(inputs[weight.shape[1]], weight, None, "none", [], "")

    def ours() -> None:
        for weight, chunk in zip(weights, chunks, strict=True):
            packed_product(inputs[weight.shape[1]], weight, None, chunk)

    row(f"layers, {count} rows", {"oneDNN": best(theirs), "kernel": best(ours)})


def policy(cpu_kernels: Literal["auto", "off"]) -> Policy:
    """SmolLM2 in bf16 under a text prompt."""
    base = load_base(ModelSettings(cpu_kernels=cpu_kernels, dtype="bfloat16"))
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer), TextPrompt("Be brief and kind."))


QUERIES = [
    Query(({"role": "user", "content": text},))
    for text in ("Why is the sky blue?", "Name a city.", "What is rain?", "How do I boil an egg?")
]


def decode_step_ms(of: Policy) -> float:
    """Milliseconds of one decode step and its LM head with 32 rows, whole rollout / tokens."""
    engine = NativeEngine(of)
    engine.sync(of.prompt)
    times = []
    for tokens in (8, 40):
        sampling = SamplingSettings(max_tokens=tokens, min_tokens=tokens)
        times.append(best(partial(engine.generate, QUERIES, 8, sampling, 0), 3))
    return (times[1] - times[0]) / 32


def step() -> None:
    """A decode step against its floor."""
    of = policy("off")
    print(f"step, 32 rows, own modules {decode_step_ms(of):8.2f}")
    of = policy("auto")
    ours = decode_step_ms(of)
    print(f"step, 32 rows, C++         {ours:8.2f}   ({of.forward.cpp = })")
    parameters = sum(p.numel() for p in of.base.model.parameters())
    big = torch.ones(2**28)
    square = torch.randn(2048, 2048).bfloat16()
    bandwidth = 4 * big.numel() / best(lambda: big.sum(), 5) / 1e6  # GB/s
    peak = 2 * 2048**3 / best(lambda: square @ square, 9) / 1e6  # GFLOP/s
    by_weights, by_work = 2 * parameters / bandwidth / 1e6, 2 * parameters * 32 / peak / 1e6
    print(f"floor: weights at {bandwidth:.0f} GB/s {by_weights:.2f}, ", end="")
    print(f"products at {peak:.0f} GFLOP/s {by_work:.2f}; step / floor ", end="")
    print(f"{ours / max(by_weights, by_work):.2f}")


def agreement() -> None:
    """Sampling against training log-probabilities."""
    for choice in ("off", "auto"):
        of = policy(choice)
        engine = NativeEngine(of)
        engine.sync(of.prompt)
        sampling = SamplingSettings(max_tokens=48, min_tokens=48)
        groups = engine.generate(QUERIES, 8, sampling, 0).groups
        with torch.no_grad():
            prefix = of.prefix()
            tree = of.tree(QUERIES, [g.completions for g in groups], prefix)
            scores = of.logprobs(tree, prefix)
        sampled = torch.tensor([c.sampling_logprobs for g in groups for c in g.completions])
        gap = (scores.logprobs - sampled).abs()
        print(f"agreement, kernels {choice:5} mean {gap.mean():.4f} nats, most {gap.max():.3f}")


TABLES: dict[str, Callable[[], None]] = {
    table.__name__: table
    for table in (attention, linear, decode, head, kernels, rows, step, agreement)
}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", action="append", choices=list(TABLES), help="may be repeated")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, milliseconds")
    for name in options.only or TABLES:
        TABLES[name]()


if __name__ == "__main__":
    main()
