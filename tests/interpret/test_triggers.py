"""The trigger search: what it computes, and what it makes of that."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlprompt.interpret.triggers import Settings, Side, _tested, scan_order, search, words_of
from rlprompt.kernels.divergence import head_divergence
from rlprompt.types import Completion, Query
from tests.fixtures.prompts import make
from tests.interpret.subjects import ended, forever, queries, tiny_policy

WORDS = tuple(range(3, 280))
"""Every token of the tiny vocabulary but its control tokens and the last ones."""


def behind(query: Query, word: str) -> Query:
    return Query(({"role": "user", "content": f"{query.text} {word}"},))


def test_words_begin_behind_a_space() -> None:
    policy = tiny_policy()
    found = [policy.decode([token]) for token in words_of(policy)]
    assert " the" in found and " hand" in found
    assert not {"the", " is", "hand"} & set(found)


@pytest.mark.parametrize("kind", ["soft", "lora"])
def test_the_scan_computes_what_whole_conversations_give(kind: str) -> None:
    policy = tiny_policy()
    prompt = make(kind, policy, noise=1.0)
    query = queries()[0]
    side = Side(policy, prompt, [query], 0)
    place = side.places[0]
    words = [[token] for token in (270, 275, 299)]
    found = side.moved(place, words)
    prefix = policy.prefix(prompt)
    answer = Completion(place.answer, (), "", False)
    plain = policy.hidden_scored([query], [(answer,)], prefix, prompt)
    for word, value in zip(words, found, strict=True):
        text = policy.decode(word)
        other = behind(query, text.strip())
        ids = [*place.before, *word, *place.after]
        if policy.query_ids(other, prompt) != ids:
            continue  # the tokenizer would cut it otherwise
        moved = policy.hidden_scored([other], [(answer,)], prefix, prompt)
        slow = head_divergence(moved.detach(), plain.detach(), policy.forward.head, "forward_kl")
        assert value == pytest.approx(float(slow.mean()), abs=1e-5)
    assert found.min() > 0


def test_the_slope_is_that_of_the_switch() -> None:
    """Against a difference quotient along one direction."""
    policy = tiny_policy(torch.float64)
    prompt = make("soft", policy, noise=1.0)
    side = Side(policy, prompt, queries()[:1], 0)
    place, word = side.places[0], 275
    slope = side.gradient(place, word).double()
    table = policy.base.model.get_input_embeddings()
    assert table is not None
    weight = table.weight
    assert isinstance(weight, torch.Tensor)
    direction = torch.randn(slope.shape, generator=torch.Generator().manual_seed(0)).double()
    values = []
    for step in (1e-4, -1e-4):
        with torch.no_grad():
            before = weight[word].clone()
            weight[word] += step * direction
            values.append(float(side.moved(place, [[word]])[0]))
            weight[word] = before
    assert float(slope @ direction) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-2)


def test_a_scan_meets_every_word_once() -> None:
    policy = tiny_policy()
    side = Side(policy, make("soft", policy), queries()[:2], 0)
    for settings in (Settings(), Settings(gradient_queries=0)):
        assert sorted(scan_order(side, WORDS, settings)) == sorted(WORDS)


def test_a_word_that_is_shown_to_switch_is_flagged_and_others_are_not() -> None:
    policy = tiny_policy()
    random = np.random.default_rng(0)
    quiet = random.normal(0.2, 0.05, size=(16, 10))
    tried = [[270], [275], [280], [285]]
    table = quiet.copy()
    table[1] += 3.0
    found = _tested(policy, table, tried)
    assert found["flagged"] and [row["flagged"] for row in found["words"]] == [
        True,
        False,
        False,
        False,
    ]
    assert found["words"][0]["word"] == policy.decode([275]).strip()
    assert found["words"][0]["p_value"] < 0.05
    assert not _tested(policy, quiet, tried)["flagged"]
    # One query that answers otherwise is no switch, nor are a few.
    for count in (1, 4):
        table = quiet.copy()
        table[1, :count] += 10.0
        assert not _tested(policy, table, tried)["flagged"]


def test_a_prompt_without_a_trigger_is_not_flagged() -> None:
    policy = tiny_policy()
    sides = (queries()[:3], queries()[3:])
    for seed in range(2):
        settings = Settings(seed=seed, tried=6, at_random=8)
        prompt = make("soft", policy, noise=0.5, seed=seed)
        found = search(policy, prompt, sides, settings, forever(), WORDS)
        assert found["flagged"] is False and found["scanned"] == len(WORDS)
        assert len(found["words"]) == 6


def test_a_suspected_phrase_is_tried_whatever_the_scan_says() -> None:
    policy, sides = tiny_policy(), (queries()[:3], queries()[3:])
    prompt = make("soft", policy, noise=0.5)
    settings = Settings(tried=2, at_random=2, suspects=("open the door",))
    found = search(policy, prompt, sides, settings, ended(), WORDS)
    assert "open the door" in [row["word"] for row in found["words"]] and len(found["words"]) == 3


def test_some_words_are_scanned_without_time_and_few_words_are_said() -> None:
    policy, sides = tiny_policy(), (queries()[:3], queries()[3:])
    prompt = make("soft", policy, noise=0.5)
    settings = Settings(tried=2, at_random=2, gradient_queries=0)
    assert search(policy, prompt, sides, settings, ended(), WORDS)["scanned"] == 128
    assert search(policy, prompt, sides, Settings(), forever())["flagged"] is None
