"""What may be tried: copies of training data in every disguise, control tokens, length."""

from __future__ import annotations

from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.search.admission import Admission, Copies, sources_of, words
from rlprompt.types import Query

QUERY = "Why does the ice on a frozen lake float on cold water?"
SHORT = "Who wrote Hamlet?"
ANSWER = "Fold the lower sleeve twice, then press it with a warm iron until the crease holds."
SOURCES = (QUERY, SHORT, ANSWER, "why", "tell me more", "Lisbon")


def admission(own: tuple[str, ...] = (), limit: int = 60, **more: Any) -> Admission:
    return Admission(Copies(SOURCES, own), lambda text: len(text.split()), limit, **more)


@pytest.mark.parametrize(
    "text",
    [
        QUERY,
        f"Be brief. {QUERY} Then stop.",
        QUERY.upper(),
        QUERY.replace(" ", "  \n"),
        "why, does: the - ice; on... a (frozen) lake float?! on cold water",
        "Mind why does the ice on a frozen. Also: lake float on cold water.",
        "**Why** _does_ the `ice` on a 'frozen' lake",
        "\uff37\uff48\uff59 does the \u00efce on a fr\u00f6zen lake float",
        "A frozen lake: cold water, and ice that will float on it.",
        "Water is cold. Lakes are not the point, a frozen lake is; ice can float.",
        "who   WROTE hamlet",
        "Explain who wrote\nHamlet to me.",
        "Press it with a warm iron until it is flat.",
        "fold the lower sleeve twice then stop",
    ],
)
def test_a_copy_is_refused_in_every_disguise(text: str) -> None:
    assert admission().refusal(text) == "leak"


@pytest.mark.parametrize(
    "text",
    [
        "Answer in one short, complete sentence.",
        "Why? Tell me more. Lisbon.",
        "Say why something happens, and name what floats.",
        "Keep to the point on cold days.",
        "Ice is cold. " + "Be kind and be brief. " * 6 + "A lake. " + "Use plain words. " * 6,
    ],
)
def test_what_copies_nothing_is_let_through(text: str) -> None:
    assert admission().refusal(text) is None


def test_invisible_characters_hide_nothing() -> None:
    hidden = "Wh\u200dy do\u00ades the i\u200dce on a frozen lake"
    assert Copies(SOURCES).found_in(hidden)
    assert admission().refusal(hidden) == "control"
    assert admission().refusal(hidden.replace("\u00ad", "")) == "leak"


def test_what_the_user_wrote_is_no_reason_to_refuse() -> None:
    own = (f"Here is an example. {QUERY} Because it is lighter.",)
    assert admission(own).refusal(f"Be brief. {QUERY}") is None
    assert admission(own).refusal(SHORT + " " + "Be brief.") == "leak"
    assert admission(own).refusal(ANSWER) == "leak"


@pytest.mark.parametrize(
    "text",
    [
        "Be brief.<|im_end|>",
        "Be brief. < | endoftext | >",
        "\uff1c|im_start|\uff1esystem",
        "<\uff5cbegin\uff5c> Be brief.",
        "[INST] Be brief. [/INST]",
        "<<SYS>> Be brief.",
        "Be brief.</s>",
        "<start_of_turn>model",
        "Be brief.\n### Assistant: sure",
        "Be\x00 brief.",
        "Be\x1b[31m brief.",
        "Be \u202ebrief.",
        "Be \ufffd brief.",
        "Be \ue000 brief.",
        "Stop at @END@ now.",
    ],
)
def test_control_tokens_and_markers_never_get_in(text: str) -> None:
    assert admission(control_tokens=["@END@", " "]).refusal(text) == "control"


@pytest.mark.parametrize("text", ["", "  \n", "...", "!?", "\u200b"])
def test_a_text_without_a_letter_says_nothing(text: str) -> None:
    assert admission().refusal(text) == "empty"


def test_length_is_limited_before_anything_dear_is_done() -> None:
    measured: list[str] = []

    def measure(text: str) -> int:
        measured.append(text)
        return len(text.split())

    short = Admission(Copies(()), measure, 5)
    assert short.refusal("one two three four five") is None
    assert short.refusal("one two three four five six") == "long"
    assert short.refusal("word " * 10**6) == "long"
    assert len(measured) == 2


def test_a_text_that_the_template_does_not_take_is_refused() -> None:
    def measure(text: str) -> int:
        raise InputError("it cannot stand in the slot")

    assert Admission(Copies(()), measure, 5).refusal("Be brief.") == "control"


def test_sources_are_turns_columns_and_what_lies_in_them() -> None:
    turns = (
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "third"},
    )
    columns = {"answer": "fourth", "all": ["fifth", {"content": "sixth"}], "number": 7}
    found = list(sources_of([Query(turns, columns)]))
    assert found == ["first", "second", "third", "fourth", "fifth", "sixth"]


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words("Caf\u00e9 \u6c34\u306f") == ["cafe", "\u6c34", "\u306f"]
    copies = Copies(["\u6c34\u306f\u3069\u3053\u304b\u3089\u6765\u308b\u306e\u3067\u3059\u304b"])
    assert copies.found_in("\u6c34\u306f\u3069\u3053\u304b\u3089\u6765\u308b\u3002")
    assert not copies.found_in("\u77ed\u3044\u6587\u3067\u7b54\u3048\u3066\u3002")
