"""The text of an answer, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rlprompt.serving.answer_text import AnswerText
from tests.fixtures.tiny import tiny_tokenizer


def decode(ids: Sequence[int]) -> str:
    return str(tiny_tokenizer().decode(list(ids), skip_special_tokens=True))


def pieces(text: str, stop: Sequence[str] = ()) -> tuple[list[str], bool]:
    ids = tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
    answer = AnswerText(decode, stop)
    found = []
    for place, token in enumerate(ids):
        found.append(answer.push(token, last=place + 1 == len(ids)))
        if answer.stopped:
            break
    return found, answer.stopped


@pytest.mark.parametrize(
    "text",
    [
        "the rain",
        "  the rain and\n the sun  \n",
        "\u00e9\u00e8 \U0001f30a\U0001f30a the \u6d77",
        " ",
        "a",
    ],
)
def test_pieces_joined_are_the_stripped_text_and_whole_characters(text: str) -> None:
    found, stopped = pieces(text)
    assert "".join(found) == text.strip()
    assert not stopped
    assert not any("\ufffd" in each for each in found)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["sun"], "the rain and the"),
        (["n and", "rain"], "the"),
        (["zzz"], "the rain and the sun"),
        (["the rain and the sun and"], "the rain and the sun"),
        (["the"], ""),
        ([" "], "the"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(stop: list[str], expected: str) -> None:
    found, stopped = pieces("the rain and the sun", stop)
    assert "".join(found) == expected
    assert stopped == any(each in "the rain and the sun" for each in stop)


def test_what_may_be_a_stop_string_is_held_back() -> None:
    found, _ = pieces("the rain and the sun", ["and the moon"])
    told = ""
    for each in found:
        told += each
        assert not told.endswith("and")
    assert told == "the rain and the sun"
