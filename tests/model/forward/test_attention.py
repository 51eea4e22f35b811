"""The attention hook: what it passes on, and what it refuses to ignore."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rlprompt.errors import InputError
from rlprompt.model.forward.attention import (
    ATTENTION_NAME,
    CausalContext,
    LayerCall,
    register,
    windowed,
)


class _Layer(nn.Module):
    def __init__(self, layer_idx: int | None = 3) -> None:
        super().__init__()
        self.layer_idx = layer_idx


class _Recorder:
    products = None

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []

    def attend(self, call: LayerCall) -> Tensor:
        self.calls.append(call)
        return call.query


def _attend(context: Any = None, layer: nn.Module | None = None, **given: Any) -> Any:
    register()
    query = torch.randn(1, 4, 5, 8)
    key, value = torch.randn(2, 1, 2, 5, 8)
    attention = AttentionInterface()[ATTENTION_NAME]
    arguments = {"attention_mask": None, **given}
    if context is not None:
        arguments["attention_context"] = context
    return attention(layer or _Layer(), query, key, value, **arguments)


def test_the_layer_reaches_the_context_with_its_settings() -> None:
    context = _Recorder()
    out, weights = _attend(context, scaling=0.3, sliding_window=7, softcap=30.0)
    (call,) = context.calls
    assert (call.layer, call.scaling, call.window, call.softcap) == (3, 0.3, 7, 30.0)
    assert torch.equal(out, call.query.transpose(1, 2))
    assert weights is None


def test_scaling_defaults_to_the_head_dimension() -> None:
    context = _Recorder()
    _attend(context)
    assert context.calls[0].scaling == 8**-0.5
    assert context.calls[0].window is None


@pytest.mark.parametrize(
    "harmless",
    [
        {"position_ids": torch.arange(5)[None]},
        {"cache_position": torch.arange(5)},
        {"use_cache": False},
        {"use_cache": True},
        {"is_causal": True},
        {"is_causal": None},
        {"output_attentions": False},
        {"s_aux": None},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(harmless: dict[str, Any]) -> None:
    context = _Recorder()
    _attend(context, **harmless)
    assert len(context.calls) == 1


@pytest.mark.parametrize(
    "meaningful",
    [
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1, 4, 5, 5)},
        {"alibi": torch.zeros(4)},
        {"attention_mask": torch.ones(1, 1, 5, 5)},
        {"is_causal": False},
        {"output_attentions": True},
        {"cu_seq_lens_q": torch.tensor([0, 5])},
        {"block_indices": torch.tensor([0])},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_changes_something_is_refused_by_name(meaningful: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(meaningful))):
        _attend(_Recorder(), **meaningful)


def test_a_call_without_context_is_refused() -> None:
    with pytest.raises(InputError, match="without its context"):
        _attend()


def test_a_layer_without_number_is_refused() -> None:
    with pytest.raises(InputError, match="layer_idx"):
        _attend(_Recorder(), _Layer(None))


def test_windows_count_the_own_position() -> None:
    mask = torch.ones(1, 1, 10, dtype=torch.bool)
    seen = windowed(mask, torch.tensor([[8]]), torch.arange(10)[None], 3)
    assert seen[0, 0].nonzero().flatten().tolist() == [6, 7, 8, 9]
    assert windowed(mask, torch.tensor([[8]]), torch.arange(10)[None], None) is mask


@pytest.mark.parametrize("window", [None, 1, 3, 99])
def test_causal_context_is_causal_and_records(window: int | None) -> None:
    context = CausalContext()
    query = torch.randn(1, 4, 6, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 6, 8, dtype=torch.float64)
    out = context.attend(LayerCall(0, query, key, value, 0.4, window, None))
    distance = torch.arange(6)[:, None] - torch.arange(6)[None]
    seen = (distance >= 0) & (distance < (window or 99))
    expected = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(out, expected)
    assert context.layers == [(0, window)]
    prefix = context.prefix()
    assert torch.equal(prefix.keys[0], key[0])
    assert torch.equal(prefix.values[0], value[0])
    assert prefix.num_tokens == 6
