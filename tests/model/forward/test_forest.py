"""Rows behind prefixes of their own: the layout, and attention against a tree per prompt."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rlprompt.engines.cache import DecodeCache, DecodeContext
from rlprompt.kernels.oracle import rms_ratio
from rlprompt.model.forward.attention import CausalContext, LayerCall
from rlprompt.model.forward.forest import Forest, ForestContext, build_forest
from rlprompt.model.forward.tree import PaddedRows, TreeContext, build_tree
from rlprompt.types import PrefixKV
from tests.fixtures.attention import DEVICE
from tests.fixtures.prompts import make
from tests.invariants.oracle import policy_of

CPU = torch.device("cpu")
KV_HEADS, SHARE, DIM = 2, 2, 8
LENGTHS, PREFIXES, PROMPTS = [3, 1, 5, 2], [4, 0, 7], [2, 0, 1, 0]
WAYS = [(None, None), (4, 1.5)]


def _forest() -> Forest:
    return build_forest(LENGTHS, DEVICE, PREFIXES, PROMPTS)


def _made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def _call(tokens: int, window: int | None, softcap: float | None) -> LayerCall:
    query, key, value = (_made(1, n, tokens, DIM) for n in (KV_HEADS * SHARE, KV_HEADS, KV_HEADS))
    return LayerCall(0, query, key, value, DIM**-0.5, window, softcap)


def _prefixes() -> list[PrefixKV]:
    return [PrefixKV([_made(KV_HEADS, n, DIM)], [_made(KV_HEADS, n, DIM)]) for n in PREFIXES]


def test_a_row_is_two_ranges_of_keys() -> None:
    forest = build_forest(LENGTHS, CPU, PREFIXES, PROMPTS)
    assert forest.spans.tolist() == [[0, 3, 15, 7], [3, 1, 11, 4], [4, 5, 15, 0], [9, 2, 11, 4]]
    assert forest.positions.tolist() == [7, 8, 9, 4, 0, 1, 2, 3, 4, 4, 5]
    keys = torch.arange(22.0)[:, None, None]
    rows = forest.unfold(keys)[:, 0, :, 0]
    assert rows.shape == forest.mask.shape == (4, 10)
    seen = [row[mask].tolist() for row, mask in zip(rows, forest.mask, strict=True)]
    assert seen == [
        [15, 16, 17, 18, 19, 20, 21, 0, 1, 2],
        [11, 12, 13, 14, 3],
        [4, 5, 6, 7, 8],
        [11, 12, 13, 14, 9, 10],
    ]


def test_rows_may_have_no_prefix() -> None:
    forest = build_forest([2, 1], CPU)
    assert forest.spans.tolist() == [[0, 2, 0, 0], [2, 1, 0, 0]]
    assert forest.positions.tolist() == [0, 1, 0]
    assert forest.mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("lengths", [[], [2, 0]], ids=str)
def test_rows_without_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build_forest(lengths, CPU)


def test_prefixes_of_another_forest_are_refused() -> None:
    with pytest.raises(ValueError, match="prefixes of"):
        ForestContext(_forest(), _prefixes()[:2])
    with pytest.raises(ValueError, match="prefixes of"):
        ForestContext(_forest(), _prefixes()[::-1])


def test_an_adapter_is_refused() -> None:
    policy = policy_of("llama")
    with torch.no_grad():
        prefix = policy.prefix(make("lora", policy))
    with pytest.raises(ValueError, match="adapter"):
        ForestContext(build_forest([2], CPU, [prefix.num_tokens], [0]), [prefix])


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "triton"])
@pytest.mark.parametrize(("window", "softcap"), WAYS, ids=["plain", "window"])
def test_every_row_attends_as_in_a_tree_of_its_own(
    fused: bool, window: int | None, softcap: float | None
) -> None:
    if fused:
        pytest.importorskip("triton")
        if DEVICE.type == "cuda":
            pytest.skip("float64 tiles do not fit a GPU")
    prefixes, call = _prefixes(), _call(sum(LENGTHS), window, softcap)
    context = ForestContext(_forest(), prefixes, fused=fused)
    out = context.attend(call)
    (keys,), (values,) = context.query_keys, context.query_values
    first = 0
    for row, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        own = slice(first, first + length)
        first += length
        tree = build_tree([[0] * length], [[]], PREFIXES[prompt], DEVICE)
        parts = [tensor[:, :, own] for tensor in (call.query, call.key, call.value)]
        alone = LayerCall(0, parts[0], parts[1], parts[2], call.scaling, window, softcap)
        expected = TreeContext(tree, prefixes[prompt], fused=False).attend(alone)
        assert rms_ratio(expected, out[:, :, own]) < 1e-13
        mask = context.mask[row]
        for kept, prefix, mine in (
            (keys, prefixes[prompt].keys, parts[1]),
            (values, prefixes[prompt].values, parts[2]),
        ):
            assert torch.equal(kept[row][:, mask], torch.cat([prefix[0], mine[0]], 1))


@pytest.mark.parametrize(("window", "softcap"), WAYS, ids=["plain", "window"])
def test_decoding_behind_several_prefixes_is_alike(
    window: int | None, softcap: float | None
) -> None:
    """By the Triton kernels, by masks, and by plain attention to each row's keys in order."""
    pytest.importorskip("triton")
    if DEVICE.type == "cuda":
        pytest.skip("float64 tiles do not fit a GPU")
    prefixes = _prefixes()
    context = ForestContext(_forest(), prefixes, fused=False)
    context.attend(_call(sum(LENGTHS), window, softcap))
    cache = DecodeCache(context, prefixes[0].cut(0), copies=2, max_tokens=3)
    (keys,), (values,) = context.query_keys, context.query_values
    so_far = [
        [part[row // 2][:, context.mask[row // 2]] for part in (keys, values)] for row in range(8)
    ]
    for _ in range(3):
        new = _call(cache.num_rows, window, softcap)
        plain = DecodeContext(cache, fused=False).attend(new)
        fused = DecodeContext(cache, fused=True).attend(new)
        torch.testing.assert_close(fused, plain, atol=1e-12, rtol=1e-12)
        for row, parts in enumerate(so_far):
            before = PrefixKV([parts[0]], [parts[1]])
            one = [t[:, :, row : row + 1] for t in (new.query, new.key, new.value)]
            alone = LayerCall(0, one[0], one[1], one[2], new.scaling, window, softcap)
            expected = CausalContext(before).attend(alone)
            assert rms_ratio(expected, plain[:, :, row : row + 1]) < 1e-13
            so_far[row] = [torch.cat([t, o[0]], 1) for t, o in zip(parts, one[1:], strict=True)]
        cache.advance()


def test_every_tensor_moves_to_the_device() -> None:
    """`meta` stands for an accelerator."""
    forest = build_forest(LENGTHS, torch.device("meta"), PREFIXES, PROMPTS)
    for field in fields(Forest):
        moved = getattr(forest, field.name)
        tensors = [moved]
        if isinstance(moved, PaddedRows):
            tensors = [getattr(moved, part.name) for part in fields(PaddedRows)]
        assert all(t.device.type == "meta" for t in tensors if isinstance(t, Tensor))
