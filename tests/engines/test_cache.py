"""The decode cache: layout, growth and dropped rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from rlprompt.engines.cache import DecodeCache
from rlprompt.kernels.cpu import ops
from rlprompt.kernels.cpu.cache_layout import LANES, plain_keys, plain_values
from rlprompt.kernels.operands import Packed
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.tree import TreeContext
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.tiny import tiny_base
from tests.invariants.oracle import QUERIES, TEXT, policy_of

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")


def _bf16_policy(kernels: Literal["on", "off"]) -> Policy:
    base = replace(tiny_base("llama", torch.bfloat16), cpu_kernels=kernels)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


def _cache(policy: Policy, copies: int, max_tokens: int) -> DecodeCache:
    with torch.no_grad():
        prefix = policy.prefix(TextPrompt(TEXT))
        tree = policy.tree(QUERIES, [[], [], []], prefix, TextPrompt(TEXT))
        context = TreeContext(tree, prefix, keep_queries=True)
        policy.forward.hidden(policy.embed_ids(tree.token_ids), tree.positions, context)
        return DecodeCache(context, prefix, copies, max_tokens)


def test_dropped_rows_leave_the_others_whole() -> None:
    cache = _cache(policy_of("llama"), copies=4, max_tokens=3)
    rows = torch.arange(cache.num_rows)
    layers = policy_of("llama").base.num_layers
    end = cache.column
    before = [[t[:, :, :end].clone() for t in cache.layer(i)] for i in range(layers)]
    positions, seen = cache.positions().clone(), cache.seen(5)
    generator = torch.Generator().manual_seed(0)
    while cache.num_rows:
        finished = torch.rand(cache.num_rows, generator=generator) < 0.3
        if cache.num_rows < 3:
            finished[:] = True
        expected = set(rows[~finished].tolist())
        rows = rows[cache.drop(finished)]
        assert set(rows.tolist()) == expected
        assert cache.num_rows == len(rows)
        assert torch.equal(cache.positions(), positions[rows])
        assert torch.equal(cache.seen(5), seen[rows])
        for i in range(layers):
            for now, then in zip(cache.layer(i), before[i], strict=True):
                assert torch.equal(now[:, :, :end], then[rows])


def test_cache_rows_hold_prefix_and_query_at_their_positions() -> None:
    policy = policy_of("llama")
    cache = _cache(policy, copies=2, max_tokens=1)
    with torch.no_grad():
        prefix = policy.prefix(TextPrompt(TEXT))
        for place, asked in enumerate(QUERIES):
            ids = [*policy.head_ids, *policy.slot_ids(TEXT), *policy.tail_ids(asked.messages)]
            whole = policy.prefill(policy.embed(ids))
            for row in (2 * place, 2 * place + 1):
                assert cache.positions()[row] == len(ids)
                columns = cache.seen(None)[row, 0].nonzero().flatten()
                columns = columns[columns < cache.column]
                for layer in range(policy.base.num_layers):
                    key, value = cache.layer(layer)
                    torch.testing.assert_close(key[row][:, columns], whole.keys[layer])
                    torch.testing.assert_close(value[row][:, columns], whole.values[layer])
    assert prefix.num_tokens == cache.prefix_tokens


def test_growing_keeps_what_is_there() -> None:
    cache = _cache(policy_of("llama"), copies=2, max_tokens=100)
    start = cache.column
    before = [t[:, :, :start].clone() for t in cache.layer(1)]
    cache.drop(torch.tensor([False, True, False, False, False, False]))
    rows = torch.tensor([0, 5, 2, 3, 4])
    for column in range(start, start + 100):
        cache.reserve()
        for tensor in cache.layer(1):
            tensor[:, :, column] = column
        cache.advance()
    for now, then in zip(cache.layer(1), before, strict=True):
        assert torch.equal(now[:, :, :start], then[rows])
        written = torch.arange(start, start + 100).to(now.dtype)
        assert torch.equal(now[2, 1, start:, 3], written)
        assert now.shape[2] == start + 100


def _whole_rows(cache: DecodeCache, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer in plain order, with the columns that leaders hold for others."""
    rows = []
    for part in cache.layer(layer):
        whole = part.clone()
        for row in range(cache.num_rows):
            padding, leader = cache.table[:, row].tolist()
            end = (cache.shared - padding) // LANES * LANES
            whole[row, :, :end] = part[leader, :, :end]
        rows.append(whole)
    return plain_keys(rows[0]), plain_values(rows[1])


def _assert_same_rows(cache: DecodeCache, expected: DecodeCache, layers: int) -> None:
    for layer in range(layers):
        ours = _whole_rows(cache, layer)
        for row in range(cache.num_rows):
            columns = expected.seen(None)[row, 0, : expected.column].nonzero().flatten()
            for own, theirs in zip(ours, expected.layer(layer), strict=True):
                # The two paths round their attention differently, so from the second layer on their
                # keys are near each other and not equal.
                near = 0.0 if layer == 0 else 0.05
                seen = own[row, :, : len(columns)]
                torch.testing.assert_close(seen, theirs[row][:, columns], rtol=0.0, atol=near)


@needs_kernels
def test_rows_for_the_kernels_hold_the_same_in_their_order() -> None:
    policy, plain = (_bf16_policy(choice) for choice in ("on", "off"))
    layers = policy.base.num_layers
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        cache, expected = _cache(policy, copies=5, max_tokens=40), _cache(plain, 5, 40)
        while cache.num_rows:
            assert all(
                cache.has_cpp_layout(i) and not expected.has_cpp_layout(i) for i in range(layers)
            )
            _assert_same_rows(cache, expected, layers)
            finished = torch.rand(cache.num_rows, generator=generator) < 0.4
            finished[0] = True  # a leader, always
            assert torch.equal(cache.drop(finished), expected.drop(finished))


@needs_kernels
def test_what_rows_share_stands_in_their_leaders_only() -> None:
    cache = _cache(_bf16_policy("on"), copies=3, max_tokens=4)
    shortest = int(cache.positions().min()) // LANES * LANES
    assert shortest >= LANES
    cache.data[:, [1, 2, 4, 5, 7, 8], :, :shortest] = torch.nan
    for layer in range(cache.data.shape[0] // 2):
        assert not any(part.isnan().any() for part in _whole_rows(cache, layer))
    cache.drop(torch.tensor([True, False, False, True, False, False, True, True, False]))
    for layer in range(cache.data.shape[0] // 2):
        assert not any(part.isnan().any() for part in _whole_rows(cache, layer))


@needs_kernels
def test_growing_keeps_columns_in_the_order_of_the_kernels() -> None:
    policy = _bf16_policy("on")
    cache = _cache(policy, copies=2, max_tokens=300)
    start, layers = cache.column, policy.base.num_layers
    shape = (policy.base.num_kv_heads, policy.base.head_dim)
    written = []
    for _ in range(300):
        cache.reserve()
        new = [torch.randn(cache.num_rows, *shape).bfloat16() for _ in range(3)]
        for layer in range(layers):
            cache.attend(layer, Packed(new[0], new[1], new[2]), 0.1)
        written.append(new[1:])
        cache.advance()
    for layer in range(layers):
        keys, values = _whole_rows(cache, layer)
        for row in range(cache.num_rows):
            place = torch.arange(start, start + 300) - cache.padding[row]
            for tensor, part in ((keys, 0), (values, 1)):
                expected = torch.stack([step[part][row] for step in written], 1)
                assert torch.equal(tensor[row][:, place], expected)
