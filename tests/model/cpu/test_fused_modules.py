"""Stand-ins of norms, attention and gated layers: what they hold in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rlprompt.kernels.cpu import ops
from rlprompt.model.cpu.fused_modules import FusedAttention, FusedMLP
from rlprompt.model.cpu.packed_linear import PackedLinear
from rlprompt.model.files.fetch import cache_dir
from rlprompt.policy import Policy
from tests.fixtures.runs import sampled_batch, tiny_policy

pytestmark = pytest.mark.skipif(
    not ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu")),
    reason="the CPU kernels cannot be used here",
)

JOINED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def joined_layers(policy: Policy) -> Iterator[PackedLinear]:
    """The layers whose products run as one."""
    for module in policy.forward.body.modules():
        if isinstance(module, FusedAttention | FusedMLP):
            for name, child in module.named_children():
                if name in JOINED:
                    assert isinstance(child, PackedLinear)
                    yield child


def test_what_is_joined_is_packed_once() -> None:
    """The layers were packed one by one to be compared with their stand-in."""
    policy = tiny_policy("llama", torch.bfloat16)
    layers = list(joined_layers(policy))
    assert layers
    sampled_batch(policy)
    assert all(layer.packed._forward is None for layer in layers)
    assert all(layer.packed._transposed is None for layer in layers)


def test_a_layer_that_gave_its_copy_back_packs_again() -> None:
    layer = PackedLinear(nn.Linear(64, 32, bias=False).bfloat16().requires_grad_(False))
    x = torch.randn(3, 64).bfloat16()
    grad = torch.randn(3, 32).bfloat16()
    before = layer(x), layer.packed_input_gradient(grad)
    layer.packed.forget()
    assert torch.equal(layer(x), before[0])
    assert torch.equal(layer.packed_input_gradient(grad), before[1])
