"""Each CPU kernel against plain torch: the same values and gradients, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlprompt.engines.sampling import SamplingSettings, next_tokens
from rlprompt.errors import InputError
from rlprompt.kernels.cpu import build, ops
from rlprompt.kernels.cpu.cache_layout import (
    lay_out_keys,
    lay_out_values,
    plain_keys,
    plain_values,
)
from rlprompt.kernels.lm_head import Head, head_scores
from rlprompt.kernels.operands import KeyValue, Packed
from rlprompt.kernels.reference import masked_attention
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.attention import CausalContext, LayerCall
from rlprompt.model.forward.tree import TokenTree, TreeContext, build_tree
from rlprompt.types import PrefixKV

FOLDER = cache_dir() / "kernels"
CPU = torch.device("cpu")
USABLE = ops.choose("auto", FOLDER, torch.bfloat16, CPU)
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape).bfloat16().requires_grad_(grad)


def assert_near(ours: Tensor, exact: Tensor, factor: float = 0.01) -> None:
    """Root mean square of the difference, against that of the exact values."""
    gap = (ours.double() - exact.double()).square().mean().sqrt()
    assert gap <= factor * exact.double().square().mean().sqrt(), float(gap)


@needs_kernels
@pytest.mark.parametrize("width", [1, 16, 33, 576])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_rms_norm(rows: int, width: int) -> None:
    x, weight, upstream = randn(rows, width, grad=True), randn(width), randn(rows, width)
    wide = x.detach().double().requires_grad_()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    exact = weight.double() * wide * scale
    ours = ops.rms_norm(x, weight, 1e-5)
    assert_near(ours.detach(), exact.detach())
    ours.backward(upstream)
    exact.backward(upstream.double())
    assert x.grad is not None and wide.grad is not None
    if width > 1:  # of one number, the norm is its sign: the exact gradient is all but zero
        assert_near(x.grad, wide.grad)


@needs_kernels
@pytest.mark.parametrize("adds", [False, True])
def test_a_norm_beside_the_residual_has_the_bits_of_both_apart(adds: bool) -> None:
    residual, update, weight = randn(7, 33, grad=True), randn(7, 33, grad=True), randn(33)
    total, normed = ops.branch_norm(residual, update if adds else None, weight, 1e-5)
    apart = residual + update if adds else residual * 1
    theirs = ops.rms_norm(apart, weight, 1e-5)
    assert torch.equal(total, apart) and torch.equal(normed, theirs)
    upstream, inputs = [randn(7, 33), randn(7, 33)], [residual, update] if adds else [residual]
    ours = torch.autograd.grad([total, normed], inputs, upstream)
    expected = torch.autograd.grad([apart, theirs], inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize("width", [1, 16, 50, 1536])
def test_silu_mul(width: int) -> None:
    x, upstream = randn(1, 9, 2 * width, grad=True), randn(1, 9, width)
    with torch.no_grad():
        x[0, 0] = 90.0
        x[0, 1] = -90.0
    wide = x.detach().double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    exact = functional.silu(gate) * up
    ours = ops.silu_mul(x)
    assert ours.shape == exact.shape
    assert_near(ours.detach(), exact.detach())
    ours.backward(upstream)
    exact.backward(upstream.double())
    assert x.grad is not None and wide.grad is not None
    assert_near(x.grad, wide.grad)


@needs_kernels
def test_rotary_has_the_bits_of_the_written_out_one() -> None:
    tokens, heads, kv_heads, dim = 6, 4, 2, 16
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim)
    angles = torch.randn(tokens, dim)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    inputs = [qkv.clone().requires_grad_() for _ in range(2)]
    ours = ops.rotary(inputs[0] * 1, cos, sin, kv_heads)
    split = inputs[1].view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)

    def turned(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    theirs = (turned(split[0]), turned(split[1]), split[2])
    upstream = [randn(*t.shape) for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    torch.autograd.backward(ours, upstream)
    torch.autograd.backward(theirs, upstream)
    first, second = (each.grad for each in inputs)
    assert first is not None and second is not None and torch.equal(first, second)


def tree_case(prefix_tokens: int) -> tuple[list[Tensor], list[Tensor], TokenTree]:
    queries = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    completions = [[[1] * n for n in (4, 1, 20)], [[2] * 2], [[3] * n for n in (6, 30, 2, 9, 3)]]
    tree = build_tree(queries, completions, prefix_tokens, CPU)
    tensors = [randn(1, h, tree.num_tokens, 32, grad=True) for h in (6, 2, 2)]
    prefix = [torch.randn(2, prefix_tokens, 32, requires_grad=True) for _ in range(2)]
    return tensors, prefix, tree


@needs_kernels
@pytest.mark.parametrize("prefix_tokens", [0, 1, 19, 40])
def test_tree_attention_is_that_of_the_written_out_tree(prefix_tokens: int) -> None:
    tensors, prefix, tree = tree_case(prefix_tokens)
    upstream = randn(*tensors[0].shape)
    results = []
    for cpp, dtype in ((True, torch.bfloat16), (False, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        shared = [p.detach().bfloat16().to(p.dtype).requires_grad_() for p in prefix]
        context = TreeContext(tree, PrefixKV([shared[0]], [shared[1]]), keep_queries=True)
        out = context.attend(
            LayerCall(0, inputs[0], inputs[1], inputs[2], 32**-0.5, None, None, cpp)
        )
        out.backward(upstream.to(dtype))
        gradients = [t.grad for t in (*inputs, *shared)]
        results.append([out.detach(), *gradients, context.query_keys[0], context.query_values[0]])
    names = ["o", "dq", "dk", "dv", "dkp", "dvp", "query keys", "query values"]
    for name, ours, exact in zip(names, *results, strict=True):
        assert ours.shape == exact.shape, name
        if exact.numel():
            assert_near(ours, exact, 0.02)


@needs_kernels
@pytest.mark.parametrize("before", [0, 5])
def test_a_prefill_is_that_of_the_written_out_one(before: int) -> None:
    tensors = [randn(1, h, 21, 32, grad=True) for h in (6, 2, 2)]
    after = [randn(2, before, 32, grad=True) for _ in range(2)]
    upstream, results = randn(*tensors[0].shape), []
    for cpp, dtype in ((True, torch.bfloat16), (False, torch.float64)):
        q, k, v, *shared = (t.detach().to(dtype).requires_grad_() for t in (*tensors, *after))
        context = CausalContext(PrefixKV([shared[0]], [shared[1]]) if before else None)
        out = context.attend(LayerCall(0, q, k, v, 32**-0.5, None, None, cpp))
        made = context.prefix()
        loss = (out * upstream).sum() + made.keys[0].square().sum() + made.values[0].square().sum()
        inputs = (q, k, v, *shared) if before else (q, k, v)
        gradients = torch.autograd.grad(loss, inputs)
        results.append([out, made.keys[0], made.values[0], *gradients])
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert_near(ours.detach(), exact.detach(), 0.02)


@needs_kernels
def test_gradients_of_the_shared_keys_do_not_depend_on_threads() -> None:
    tensors, prefix, tree = tree_case(19)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        spans = tree.spans
        q, k, v = (t[0].transpose(0, 1) for t in tensors)
        out = ops.tree_attention(Packed(q, k, v), KeyValue(prefix[0], prefix[1]), spans, 0.2)
        found.append(torch.autograd.grad(out.float().square().sum(), [*tensors, *prefix]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
@pytest.mark.parametrize("share", [1, 3])
def test_decode_attention(share: int) -> None:
    rows, kv_heads, dim, shared, column, capacity = 4, 2, 48, 37, 42, 48
    padding, leaders = torch.tensor([0, 2, 2, 21, 1]), torch.tensor([0, 1, 1, 3, 0])
    plain = randn(2 * 2, rows + 1, kv_heads, capacity, dim)
    plain[:, 2, :, : shared - 2] = plain[:, 1, :, : shared - 2]  # one group: row 1 leads row 2
    keys, values = plain[1].clone(), plain[3].clone()
    plain[:, 2, :, :32] = float("nan")  # whole blocks that row 2 shares are read from row 1
    cache = torch.cat([lay_out_keys(plain[:2]), lay_out_values(plain[2:])])
    q, k, v = (randn(rows, h, dim) for h in (kv_heads * share, kv_heads, kv_heads))
    table = torch.stack([padding, leaders])
    ours = ops.decode_attention(Packed(q, k, v), cache, 1, table, shared, column, dim**-0.5)
    for row in range(rows):
        last = int(column - padding[row])
        keys[row, :, last], values[row, :, last] = k[row], v[row]
        own_keys, own_values = (t[row, None, :, : last + 1].double() for t in (keys, values))
        assert torch.equal(plain_keys(cache[1, row])[:, last], k[row])
        assert torch.equal(plain_values(cache[3, row])[:, last], v[row])
        query = q[row, None, :, None].double()
        exact = masked_attention(query, own_keys, own_values, None, dim**-0.5)
        assert_near(ours[row], exact[0, :, 0])


@needs_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_the_head_scores_as_the_plain_path(temperature: float, entropy_grad: bool) -> None:
    weight = randn(700, 24)
    hidden, targets = randn(150, 24), torch.randint(0, 700, (150,))
    results = []
    for cpp in (True, False):
        head = Head(lambda h: h @ weight.t(), lambda g: g @ weight, weight.dtype, 700)
        states = hidden.clone().requires_grad_()
        head = head._replace(cpp=cpp)
        out = head_scores(states, targets, head, temperature, entropy_grad)
        loss = out.logprobs.sum() + (3.0 * out.entropy.sum() if entropy_grad else 0.0)
        loss.backward()
        results.append((out.logprobs.detach(), out.entropy.detach(), states.grad))
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours, theirs, 2e-3)
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("banned", [None, [3, 299, 17]])
def test_draws_are_those_of_the_plain_path(temperature: float, banned: list[int] | None) -> None:
    logits, uniform = (3 * torch.randn(400, 300)).bfloat16(), torch.rand(400, dtype=torch.float64)
    ids = None if banned is None else torch.tensor(banned)
    tokens, logprobs = ops.draw(logits, uniform, temperature, ids)
    settings = SamplingSettings(temperature=temperature)
    theirs, expected = next_tokens(logits.float(), uniform, settings, ids)
    assert (tokens == theirs).float().mean() > 0.99  # a border may fall on the other side
    same = tokens == theirs
    torch.testing.assert_close(logprobs[same], expected[same], rtol=1e-5, atol=1e-5)


@needs_kernels
def test_a_banned_token_with_all_the_mass_is_not_drawn() -> None:
    logits = torch.full((1, 600), -200.0).bfloat16()
    logits[0, 5], logits[0, 400] = 300.0, 10.0
    tokens, _ = ops.draw(logits, torch.tensor([0.999999]), 1.0, torch.tensor([5]))
    assert tokens.tolist() == [400]


@needs_kernels
def test_numbers_that_are_not_finite_stay_so() -> None:
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0]]).bfloat16()
    assert ops.rms_norm(x, torch.ones(2).bfloat16(), 1e-5)[0].isnan().all()
    assert ops.silu_mul(x).isnan().any()
    assert ops.head_scores(x.clone(), torch.tensor([1, 1]), 1.0, False, None)[0].isnan().any()


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = FOLDER / "nowhere"
    usable, why = ops.status(folder)
    assert not usable
    assert why == "there is no C++ compiler (no-such-compiler); install g++"
    assert not ops.choose("auto", folder, torch.bfloat16, CPU)
    with pytest.raises(InputError, match="no C\\+\\+ compiler"):
        ops.choose("on", folder, torch.bfloat16, CPU)


def test_a_compiler_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match="false fails"):
        build.load(FOLDER / "elsewhere")


def test_other_dtypes_are_refused_when_asked_for() -> None:
    assert not ops.choose("auto", FOLDER, torch.float32, CPU)
    assert not ops.choose("off", FOLDER, torch.bfloat16, CPU)
    with pytest.raises(InputError, match="float32"):
        ops.choose("on", FOLDER, torch.float32, CPU)
