"""The native engine against transformers' generate and against our own training forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import FrozenBase, ModelSettings, load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import PLAIN
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Completion, Group, Query
from tests.fixtures.tiny import FAMILIES, tiny_tokenizer
from tests.invariants.oracle import (
    QUERIES,
    TEXT,
    context_ids,
    model_of,
    policy_of,
    query,
    scores,
    soft_prompt,
)

SAMPLING = SamplingSettings(max_tokens=24, temperature=0.9)
MANY_STOPS = tuple(range(3, 300, 6))
"""A sixth of the vocabulary, so that rows end at all times, some at once and some at the first."""


def _generate(
    policy: Policy,
    sampling: SamplingSettings = SAMPLING,
    queries: Sequence[Query] = QUERIES,
    count: int = 4,
    prompt: Prompt | None = None,
    max_rows: int = 256,
    seed: int = 0,
) -> tuple[Group, ...]:
    engine = NativeEngine(policy, NativeSettings(max_rows=max_rows))
    engine.sync(prompt or TextPrompt(TEXT))
    return engine.generate(queries, count, sampling, seed).groups


def _tokens(groups: Sequence[Group]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in group.completions] for group in groups]


def _until(tokens: Sequence[int], stops: Sequence[int]) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tuple(tokens[:end])


def _own_greedy(
    model: PreTrainedModel, context: Sequence[int], count: int, eos: int | None = None
) -> list[int]:
    with torch.no_grad():
        generate: Any = model.generate
        out = generate(
            torch.tensor([list(context)]),
            attention_mask=torch.ones(1, len(context), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count if eos is None else 0,
            eos_token_id=2 if eos is None else [2, eos],
        )
    return [int(token) for token in out[0, len(context) :]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [TEXT, None], ids=["text", "none"])
def test_greedy_tokens_are_those_of_transformers(family: str, text: str | None) -> None:
    policy, model = policy_of(family), model_of(family)
    sampling = SamplingSettings(temperature=0.0, max_tokens=20, min_tokens=20)
    prompt = NonePrompt() if text is None else TextPrompt(text)
    groups = _generate(policy, sampling, count=1, prompt=prompt)
    for asked, group in zip(QUERIES, groups, strict=True):
        expected = _own_greedy(model, context_ids(policy, text, asked), 20)
        assert list(group.completions[0].token_ids) == expected


def test_greedy_tokens_stop_where_transformers_stops() -> None:
    policy, model = policy_of("gemma3"), model_of("gemma3")
    context = context_ids(policy, TEXT, QUERIES[0])
    stop = _own_greedy(model, context, 20)[9]
    sampling = SamplingSettings(temperature=0.0, max_tokens=20, stop_token_ids=(stop,))
    (group,) = _generate(policy, sampling, QUERIES[:1], count=1)
    assert list(group.completions[0].token_ids) == _own_greedy(model, context, 20, eos=stop)
    assert group.completions[0].terminated


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stops", [(), MANY_STOPS], ids=["few stops", "many stops"])
def test_sampling_logprobs_are_those_of_the_training_forward(
    family: str, stops: tuple[int, ...]
) -> None:
    policy = policy_of(family)
    prompt = soft_prompt(policy, noise=0.2)
    sampling = SAMPLING.model_copy(update={"stop_token_ids": stops})
    groups = _generate(policy, sampling, prompt=prompt)
    got = scores(policy, prompt, QUERIES, [g.completions for g in groups], SAMPLING.temperature)
    rows = [torch.tensor(c.sampling_logprobs) for g in groups for c in g.completions]
    for ours, sampled in zip(got.logprobs, rows, strict=True):
        torch.testing.assert_close(ours[: len(sampled)], sampled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_finished_rows_changes_no_other_row(family: str) -> None:
    policy = policy_of(family, torch.float64)
    sampling = SamplingSettings(max_tokens=40, temperature=3.0)  # growth of the cache included
    long = _generate(policy, sampling, count=12)
    cut = _generate(policy, sampling.model_copy(update={"stop_token_ids": MANY_STOPS}), count=12)
    ends = set()
    for whole, part in zip(long, cut, strict=True):
        for full, short in zip(whole.completions, part.completions, strict=True):
            assert short.token_ids == _until(full.token_ids, (*MANY_STOPS, 2))
            assert short.terminated == (short.token_ids[-1] in (*MANY_STOPS, 2))
            count = len(short.token_ids)
            assert short.sampling_logprobs == pytest.approx(
                full.sampling_logprobs[:count], abs=1e-9
            )
            ends.add(count)
    assert 1 in ends  # some row ends at its first token
    assert len(ends) > 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("max_rows", [1, 3, 5, 8, 11])
def test_turns_change_nothing(family: str, max_rows: int) -> None:
    policy = policy_of(family, torch.float64)
    sampling = SAMPLING.model_copy(update={"stop_token_ids": MANY_STOPS})
    whole = _generate(policy, sampling)
    assert _tokens(_generate(policy, sampling, max_rows=max_rows)) == _tokens(whole)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_query_does_not_depend_on_the_others(family: str) -> None:
    policy = policy_of(family, torch.float64)
    whole = _tokens(_generate(policy))
    assert _tokens(_generate(policy, queries=QUERIES[:1])) == whole[:1]
    others = [
        QUERIES[0],
        query("the hand and the land, is she out there and in one line?"),
        QUERIES[2],
    ]
    replaced = _tokens(_generate(policy, queries=others))
    assert replaced[0] == whole[0]
    assert replaced[1] != whole[1]
    assert replaced[2] == whole[2]


def test_seeds_decide() -> None:
    policy = policy_of("llama")
    assert _generate(policy) == _generate(policy)
    assert _tokens(_generate(policy, seed=1)) != _tokens(_generate(policy))
    assert len({row for group in _tokens(_generate(policy)) for row in group}) == 12


def test_under_a_prefix_of_no_tokens() -> None:
    policy = Policy(policy_of("mistral").base, ChatSlot.from_tokenizer(tiny_tokenizer(), PLAIN))
    sampling = SamplingSettings(temperature=0.0, max_tokens=12, min_tokens=12)
    groups = _generate(policy, sampling, count=1, prompt=NonePrompt())
    for asked, group in zip(QUERIES, groups, strict=True):
        context = context_ids(policy, None, asked)
        expected = _own_greedy(model_of("mistral"), context, 12)
        assert list(group.completions[0].token_ids) == expected


@pytest.mark.model
def test_the_real_model_greedy(smollm2_oracle: PreTrainedModel) -> None:
    base = load_base(ModelSettings(path="smollm2-135m", dtype="float32"))
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer))
    text = "You are a pirate."
    asked = [query("What is the capital of France?"), query("Hi")]
    sampling = SamplingSettings(temperature=0.0, max_tokens=12, min_tokens=12)
    groups = _generate(policy, sampling, asked, 1, TextPrompt(text))
    for one, group in zip(asked, groups, strict=True):
        expected = _own_greedy(smollm2_oracle, context_ids(policy, text, one), 12)
        assert list(group.completions[0].token_ids) == expected


@pytest.mark.model
def test_the_real_model_scores_what_it_samples(smollm2: FrozenBase) -> None:
    """In bfloat16 the two forwards round in different places: 0.013 on average, at most 0.15."""
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer))
    prompt = soft_prompt(policy, "You are a pirate. Answer in short sentences.")
    asked = [query("What is the capital of France?"), query("Hi"), query("Name two colours.")]
    groups = _generate(policy, SamplingSettings(max_tokens=24), asked, 4, prompt)
    drawn: list[list[Completion]] = [list(group.completions) for group in groups]
    got = scores(policy, prompt, asked, drawn)
    sampled = torch.tensor([x for row in drawn for c in row for x in c.sampling_logprobs])
    gap = (got.logprobs[got.mask] - sampled).abs()
    assert gap.mean() < 0.05
    assert gap.max() < 1.0
