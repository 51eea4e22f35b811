"""The fingerprint: blind to dtype, wrapping and device, awake to any change of a weight."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase
from rlprompt.model.fingerprint import fingerprint, weight_digests
from tests.fixtures.tiny import FAMILIES, tiny_model


def test_same_weights_same_fingerprint() -> None:
    assert fingerprint(tiny_model("llama", seed=3)) == fingerprint(tiny_model("llama", seed=3))
    assert fingerprint(tiny_model("llama", seed=3)) != fingerprint(tiny_model("llama", seed=4))


def test_is_64_hex_digits() -> None:
    digest = fingerprint(nn.Linear(3, 2))
    assert len(digest) == 64
    assert int(digest, 16) >= 0


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_and_bfloat16_loads_agree(family: str) -> None:
    float32 = tiny_model(family)
    bfloat16 = nn.Module.to(copy.deepcopy(float32), torch.bfloat16)
    assert fingerprint(float32) == fingerprint(bfloat16)
    assert weight_digests(float32).exact != weight_digests(bfloat16).exact


def test_bfloat16_checkpoint_read_in_float32_agrees() -> None:
    stored = tiny_model("llama", torch.bfloat16)
    assert fingerprint(nn.Module.to(copy.deepcopy(stored), torch.float32)) == fingerprint(stored)


def test_one_changed_weight_changes_it() -> None:
    model = tiny_model("qwen3")
    before = fingerprint(model)
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        weight[3, 5] *= 1.01
    assert fingerprint(model) != before


def test_exact_digest_sees_what_bfloat16_cannot() -> None:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, 1.0)
    before = weight_digests(model)
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    after = weight_digests(model)
    assert after.fingerprint == before.fingerprint
    changed = [name for name in after.exact if after.exact[name] != before.exact[name]]
    assert changed == ["weight"]


def test_two_swapped_layers_change_it() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    layers[0], layers[1] = layers[1], layers[0]
    assert fingerprint(model) != before


def test_wrappers_and_replaced_modules_do_not_change_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    class OtherLinear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias
            self.register_buffer("scratch", torch.ones(7), persistent=False)

    model = tiny_model("qwen2")
    before = fingerprint(model)
    assert fingerprint(Wrapped(model)) == before
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, OtherLinear(child))
    assert fingerprint(model) == before


def test_covers_persistent_buffers_tied_weights_once_and_odd_tensors() -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())  # not contiguous
    model.tied = model.first
    model.register_buffer("scalar", torch.tensor(2.5))
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("empty", torch.empty(0, 4))
    model.register_buffer("temporary", torch.ones(3), persistent=False)
    assert sorted(weight_digests(model).exact) == ["empty", "first", "mask", "scalar"]
    before = fingerprint(model)
    model.get_buffer("mask")[1] = True
    assert fingerprint(model) != before


def test_weights_without_data_are_refused() -> None:
    with pytest.raises(InputError, match=r"weight .* was never loaded .*meta device"):
        fingerprint(nn.Linear(2, 2, device="meta"))


@pytest.mark.gpu
def test_device_does_not_change_it() -> None:
    model = tiny_model("llama")
    assert fingerprint(nn.Module.to(copy.deepcopy(model), "cuda")) == fingerprint(model)


@pytest.mark.model
def test_real_model_takes_less_than_two_seconds(smollm2: FrozenBase) -> None:
    start = time.perf_counter()
    assert fingerprint(smollm2.model) == smollm2.fingerprint
    assert time.perf_counter() - start < 2.0
