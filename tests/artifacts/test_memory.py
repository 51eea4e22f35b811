"""A prompt of any kind goes into tensors and JSON, and comes back as what it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load, save

from rlprompt.artifacts.memory import PackedPrompt
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.runs import tiny_policy


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_prompt_makes_the_same_prefix(name: str) -> None:
    policy = tiny_policy()
    prompt = make(name, policy, noise=0.3)
    packed = PackedPrompt.of(prompt, "base")
    again = PackedPrompt(load(save(dict(packed.tensors))), json.loads(json.dumps(packed.plain)))
    before = policy.prefix(prompt)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(1.0)  # the packed one must not follow
    made = again.unpack()
    assert (made.kind, made.init_text) == (prompt.kind, prompt.init_text)
    after = policy.prefix(made)
    for one, other in zip(
        [*before.keys, *before.values], [*after.keys, *after.values], strict=True
    ):
        assert torch.equal(one, other)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no representation none"):
        PackedPrompt({}, {"representation": "none"}).unpack()
