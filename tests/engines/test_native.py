"""The native engine's bookkeeping: the cache, stopping, limits, errors."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from rlprompt.engines.base import Engine
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.invariants.oracle import QUERIES, TEXT, policy_of, query, soft_prompt


def _engine(family: str = "llama") -> NativeEngine:
    engine = NativeEngine(policy_of(family))
    engine.sync(TextPrompt(TEXT))
    return engine


def test_one_token_completions() -> None:
    engine = _engine()
    groups = engine.generate(QUERIES, 3, SamplingSettings(max_tokens=1), seed=0).groups
    assert [len(c.token_ids) for g in groups for c in g.completions] == [1] * 9


def test_all_rows_may_end_at_once() -> None:
    engine = _engine()
    stops = tuple(range(304))
    sampling = SamplingSettings(max_tokens=9, stop_token_ids=stops)
    groups = engine.generate(QUERIES, 2, sampling, seed=0).groups
    assert all(len(c.token_ids) == 1 and c.terminated for g in groups for c in g.completions)
    assert all(c.text == "" or c.token_ids[0] != 2 for g in groups for c in g.completions)


def test_stop_tokens_wait_for_min_tokens() -> None:
    engine = _engine()
    stops = tuple(range(3, 300, 2))
    sampling = SamplingSettings(max_tokens=12, min_tokens=5, stop_token_ids=stops)
    groups = engine.generate(QUERIES, 8, sampling, seed=0).groups
    rows = [c for g in groups for c in g.completions]
    assert all(len(c.token_ids) > 5 for c in rows)
    assert all(token not in (*stops, 2) for c in rows for token in c.token_ids[:5])
    assert any(c.terminated for c in rows)


def test_groups_keep_their_queries_and_say_how_they_ended() -> None:
    engine = _engine()
    sampling = SamplingSettings(max_tokens=16, stop_token_ids=tuple(range(3, 300, 10)))
    groups = engine.generate(QUERIES, 6, sampling, seed=0).groups
    assert [g.query for g in groups] == list(QUERIES)
    for group in groups:
        for c in group.completions:
            assert len(c.token_ids) == len(c.sampling_logprobs)
            assert c.terminated or len(c.token_ids) == 16
            assert "<|im_end|>" not in c.text


def test_a_prompt_takes_effect_when_it_is_synced() -> None:
    policy = policy_of("llama")
    prompt = soft_prompt(policy)
    engine = NativeEngine(policy)
    assert engine.supports(prompt)
    engine.sync(prompt)
    sampling = SamplingSettings(max_tokens=8)
    before = engine.generate(QUERIES, 2, sampling, seed=0)
    with torch.no_grad():
        prompt.embeddings.mul_(-1)
    assert engine.generate(QUERIES, 2, sampling, seed=0) == before
    engine.sync(prompt)
    assert engine.generate(QUERIES, 2, sampling, seed=0) != before
    engine.sync(NonePrompt())
    assert engine.generate(QUERIES, 2, sampling, seed=0) != before


def test_progress_is_reported_per_token() -> None:
    seen: list[tuple[int, int]] = []
    engine: Engine = _engine()
    engine.generate(
        QUERIES[:1],
        1,
        SamplingSettings(max_tokens=4, min_tokens=4),
        seed=0,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_generating_without_a_prompt_is_refused() -> None:
    engine = NativeEngine(policy_of("llama"))
    with pytest.raises(InputError, match="no prompt"):
        engine.generate(QUERIES, 1, SamplingSettings(), seed=0)


def test_stop_tokens_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="stop_token_ids"):
        _engine().generate(QUERIES, 1, SamplingSettings(stop_token_ids=(304,)), seed=0)
    with pytest.raises(ValidationError, match="stop_token_ids"):
        SamplingSettings(stop_token_ids=(-1,))


def test_a_completion_that_may_outgrow_the_base_is_refused() -> None:
    sampling = SamplingSettings(max_tokens=512)
    with pytest.raises(InputError, match="shorten the query or max_tokens"):
        _engine().generate([query("rain")], 1, sampling, seed=0)
