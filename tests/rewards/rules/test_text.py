from __future__ import annotations

import pytest

from rlprompt.rewards.rules.text import (
    content_stems,
    distinct_share,
    ends_complete,
    message_text,
    own_stems,
    sentences,
    stem,
    topic_stems,
    words,
)


def test_message_text_takes_both_formats() -> None:
    assert message_text("plain") == "plain"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert message_text(chat) == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.5 km, isn't it?", ["it's", "3", "5", "km", "isn't", "it"]),
        ("don\u2019t", ["don't"]),
        ("\u6708\u306f red", ["\u6708", "\u306f", "red"]),
        ("--- !", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_sentences() -> None:
    assert sentences("One. Two! Three?\nfour\n\n") == ["One.", "Two!", "Three?", "four"]


@pytest.mark.parametrize(
    "family",
    [
        ("volcano", "volcanoes", "volcano's"),
        ("make", "makes", "making"),
        ("run", "running", "runs"),
        ("city", "cities"),
        ("erupt", "erupted", "erupts", "erupting"),
        ("plan", "planned"),
    ],
)
def test_a_family_of_words_has_one_stem(family: tuple[str, ...]) -> None:
    assert len({stem(word) for word in family}) == 1


def test_topics_and_own_words() -> None:
    query = "Can you please explain what volcanoes are?"
    assert topic_stems(query) == {"volcano"}
    assert content_stems("The volcano is hot") == ["volcano", "hot"]
    assert own_stems(query, "A volcano is an important topic about hot lava.") == {"hot", "lava"}


def test_distinct_share() -> None:
    assert distinct_share([1, 2, 3], 3) == 1.0
    assert distinct_share([1, 1, 1, 1], 2) == pytest.approx(1 / 3)
    assert distinct_share([1], 2) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "Water is wet.",
        'She said "go home."',
        "Is it **cold?**",
        "It works (I think).\n",
        "Arr, matey! \U0001f3f4\u200d\u2620\ufe0f",
        "Use this:\n```python\nprint(1)\n```",
        "\u6708\u306f\u4e38\u3044\u3002",
        "Apples, pears, etc.",
    ],
)
def test_complete_ends(text: str) -> None:
    assert ends_complete(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "Water is",
        "Water is wet,",
        "Water is...",
        "Water is\u2026",
        "Take fruit, e.g.",
        "Ask your Dr.",
        "Steps:\n1. Boil it.\n2.",
        "Use this:\n```",
        "```",
    ],
)
def test_incomplete_ends(text: str) -> None:
    assert not ends_complete(text)
