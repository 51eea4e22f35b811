"""The card is a page for people, whatever the names and texts in it."""

from __future__ import annotations

from typing import Any

from rlprompt.artifacts.card import card


def card_of(**changes: Any) -> str:
    info = {
        "name": "concise",
        "representation": "soft",
        "num_virtual_tokens": 16,
        "init_text": "Be brief.",
        "base": "org/model",
        "base_fingerprint": "f" * 64,
        "template_hash": "t" * 64,
        "created": "2026-01-01T00:00:00+00:00",
        "recipe": {"prompt": {"type": "soft"}},
        "metrics": {"heldout_reward_before": -1.23456, "heldout_reward_handwritten": None},
    }
    return card({**info, **changes})


def test_it_says_what_the_prompt_is_and_how_it_did() -> None:
    text = card_of()
    assert text.startswith("# concise: a learned system prompt\n")
    assert "soft prompt of 16 positions" in text and "org/model" in text
    assert "| started from | Be brief. |" in text
    assert "-1.235 |" in text and "| heldout\\_reward\\_handwritten | - |" in text
    assert "rlprompt chat" in text and text.endswith("\n")


def test_it_says_how_to_name_a_class_of_ones_own() -> None:
    assert "rlprompt chat . --compare\n" in card_of()
    own = card_of(recipe={"prompt": {"type": "my prompts.py:Mine"}})
    assert "rlprompt chat . --compare --prompt-class 'my prompts.py:Mine'\n" in own


def test_a_random_start_and_no_results() -> None:
    text = card_of(init_text="", metrics={})
    assert "| started from | random embeddings |" in text
    assert "Held-out" not in text


def test_texts_neither_break_the_table_nor_act_as_markup() -> None:
    nasty = 'a | b\n\n# Heading\r\n<script>alert("x")</script> [link](http://evil) `code` *b* \\|'
    text = card_of(name="x\n# y", init_text=nasty, base="b<i>")
    row = next(line for line in text.splitlines() if line.startswith("| started from"))
    assert row == (
        '| started from | a \\| b # Heading &lt;script&gt;alert("x")&lt;/script&gt; '
        "\\[link\\](http://evil) \\`code\\` \\*b\\* \\\\\\| |"
    )
    assert "<script" not in text and "<i>" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# x # y: a learned system prompt",
        "## Held-out results",
        "## Limits",
        "## Use",
    ]


def test_it_says_how_the_prompt_was_made_and_what_it_is_not() -> None:
    recipe: dict[str, Any] = {
        "algorithm": {"type": "grpo"},
        "training": {"steps": 40},
        "data": {"path": "queries.jsonl"},
        "seed": 7,
        "rewards": [
            {"name": "short", "path": "short.py:reward", "role": "score", "weight": 2.0},
            {"name": "polite", "path": "builtin:polite", "role": "constraint", "weight": 1.0},
            {"name": "length", "path": "builtin:length", "role": "metric", "weight": 1.0},
        ],
    }
    text = card_of(recipe=recipe)
    told = "It was learned so that answers raise short (weight 2); keep within its limit polite."
    assert told in text
    for row in (
        "| method | grpo, 40 steps |",
        "| data | queries.jsonl |",
        "| reward short | score: short.py:reward |",
        "| reward length | metric: builtin:length |",
        "| seed | 7 |",
    ):
        assert row in text
    assert "Nothing has shown it to be better" in text and "Nothing is certified" in text
    shown = card_of(metrics={"verdict": "Better by 1."}, certificate={"statement": "At most 5%."})
    assert "Nothing" not in shown and "At most 5%." in shown and "**Better by 1.**" in shown


def test_a_recipe_of_a_stranger_breaks_nothing() -> None:
    recipes: tuple[dict[str, Any], ...] = (
        {"rewards": 3, "data": [1], "training": "x", "algorithm": None, "search": 1, "model": 2},
        {"rewards": [1, None, {"weight": {}}], "data": {"rows": 5}, "prompt": "x"},
    )
    for recipe in recipes:
        assert card_of(recipe=recipe).startswith("# concise")
