"""Warm starts: which representation continues which, and what it then is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt, PromptSettings
from rlprompt.prompts.make import AnyPromptSettings, make_prompt
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.soft import SoftPrompt, resample
from tests.fixtures.prompts import KINDS, TEXT, TRAINABLE, make
from tests.invariants.oracle import QUERIES, completions, flat, policy_of, scores

GROUPS = [completions(4, 7, seed=1), completions(3, seed=2), completions(2, 5, seed=3)]


def start(kind: str, source: Prompt, **settings: Any) -> Prompt:
    """A prompt of type `kind` from an artifact that holds `source`."""
    adapter: TypeAdapter[PromptSettings] = TypeAdapter(AnyPromptSettings)
    parsed = adapter.validate_python({"type": kind, "from_artifact": "a", **settings})
    return make_prompt(parsed, policy_of("llama"), 0, {"a": source}.__getitem__)


def logprobs(policy: Policy, prompt: Prompt) -> Tensor:
    return flat(scores(policy, prompt, QUERIES, GROUPS))


@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_representation_continues_itself(kind: str) -> None:
    policy = policy_of("llama")
    source = make(kind, policy, noise=0.3)
    again = start(source.kind, source)
    assert type(again) is type(source) and again.init_text == source.init_text
    torch.testing.assert_close(logprobs(policy, again), logprobs(policy, source), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("soft", "prefix"),
        ("text", "prefix"),
        ("text_then_soft", "prefix"),
        ("soft_then_prefix", "prefix"),
        ("text", "adapter"),
    ],
)
def test_another_representation_starts_as_exactly_the_source(source: str, kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(source, policy, noise=0.3)
    warm = start(kind, prompt)
    assert warm.kind == kind
    torch.testing.assert_close(logprobs(policy, warm), logprobs(policy, prompt), rtol=0, atol=1e-5)


def test_a_soft_prompt_from_a_text_is_that_text() -> None:
    policy = policy_of("llama")
    text = make("text", policy)
    warm = start("soft", text)
    assert isinstance(warm, SoftPrompt) and warm.init_text == TEXT
    assert torch.equal(warm.embeddings, policy.embed(policy.slot_ids(TEXT)))


def test_a_low_rank_prefix_continues_a_full_one_as_a_new_start() -> None:
    policy = policy_of("llama")
    source = make("prefix", policy, noise=0.3)
    warm = start("prefix", source, rank=2)
    torch.testing.assert_close(logprobs(policy, warm), logprobs(policy, source), rtol=0, atol=1e-5)
    assert warm.metrics()["drift_from_init"] == 0.0


def test_a_soft_prompt_of_another_length_is_resampled() -> None:
    source = SoftPrompt(torch.randn(5, 64))
    warm = start("soft", source, num_virtual_tokens=9)
    assert isinstance(warm, SoftPrompt)
    assert torch.equal(warm.embeddings.detach(), resample(source.embeddings.detach(), 9))


def test_resampling_keeps_ends_bits_and_lengths() -> None:
    source = torch.randn(5, 64) * torch.arange(1, 6)[:, None]
    assert torch.equal(resample(source, 5), source)
    for length in (2, 3, 9, 40):
        out = resample(source, length)
        assert out.shape == (length, 64)
        torch.testing.assert_close(out[0], source[0])
        torch.testing.assert_close(out[-1], source[-1])
    torch.testing.assert_close(resample(source, 9)[::2], source)  # every token is a place of nine
    between = resample(source, 9)[1::2].norm(dim=1)
    norms = source.norm(dim=1)
    torch.testing.assert_close(between, (norms[:-1] + norms[1:]) / 2)
    torch.testing.assert_close(resample(source, 1)[0], source[2])  # the middle


@pytest.mark.parametrize(
    ("kind", "source", "sentence"),
    [
        ("soft", "prefix", "cannot be turned back into embeddings"),
        ("soft", "lora", "cannot be turned back into embeddings"),
        ("prefix", "lora", "more than keys and values"),
        ("adapter", "soft", "stands on a text"),
        ("sequence", "soft", "not a sequence; name it as one of prompt.parts"),
    ],
)
def test_what_cannot_continue_is_refused(kind: str, source: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        start(kind, make(source, policy_of("llama")))


@pytest.mark.parametrize(
    ("kind", "source", "settings", "sentence"),
    [
        ("prefix", "prefix", {"num_virtual_tokens": 2}, "keys cannot be moved to others"),
        ("adapter", "lora", {"method": {"type": "ia3"}}, "prompt.method has no effect"),
        ("sequence", "text_then_soft", {"train": 0}, "is a text and has nothing to train"),
        ("sequence", "text_then_soft", {"train": 2}, "the parts are 0 to 1"),
    ],
)
def test_settings_without_effect_are_refused(
    kind: str, source: str, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        start(kind, make(source, policy_of("llama")), **settings)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("soft", {"init_text": "a text"}),
        ("prefix", {"init_text": "a text"}),
        ("adapter", {"text": "a text"}),
        ("sequence", {"parts": [KINDS["text"], KINDS["soft"]]}),
    ],
)
def test_two_starts_are_one_too_many(kind: str, settings: dict[str, Any]) -> None:
    adapter: TypeAdapter[PromptSettings] = TypeAdapter(AnyPromptSettings)
    with pytest.raises(ValidationError, match="are both given; keep one"):
        adapter.validate_python({"type": kind, "from_artifact": "a", **settings})


def test_the_trained_part_of_a_sequence_can_change() -> None:
    policy = policy_of("llama")
    source = make("soft_then_text_then_soft", policy, noise=0.3)
    warm = start("sequence", source, train=2)
    assert isinstance(warm, SequencePrompt)
    assert warm.parameters() == warm.parts[2].parameters()
    assert [p.requires_grad for part in warm.parts for p in part.parameters()] == [False, True]
