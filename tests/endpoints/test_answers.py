"""What may stand in a server's answer, and what is made of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rlprompt.endpoints.answers import (
    Answer,
    Question,
    UnusableError,
    Usage,
    read_answer,
    read_usage,
)

BODY = {"model": "m", "messages": [{"role": "user", "content": "h\u00e9 \ud800"}]}
ONE = Question(BODY, "0/0/0", 8)
TWO = Question({**BODY, "n": 2}, "0/0/0", 8, 2)


def said(*texts: Any, usage: Any = None, **choice: Any) -> dict[str, Any]:
    choices = [
        {"index": i, "message": {"content": text}, "finish_reason": "stop", **choice}
        for i, text in enumerate(texts)
    ]
    return {"choices": choices, "usage": usage}


def test_text_ending_and_length() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    answer = read_answer(said("hello", usage=usage, finish_reason="length"), ONE)
    (choice,) = answer.choices
    assert (choice.text, choice.finish, choice.tokens) == ("hello", "length", 2)
    assert answer.usage == Usage(5, 2)
    assert Answer.of(answer.plain()) == answer


def test_several_choices_are_in_order_and_counted_by_their_logprobs() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 5}
    given = said("a", "b", usage=usage)
    given["choices"][0]["logprobs"] = {"content": [{}, {}]}
    given["choices"][1]["logprobs"] = {"content": [{}, {}, {}]}
    given["choices"].reverse()
    answer = read_answer(given, TWO)
    assert [(each.text, each.tokens) for each in answer.choices] == [("a", 2), ("b", 3)]
    del given["choices"][0]["logprobs"]
    assert [each.tokens for each in read_answer(given, TWO).choices] == [2, None]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I cannot."}, "I cannot."),
        ({"content": ""}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": "half \ud83d"}, "half ?"),
    ],
)
def test_a_model_may_say_nothing_and_say_it_in_several_ways(
    message: dict[str, Any], text: str
) -> None:
    given = {"choices": [{"message": message}]}
    (choice,) = read_answer(given, ONE).choices
    assert (choice.text, choice.finish, choice.tokens) == (text, "", None)


@pytest.mark.parametrize(
    "given",
    [
        None,
        [],
        "text",
        {},
        {"choices": []},
        {"choices": None},
        {"choices": {"0": {}}},
        {"choices": ["text"]},
        {"choices": [{}]},
        {"choices": [{"message": "text"}]},
        {"choices": [{"message": {"content": 3}}]},
        said("a", "b"),
    ],
    ids=str,
)
def test_what_holds_no_completion_is_unusable(given: Any) -> None:
    before = copy.deepcopy(given)
    with pytest.raises(UnusableError):
        read_answer(given, ONE)
    assert given == before


def test_fewer_choices_than_asked_for_are_unusable() -> None:
    with pytest.raises(UnusableError, match="1 choices for 2"):
        read_answer(said("a"), TWO)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        7,
        {},
        {"prompt_tokens": 5},
        {"prompt_tokens": -5, "completion_tokens": 2},
        {"prompt_tokens": "5", "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
        {"prompt_tokens": 5.0, "completion_tokens": 2},
    ],
    ids=str,
)
def test_a_usage_that_says_nothing_is_none(usage: Any) -> None:
    assert read_usage({"usage": usage}) is None
    assert read_answer(said("a", usage=usage), ONE).usage is None


def test_questions_differ_by_body_and_by_draw() -> None:
    same = Question({"messages": BODY["messages"], "model": "m"}, "0/0/0", 8)
    assert same.key == ONE.key
    others = [Question(BODY, "0/0/1", 8), Question({**BODY, "seed": 1}, "0/0/0", 8), TWO]
    assert len({each.key for each in (ONE, *others)}) == 4
    assert ONE.text_bytes >= len("h\u00e9 ?".encode())
