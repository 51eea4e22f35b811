"""The lean decode step: what it takes, and that it computes what the base's modules do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rlprompt.engines.decode_torch import lean_decoder
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.packed_linear import can_pack
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Group, Query
from tests.fixtures.runs import queries
from tests.fixtures.tiny import tiny_base

PACKS = can_pack(nn.Linear(4, 4, bias=False, dtype=torch.bfloat16).requires_grad_(False))
needs_packing = pytest.mark.skipif(not PACKS, reason="this machine does not pack bf16 weights")
SAMPLING = SamplingSettings(max_tokens=20, min_tokens=20)
TEXT = TextPrompt("be brief")


def policy_of(family: str, dtype: torch.dtype) -> Policy:
    """Without the C++ kernels, whose stand-ins have a decoder of their own."""
    base = replace(tiny_base(family, dtype), cpu_kernels="off")
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer), TEXT)


def generate(policy: Policy, lean: bool, asked: list[Query]) -> list[Group]:
    engine = NativeEngine(policy, NativeSettings(lean_decode=lean))
    engine.sync(TEXT)
    return engine.generate(asked, 4, SAMPLING, seed=3)


@needs_packing
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lean_steps_give_the_same_bits(family: str) -> None:
    policy = policy_of(family, torch.bfloat16)
    assert lean_decoder(policy.forward) is not None
    assert generate(policy, True, queries(3)) == generate(policy, False, queries(3))


@needs_packing
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "phi3", "mistral"])
def test_other_layers_are_left_to_the_modules(family: str) -> None:
    assert lean_decoder(policy_of(family, torch.bfloat16).forward) is None


def test_unpacked_weights_are_left_to_the_modules() -> None:
    assert lean_decoder(policy_of("llama", torch.float32).forward) is None


@needs_packing
def test_a_step_that_disagrees_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama", torch.bfloat16)
    own = generate(policy, False, queries(2))
    # What a family might add to Llama's layer without another module: the parts look the same.
    mlp = policy.forward.body.get_submodule("layers.0.mlp")
    original = mlp.forward
    mlp.forward = lambda x: 3.0 * original(x)
    changed = generate(policy, False, queries(2))
    assert [c.token_ids for g in changed for c in g.completions] != [
        c.token_ids for g in own for c in g.completions
    ]
    assert generate(policy, True, queries(2)) == changed


@needs_packing
def test_rows_that_finish_are_dropped_in_lean_steps_too() -> None:
    policy = policy_of("llama", torch.bfloat16)
    sampling = SamplingSettings(max_tokens=40, stop_token_ids=tuple(range(5, 60)))
    done = []
    for lean in (True, False):
        engine = NativeEngine(policy, NativeSettings(lean_decode=lean))
        engine.sync(TEXT)
        done.append(engine.generate(queries(3), 6, sampling, seed=1))
    assert len({len(c.token_ids) for g in done[0] for c in g.completions}) > 2
    assert done[0] == done[1]


@needs_packing
@pytest.mark.model
def test_the_real_model_decodes_lean() -> None:
    smollm2 = load_base(ModelSettings(cpu_kernels="off"))
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer), TEXT)
    assert lean_decoder(policy.forward) is not None
    asked = [Query(({"role": "user", "content": text},)) for text in ("Why is the sky blue?", "Hi")]
    assert generate(policy, True, asked) == generate(policy, False, asked)
