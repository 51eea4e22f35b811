"""Decode steps in one call: where they are used, and that they give the modules' own bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlprompt.engines.decode_cpp import CppDecoder, _products, cpp_decoder
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.cpu import ops
from rlprompt.model.base import FrozenBase
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.files.fetch import cache_dir
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Group, Query
from tests.fixtures.runs import queries
from tests.fixtures.tiny import tiny_base

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")
SAMPLING = SamplingSettings(max_tokens=20, min_tokens=20)
TEXT = TextPrompt("be brief")


def policy_of(family: str) -> Policy:
    base = tiny_base(family, torch.bfloat16)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer), TEXT)


def generate(
    policy: Policy, one_call: bool, sampling: SamplingSettings = SAMPLING
) -> tuple[Group, ...]:
    return drawn(policy, TEXT, one_call, sampling)


def drawn(
    policy: Policy, prompt: Prompt, one_call: bool, sampling: SamplingSettings = SAMPLING
) -> tuple[Group, ...]:
    engine = NativeEngine(policy, NativeSettings(cpp_decode=one_call))
    engine.sync(prompt)
    return engine.generate(queries(3), 4, sampling, seed=3).groups


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_steps_give_the_bits_of_the_modules(family: str) -> None:
    policy = policy_of(family)
    assert cpp_decoder(policy.forward) is not None
    assert generate(policy, True) == generate(policy, False)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    policy = policy_of("llama")
    expected = generate(policy, False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert generate(policy, True) == expected
    finally:
        torch.set_num_threads(before)


@needs_kernels
@pytest.mark.parametrize("which", ["all", "one"])
def test_without_the_kernels_product_steps_are_made_by_onednn(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of("llama")
    expected = generate(policy, False)
    layers: Any = policy.forward.body.layers
    packed = [layers[0].mlp.down_proj.packed]
    if which == "all":
        packed = [p for layer in layers for p in _products(layer)]
    for product in packed:
        monkeypatch.setattr(product, "_chunk", 0)
    decoder = cpp_decoder(policy.forward, keep_bytes=2**20)
    assert decoder is not None and decoder.store is None
    assert generate(policy, True) == expected


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("targets", [None, ("v_proj", "down_proj"), ("o_proj",)], ids=str)
def test_under_lora_steps_give_the_bits_of_its_hooks(
    family: str, targets: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(family)
    settings = AdapterSettings(text="be brief", method=LoRASettings(rank=4, target_modules=targets))
    policy.prompt = AdapterPrompt.create(settings, policy, seed=0)
    for parameter in policy.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    steps = []

    def counted(decoder: CppDecoder, *arguments: Any) -> torch.Tensor:
        steps.append(decoder)
        return hidden(decoder, *arguments)

    hidden = CppDecoder.hidden
    monkeypatch.setattr(CppDecoder, "hidden", counted)
    plain, under = (drawn(policy, policy.prompt, one_call) for one_call in (False, True))
    assert len(steps) > 10
    assert under == plain
    assert under != drawn(policy, TEXT, True)


@needs_kernels
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "phi3", "mistral"])
def test_other_layers_are_left_to_the_modules(family: str) -> None:
    assert cpp_decoder(policy_of(family).forward) is None


@needs_kernels
def test_rows_that_finish_are_dropped() -> None:
    policy = policy_of("llama")
    sampling = SamplingSettings(max_tokens=40, stop_token_ids=tuple(range(5, 60)))
    done = [generate(policy, one_call, sampling) for one_call in (True, False)]
    assert len({len(c.token_ids) for g in done[0] for c in g.completions}) > 2
    assert done[0] == done[1]


@needs_kernels
def test_a_step_that_disagrees_is_not_used() -> None:
    policy = policy_of("llama")
    own = generate(policy, False)
    mlp = policy.forward.body.get_submodule("layers.0.mlp")
    original = mlp.forward
    mlp.forward = lambda x: 3.0 * original(x)
    changed = generate(policy, False)
    assert changed != own
    assert generate(policy, True) == changed


@needs_kernels
def test_a_layer_wrapped_later_is_noticed() -> None:
    policy = policy_of("llama")
    engine = NativeEngine(policy)
    engine.sync(TEXT)
    before = engine.generate(queries(2), 2, SAMPLING, seed=0)
    attention = policy.forward.body.get_submodule("layers.1.self_attn")
    attention.q_proj = _Doubled(attention.get_submodule("q_proj"))
    engine.sync(TEXT)
    wrapped = engine.generate(queries(2), 2, SAMPLING, seed=0)
    fresh = NativeEngine(policy, NativeSettings(cpp_decode=False))
    fresh.sync(TEXT)
    assert wrapped == fresh.generate(queries(2), 2, SAMPLING, seed=0)
    assert wrapped != before


class _Doubled(torch.nn.Module):
    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2.0 * self.linear(x)
        return out


@needs_kernels
@pytest.mark.model
def test_the_real_model_decodes_in_one_call(smollm2: FrozenBase) -> None:
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer), TEXT)
    assert cpp_decoder(policy.forward) is not None
    asked = [Query(({"role": "user", "content": text},)) for text in ("Why is the sky blue?", "Hi")]
    done = []
    for one_call in (True, False):
        engine = NativeEngine(policy, NativeSettings(cpp_decode=one_call))
        engine.sync(TEXT)
        done.append(engine.generate(asked, 4, SAMPLING, seed=3).groups)
    assert done[0] == done[1]


def test_kernels_can_be_turned_off() -> None:
    base = replace(tiny_base("llama", torch.bfloat16), cpu_kernels="off")
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer), TEXT)
    assert cpp_decoder(policy.forward) is None
    assert not policy.forward.head.cpp
