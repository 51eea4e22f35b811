"""Prompts in sequence: joined tokens, order, and settings that cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.errors import InputError
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.sequence import SequencePrompt, SequenceSettings
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.prompts import KINDS, make
from tests.invariants.oracle import QUERIES, completions, flat, policy_of, scores

GROUPS = [completions(4, 7, seed=1), completions(3, seed=2), completions(2, 5, seed=3)]
FIRST, SECOND = "the rain", "and the sun"


def _soft(text: str) -> SoftPrompt:
    policy = policy_of("llama")
    return SoftPrompt(policy.embed(policy.slot_ids(text)), text)


def _logprobs(*parts: Any) -> torch.Tensor:
    prompt = SequencePrompt(parts, len(parts) - 1)
    return flat(scores(policy_of("llama"), prompt, QUERIES, GROUPS))


def test_texts_in_sequence_are_their_tokens_joined() -> None:
    policy = policy_of("llama")
    ids = [*policy.slot_ids(FIRST), *policy.slot_ids(SECOND)]
    joined = flat(scores(policy, SoftPrompt(policy.embed(ids)), QUERIES, GROUPS))
    got = _logprobs(TextPrompt(FIRST), _soft(SECOND))
    torch.testing.assert_close(got, joined, rtol=0, atol=1e-5)
    prefix = SequencePrompt([TextPrompt(FIRST), _soft(SECOND)], 1).prefix(policy)
    assert prefix.num_tokens == len(policy.head_ids) + len(ids)


def test_order_matters() -> None:
    one, other = _logprobs(_soft(FIRST), _soft(SECOND)), _logprobs(_soft(SECOND), _soft(FIRST))
    assert float((one - other).abs().max()) > 0.01


def test_a_later_part_sees_an_earlier_one() -> None:
    """Its keys are those behind the first part, not those behind the head alone."""
    policy = policy_of("llama")
    prompt = make("soft_then_prefix", policy)
    assert isinstance(prompt, SequencePrompt)
    behind = prompt.parts[1]
    alone = PrefixPrompt.create(PrefixSettings(init_text=SECOND), policy, 0)
    assert isinstance(behind, PrefixPrompt)
    assert not torch.allclose(behind.start[1], alone.start[1], atol=1e-2)
    with pytest.raises(InputError, match="belong to positions"):
        SequencePrompt([_soft(FIRST), alone], 0).prefix(policy)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"parts": [KINDS["soft"]]}, "at least 2"),
        ({"parts": [KINDS["text"], KINDS["text"]]}, "part 1 is to be trained and is a text"),
        ({"parts": [KINDS["soft"], KINDS["soft"]], "train": 2}, "the parts are 0 to 1"),
        ({"parts": [KINDS["soft"], KINDS["prefix"]], "train": 0}, "put the prefix first"),
        ({"parts": [KINDS["text"], KINDS["lora"]]}, "adapter"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SequenceSettings.model_validate(settings)
