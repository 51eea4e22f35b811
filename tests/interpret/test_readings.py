"""Frames: what the model is shown, and what is made of its answer."""

from __future__ import annotations

import pytest
import torch

from rlprompt.interpret.derived import BegunPrompt, first_ids, quoted, random_like, vectors_of
from rlprompt.interpret.readings import FRAMES, of_frames, read, sentence
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Query
from tests.fixtures.prompts import KINDS, make
from tests.interpret.subjects import answers, ended, forever, tiny_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def test_vectors_stand_between_the_words_around_them(policy: Policy) -> None:
    vectors = torch.full((2, policy.hidden_size), 7.0)
    framed = quoted(policy, vectors, "what is the {} there", "it is")
    embeddings = framed.input_embeddings(policy)
    assert torch.equal(embeddings[-2:], vectors)
    table = policy.embed(range(policy.vocab_size))
    before = torch.cdist(embeddings[:-2], table).argmin(1).tolist()
    written = [
        *policy.none_head_ids,
        *policy.none_tail_ids([{"role": "user", "content": "what is the hand there"}]),
    ]
    after = framed.query_ids(policy, ())
    assert policy.decode(before).rstrip().endswith("what is the")
    assert before == written[: len(before)] or policy.decode(before).endswith(" ")
    assert policy.decode(after).split() == [*["there", "assistant", "it", "is"]]


def test_a_begun_answer_goes_on_as_the_model_would(policy: Policy) -> None:
    """What is drawn behind given tokens has the probability that the whole has, less theirs."""
    text = TextPrompt("the rain")
    begun = BegunPrompt(text, first_ids(policy, "it is"))
    query = Query(({"role": "user", "content": "what"},))
    (group,) = answers(policy, begun, 1)
    ids = begun.query_ids(policy, query.messages)
    assert ids[: -len(first_ids(policy, "it is"))] == text.query_ids(policy, query.messages)
    assert group.completions[0].token_ids


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_read_in_the_frames_that_it_allows(policy: Policy, kind: str) -> None:
    prompt = make(kind, policy, noise=0.5)
    counts = of_frames(read(policy, prompt, copies=2, seed=0, time=forever()))
    quotes = [frame.name for frame in FRAMES if "{}" in frame.question]
    if vectors_of(policy, prompt) is None:
        assert not any(counts[name] for name in quotes)
    assert sum(counts.values()) > 0


def test_one_frame_is_read_where_there_is_no_time(policy: Policy) -> None:
    counts = of_frames(read(policy, make("soft", policy), copies=3, seed=0, time=ended()))
    assert {name for name, count in counts.items() if count} <= {FRAMES[0].name}


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (' answer in "French".', "Answer in \u201cFrench\u201d.".replace("\u201c", '"')),
        ("be brief and", "Be brief and."),
        ("be brief. Use lists. Then sto", "Be brief. Use lists."),
        ("be brief.\n\nThank you", "Be brief."),
        ("  \n", ""),
        ("?!", ""),
        ("x", ""),
        ("a" * 900, "A" + "a" * 239 + "."),
    ],
    ids=["quotes", "cut", "two", "paragraph", "blank", "marks", "letter", "long"],
)
def test_an_answer_becomes_a_sentence(written: str, kept: str) -> None:
    found = sentence(FRAMES[0], written)
    assert found.replace("\u201d", '"') == kept.replace("\u201d", '"')


def test_a_frame_may_keep_words(policy: Policy) -> None:
    frame = next(each for each in FRAMES if each.keeps)
    assert sentence(frame, "short and kind.") == f"{frame.keeps} short and kind."


@pytest.mark.parametrize("kind", ["soft", "text", "prefix"])
def test_a_random_prompt_has_the_norms_and_nothing_else(policy: Policy, kind: str) -> None:
    prompt = make(kind, policy, noise=0.5)
    control = random_like(policy, prompt, 0)
    assert control is not None
    with torch.no_grad():
        own, drawn = policy.prefix(prompt), policy.prefix(control)
    assert own.num_tokens == drawn.num_tokens
    if kind == "prefix":
        head = len(policy.head_ids)
        ours, theirs = own.keys[0][:, head:], drawn.keys[0][:, head:]
        assert ours.norm(dim=-1) == pytest.approx(theirs.norm(dim=-1), rel=1e-4)
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).abs().mean() < 0.6
    else:
        vectors, others = vectors_of(policy, prompt), vectors_of(policy, control)
        assert vectors is not None and others is not None
        assert vectors.norm(dim=1) == pytest.approx(others.norm(dim=1), rel=1e-4)
    assert random_like(policy, make("lora", policy), 0) is None
    assert random_like(policy, NonePrompt(), 0) is None
