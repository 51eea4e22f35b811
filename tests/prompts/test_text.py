"""Prompts that train nothing."""

from __future__ import annotations

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.tiny import DEFAULT_SYSTEM
from tests.invariants.oracle import QUERIES, TEXT, policy_of


def test_a_text_is_head_and_its_tokens() -> None:
    policy = policy_of("llama")
    prefix = TextPrompt(TEXT).prefix(policy)
    ids = [*policy.head_ids, *policy.slot_ids(TEXT)]
    expected = policy.prefill(policy.embed(ids))
    assert prefix.num_tokens == len(ids)
    assert all(torch.equal(a, b) for a, b in zip(prefix.values, expected.values, strict=True))


def test_the_default_system_message_is_part_of_none() -> None:
    policy = policy_of("llama")
    none = [*policy.none_head_ids, *NonePrompt().query_ids(policy, QUERIES[0].messages)]
    assert DEFAULT_SYSTEM in policy.base.tokenizer.decode(none)
    text = [*policy.head_ids, *TextPrompt(TEXT).query_ids(policy, QUERIES[0].messages)]
    assert DEFAULT_SYSTEM not in policy.base.tokenizer.decode(text)


def test_none_is_the_text_of_the_default() -> None:
    policy = policy_of("llama")
    none = [*policy.none_head_ids, *policy.none_tail_ids(QUERIES[0].messages)]
    text = [
        *policy.head_ids,
        *policy.slot_ids(DEFAULT_SYSTEM),
        *policy.tail_ids(QUERIES[0].messages),
    ]
    assert none == text


@pytest.mark.parametrize("prompt", [TextPrompt(TEXT), NonePrompt()])
def test_nothing_trains_and_nothing_is_saved(prompt: TextPrompt | NonePrompt) -> None:
    assert prompt.parameters() == []
    assert prompt.state_dict() == {}
    assert prompt.metrics() == {}
    prompt.constrain()
    prompt.load_state_dict({})
    with pytest.raises(ValueError, match="has no tensors"):
        prompt.load_state_dict({"embeddings": torch.zeros(1)})


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(InputError, match="none"):
        TextPrompt(" \n")
