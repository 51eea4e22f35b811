"""Which attention is chosen, and that forwards come out the same through the kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rlprompt.engines.cache import DecodeCache, DecodeContext
from rlprompt.kernels import dispatch
from rlprompt.kernels.operands import Heads, Scoring
from rlprompt.kernels.oracle import rms_ratio
from rlprompt.kernels.self_check import Kind
from rlprompt.model.forward import attention as attention_module
from rlprompt.model.forward.attention import LayerCall
from rlprompt.model.forward.tree import TokenTree, TreeContext, build_tree
from rlprompt.types import PrefixKV
from tests.fixtures.attention import DEVICE
from tests.fixtures.runs import sampled_batch, tiny_policy

pytest.importorskip("triton")

KV_HEADS, SHARE, DIM, PREFIX = 2, 2, 8, 5
QUERIES = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
COMPLETIONS = [[[1, 2], [3]], [], [[4, 5, 6, 7], [8, 9], [1]]]


def _tree(completions: list[list[list[int]]]) -> TokenTree:
    return build_tree(QUERIES, completions, PREFIX, DEVICE)


def _attend(
    tree: TokenTree, fused: bool, window: int | None, softcap: float | None
) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one layer on random tensors, the same ones each time."""
    torch.manual_seed(0)
    tokens = tree.num_tokens

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    heads = KV_HEADS * SHARE
    packed = [made(1, n, tokens, DIM) for n in (heads, KV_HEADS, KV_HEADS)]
    prefix = [made(KV_HEADS, PREFIX, DIM) for _ in range(2)]
    context = TreeContext(tree, PrefixKV([prefix[0]], [prefix[1]]), keep_queries=True, fused=fused)
    call = LayerCall(0, packed[0], packed[1], packed[2], DIM**-0.5, window, softcap)
    out = context.attend(call)
    grads = torch.autograd.grad(out, [*packed, *prefix], torch.randn_like(out))
    return out, [*grads, context.query_keys[0], context.query_values[0]]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 tiles do not fit a GPU")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, 1.5)])
@pytest.mark.parametrize("completions", [COMPLETIONS, [[], [], []]], ids=["training", "prefill"])
def test_a_tree_attends_alike_both_ways(
    completions: list[list[list[int]]], window: int | None, softcap: float | None
) -> None:
    tree = _tree(completions)
    plain, plain_grads = _attend(tree, False, window, softcap)
    fused, fused_grads = _attend(tree, True, window, softcap)
    assert fused.shape == plain.shape
    errors = [
        rms_ratio(a, b) for a, b in zip([plain, *plain_grads], [fused, *fused_grads], strict=True)
    ]
    assert max(errors) < 1e-13, errors


@pytest.mark.slow
def test_log_probabilities_and_the_prompts_gradient_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy(device=DEVICE)
    batch = sampled_batch(policy, group_size=2, count=2)
    scores, grads = [], []
    for fused in (False, True):
        monkeypatch.setattr(attention_module, "uses_triton", lambda *_, on=fused: on)
        prefix = policy.prefix()
        queries = [group.query for group in batch.groups]
        rows = [group.completions for group in batch.groups]
        out = policy.logprobs(policy.tree(queries, rows, prefix), prefix)
        scores.append(out.logprobs)
        grads.append(torch.autograd.grad(out.logprobs.square().sum(), policy.parameters()))
    torch.testing.assert_close(scores[1], scores[0], atol=2e-5, rtol=2e-5)
    for plain, fused_grad in zip(*grads, strict=True):
        assert rms_ratio(plain, fused_grad) < 1e-4


def test_decoding_over_a_cache_is_alike() -> None:
    torch.manual_seed(0)
    tree = _tree([[], [], []])
    keys, values = ([torch.randn(KV_HEADS, PREFIX, DIM, device=DEVICE)] for _ in range(2))
    prefix = PrefixKV(keys, values)
    heads = KV_HEADS * SHARE

    def call(tokens: int) -> LayerCall:
        tensors = [
            torch.randn(1, n, tokens, DIM, device=DEVICE) for n in (heads, KV_HEADS, KV_HEADS)
        ]
        return LayerCall(0, tensors[0], tensors[1], tensors[2], DIM**-0.5, None, None)

    context = TreeContext(tree, prefix, keep_queries=True, fused=False)
    context.attend(call(tree.num_tokens))
    cache = DecodeCache(context, prefix, copies=2, max_tokens=4)
    for step in range(3):
        new = call(cache.num_rows)
        plain = DecodeContext(cache, fused=False).attend(new)
        fused = DecodeContext(cache, fused=True).attend(new)
        torch.testing.assert_close(fused, plain, atol=2e-5, rtol=2e-5)
        cache.column += 1
        if step == 0:
            cache.drop(torch.tensor([False, True, True, False, False, False], device=DEVICE))


def uses(device: torch.device, dtype: torch.dtype, dim: int, kind: Kind = "decode") -> bool:
    return dispatch.uses_triton(kind, device, dtype, Heads(4, 2, dim), Scoring(dim**-0.5))


GPU = torch.device("cuda")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GPU that is new enough, as far as it is asked about itself."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    dispatch.uses_triton.cache_clear()
    dispatch.uses_triton_head.cache_clear()
    yield
    dispatch.uses_triton.cache_clear()
    dispatch.uses_triton_head.cache_clear()


def test_a_cpu_computes_in_matrix_products() -> None:
    assert not uses(torch.device("cpu"), torch.float32, 64)


@pytest.mark.usefixtures("_gpu")
def test_a_gpu_without_fitting_kernels_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "attention_fault", lambda *_: None)
    with caplog.at_level(logging.INFO, logger="rlprompt.kernels.dispatch"):
        assert uses(GPU, torch.bfloat16, 256)
        assert not uses(GPU, torch.bfloat16, 512)
        assert not uses(GPU, torch.float32, 256)
        assert not uses(GPU, torch.float64, 64)
        assert not uses(GPU, torch.float64, 64)  # said once
    assert len(caplog.records) == 4
    assert "head dim 512 is beyond 256" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    dispatch.uses_triton.cache_clear()
    assert not uses(GPU, torch.bfloat16, 64)


@pytest.mark.usefixtures("_gpu")
def test_kernels_that_are_wrong_are_not_used_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "attention_fault", lambda *_: "their outputs differ")
    monkeypatch.setattr(dispatch, "head_fault", lambda *_: "their outputs differ")
    for _ in range(3):
        assert not uses(GPU, torch.bfloat16, 64)
        assert not uses(GPU, torch.bfloat16, 64, "tree")
        assert not dispatch.uses_triton_head(GPU, torch.bfloat16, 304, None)
    assert [record.getMessage() for record in caplog.records] == [
        "attention (decode): written out, which takes more memory, because their outputs differ",
        "attention (tree): written out, which takes more memory, because their outputs differ",
        "logits: scored in PyTorch, because of the Triton kernels their outputs differ",
    ]
