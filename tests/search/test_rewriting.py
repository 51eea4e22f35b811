"""Requests to a writer, and the instruction in what it answers."""

from __future__ import annotations

import pytest

from rlprompt.search import rewriting
from rlprompt.search.admission import Copies
from rlprompt.search.rewriting import Failure, proposed


@pytest.mark.parametrize(
    "answer",
    [
        "Be brief and kind.",
        "  Be brief and kind.\n",
        '"Be brief and kind."',
        "\u201cBe brief and kind.\u201d",
        "Sure, here is the new instruction: Be brief and kind.",
        "Of course! Here's an improved version:\n\nBe brief and kind.",
        "New instruction: Be brief and kind.",
        "**Improved system prompt:** Be brief and kind.",
        "```\nBe brief and kind.\n```",
        "Here you go:\n```text\nBe brief and kind.\n```\nI hope that it helps!",
        "```\nBe brief and kind.",
        "Be brief and kind. And you should alwa",
    ],
)
def test_the_instruction_is_taken_out_of_an_answer(answer: str) -> None:
    assert proposed(answer) == "Be brief and kind."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", ""),
        ("   ", ""),
        ("no end", "no end"),
        ("Sure,", "Sure,"),
        ("Here lies a rule: be kind.", "Here lies a rule: be kind."),
        ("Use 3.5 or more words. Then stop!", "Use 3.5 or more words. Then stop!"),
        ('"', '"'),
        ("Instructions matter. Follow them.", "Instructions matter. Follow them."),
    ],
)
def test_what_is_no_frame_stays(answer: str, expected: str) -> None:
    assert proposed(answer) == expected


def test_a_reflection_shows_answers_scores_and_notes_and_no_more_than_that_of_them() -> None:
    bad = [Failure("far too long " * 100, 0.125, ("too many words",)), Failure("hm", -1.0)]
    said = rewriting.reflection("Be brief.", bad).text
    assert "Be brief." in said and "0.125" in said and "too many words" in said and "hm" in said
    assert len(said) < 1200


def test_requests_hold_the_texts_whole() -> None:
    assert "One.\nTwo." in rewriting.rephrasing("One.\nTwo.").text
    both = rewriting.blending("One.", "Two.").text
    assert both.index("One.") < both.index("Two.")


def test_the_words_of_a_request_do_not_get_into_a_proposal() -> None:
    copies = Copies(rewriting.OWN_WORDS)
    for request in (rewriting.rephrasing("a"), rewriting.blending("a", "b")):
        assert copies.found_in(request.text)
    assert copies.found_in(rewriting.reflection("a", [Failure("b", 0.0)]).text)
