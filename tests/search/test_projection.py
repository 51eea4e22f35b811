"""A soft prompt as text: the nearest tokens, and how far they are."""

from __future__ import annotations

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.search.projection import Metric, nearest_tokens, project
from rlprompt.search.vocabulary import Vocabulary
from tests.fixtures.runs import tiny_policy

POLICY = tiny_policy()
VOCABULARY = Vocabulary(POLICY, ascii_only=True)
METRICS: tuple[Metric, ...] = ("cosine", "l2")
TEXT = "the rain and\nthe sun"


@pytest.mark.parametrize("metric", METRICS)
def test_a_soft_prompt_that_is_a_text_is_that_text(metric: Metric) -> None:
    ids = POLICY.slot_ids(TEXT)
    found = project(SoftPrompt(POLICY.embed(ids)), POLICY, VOCABULARY, metric)
    assert found.text == TEXT and found.token_ids == tuple(ids) and found.is_exact
    assert found.gap == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_a_little_noise_moves_the_gap_and_not_the_text(metric: Metric) -> None:
    embeddings = POLICY.embed(POLICY.slot_ids(TEXT))
    draw = torch.Generator().manual_seed(0)
    gaps = []
    for size in (0.01, 0.05):
        noise = size * embeddings.std() * torch.randn(embeddings.shape, generator=draw)
        found = project(SoftPrompt(embeddings + noise), POLICY, VOCABULARY, metric)
        assert found.text == TEXT
        gaps.append(found.gap)
    assert 0.0 < gaps[0] < gaps[1] < 0.2


def test_the_length_of_a_vector_counts_for_l2_only() -> None:
    embeddings = POLICY.embed(POLICY.slot_ids(TEXT))
    long = SoftPrompt(3.0 * embeddings)
    assert project(long, POLICY, VOCABULARY, "cosine").gap == pytest.approx(0.0, abs=1e-5)
    assert nearest_tokens(
        3.0 * embeddings, POLICY.embed(range(300)), VOCABULARY.named, "l2"
    ).distances.mean() == pytest.approx(2.0 / 3.0, abs=0.1)


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_tokens_are_those_of_a_slow_search(metric: Metric) -> None:
    draw = torch.Generator().manual_seed(1)
    vectors, table = torch.randn(5, 8, generator=draw), torch.randn(30, 8, generator=draw)
    allowed = torch.rand(30, generator=draw) < 0.5
    found = nearest_tokens(vectors, table, allowed, metric)
    for vector, token, distance in zip(vectors, *found, strict=True):
        each = {}
        for number in allowed.nonzero().flatten().tolist():
            row = table[number]
            if metric == "cosine":
                each[number] = 1.0 - float(vector @ row / vector.norm() / row.norm())
            else:
                each[number] = float((vector - row).norm() / vector.norm())
        assert int(token) == min(each, key=lambda number: each[number])
        assert float(distance) == pytest.approx(min(each.values()), abs=1e-5)


def test_tokens_that_are_no_text_become_the_tokens_of_their_text() -> None:
    """`t`, `h`, `e` are cut as one token: the text stays, and its tokens are its own."""
    letters = [POLICY.slot_ids(letter)[0] for letter in "the"]
    found = project(SoftPrompt(POLICY.embed(letters)), POLICY, VOCABULARY)
    assert found.text == "the" and found.nearest_ids == tuple(letters)
    assert list(found.token_ids) == POLICY.slot_ids("the") and not found.is_exact


def test_nothing_but_white_space_is_no_text() -> None:
    space = POLICY.base.tokenizer(" ").input_ids
    nothing = Vocabulary(POLICY, ascii_only=True)
    nothing.allowed = torch.zeros_like(nothing.allowed)
    nothing.allowed[space[0]] = True
    with pytest.raises(InputError, match=r"set search\.projection to the other metric"):
        project(SoftPrompt(POLICY.embed(space)), POLICY, nothing)
