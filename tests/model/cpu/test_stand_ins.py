"""A stand-in is taken only where it computes what its module does, at the sizes of real models."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from rlprompt.errors import InputError
from rlprompt.kernels.cpu import ops
from rlprompt.model.base import FrozenBase, freeze
from rlprompt.model.cpu import fused_modules
from rlprompt.model.cpu.fused_modules import FusedAttention, FusedMLP, FusedNorm
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.prefix_forward import PrefixForward
from tests.fixtures.tiny import tiny_base, tiny_tokenizer

pytestmark = pytest.mark.skipif(
    not ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu")),
    reason="the CPU kernels cannot be used here",
)


OUTLIERS = 17
"""Every so many channels is one that a norm makes hundreds of times as large as the others."""
BEFORE_LAYERS = ("input_layernorm.weight", "pre_feedforward_layernorm.weight", "model.norm.weight")
READERS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))


def real_gemma3() -> FrozenBase:
    """A tiny Gemma 3 in bf16 whose norms have the weights of the real ones: small beside large."""
    config = Gemma3TextConfig(
        vocab_size=304,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=32,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        max_position_embeddings=512,
        initializer_range=0.1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                continue
            parameter.normal_(0.0, 0.3)
            if name.endswith(BEFORE_LAYERS):
                parameter[::OUTLIERS] = 400.0
        # What reads those channels takes little of them, so that they do not drown the others.
        for name, parameter in model.named_parameters():
            if name.endswith((*READERS, "embed_tokens.weight")):
                parameter[:, ::OUTLIERS] /= 400.0
    nn.Module.to(model, torch.bfloat16)
    return freeze(model, tiny_tokenizer(), "gemma3-like")


def kinds(forward: PrefixForward) -> set[type[nn.Module]]:
    return {type(module) for module in forward.body.modules()}


def test_gemma3_in_bf16_runs_with_the_kernels_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    forward = PrefixForward(real_gemma3())
    assert FusedNorm not in kinds(forward)
    lines = [r.getMessage() for r in caplog.records if "stay as they are" in r.getMessage()]
    assert len(lines) == 1 and "Gemma3RMSNorm" in lines[0]
    assert forward.cpp


def test_the_old_measure_took_gemmas_norm_for_llamas() -> None:
    """Of the largest value, what the stand-in gets wrong is little: that is how it slipped in."""
    norm: Any = real_gemma3().model.get_submodule("model.layers.0.input_layernorm")
    x = torch.randn(5, norm.weight.shape[0]).bfloat16()
    with torch.no_grad():
        theirs, ours = norm(x), FusedNorm(norm, norm.eps)(x)
    gap = (ours - theirs).float().abs()
    assert gap.max() <= 0.02 * theirs.float().abs().max()
    assert (gap / theirs.float().abs()).median() > 0.2
    with pytest.raises(ValueError):
        fused_modules._require_equal(ours, theirs)


class Clamped(nn.Module):
    """The MLP of a Llama, but what goes in is clamped, as some families do."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down, act = (
            self.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")
        )
        out: Tensor = down(act(gate(x).clamp(max=7.0)) * up(x).clamp(-7.0, 7.0))
        return out


class ClampedMLP(Clamped):
    """Named as the modules that have a stand-in."""


def test_a_module_that_clamps_large_values_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    base = tiny_base("llama", torch.bfloat16)
    for layer in base.model.get_decoder().layers:
        layer.mlp = ClampedMLP(layer.mlp)
    forward = PrefixForward(base)
    assert {FusedNorm, FusedAttention} <= kinds(forward) and FusedMLP not in kinds(forward)
    assert "2 ClampedMLP stay as they are" in caplog.text


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_could_be_replaced_still_is(family: str) -> None:
    found = kinds(PrefixForward(tiny_base(family, torch.bfloat16)))
    assert {FusedNorm, FusedMLP} <= found
    assert (FusedAttention in found) == (family != "qwen3")  # which has norms of its own there


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a kernel be wrong in a way that no module's check sees."""
    right = ops.silu_mul
    monkeypatch.setattr(fused_modules, "_require_equal", lambda ours, theirs: None)
    monkeypatch.setattr(ops, "silu_mul", lambda gates: -right(gates))


def test_wrong_kernels_are_left_out_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch)
    base = tiny_base("llama", torch.bfloat16)
    names = [name for name, _ in base.model.named_modules()]
    forward = PrefixForward(base)
    assert not forward.cpp and not forward.head.cpp
    assert not kinds(forward) & {FusedNorm, FusedMLP, FusedAttention}
    assert [name for name, _ in base.model.named_modules()] == names
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "the C++ kernels are off, because with them log-probabilities differ" in record.message
    plain = PrefixForward(replace(tiny_base("llama", torch.bfloat16), cpu_kernels="off"))
    ids = torch.arange(20)
    with torch.no_grad():
        ours, theirs = (f.prefill(f.embed(ids)) for f in (forward, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours.values, theirs.values, strict=True))


def test_wrong_kernels_that_are_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    base = replace(tiny_base("llama", torch.bfloat16), cpu_kernels="on")
    with pytest.raises(InputError, match="cpu_kernels is on, but with the C") as caught:
        PrefixForward(base)
    assert "family" not in str(caught.value)


def test_undoing_gives_the_modules_back() -> None:
    base = tiny_base("llama", torch.bfloat16)
    forward = PrefixForward(replace(base, cpu_kernels="off"))
    before = dict(copy.copy(list(base.model.named_modules())))
    fused = fused_modules.fuse_modules(forward.body)
    assert len(fused) == 11
    fused.undo()
    assert len(fused) == 0
    assert dict(base.model.named_modules()) == before
    assert not any("forward" in vars(layer) for layer in base.model.modules())
