"""Which tokens may be written, and which rows of tokens are a text."""

from __future__ import annotations

import random

import pytest

from rlprompt.errors import InputError
from rlprompt.search.vocabulary import Vocabulary, is_printable
from tests.fixtures.runs import tiny_policy
from tests.fixtures.tiny import ENDOFTEXT_ID, IM_END_ID, IM_START_ID

POLICY = tiny_policy()
VOCABULARY = Vocabulary(POLICY, ascii_only=True)
WIDE = Vocabulary(POLICY, ascii_only=False)


def test_every_row_that_is_a_text_comes_back_as_the_same_tokens() -> None:
    """Most rows of drawn tokens are none: byte pairs would be merged, spaces stripped."""
    draw = random.Random(0)
    allowed = VOCABULARY.allowed.nonzero().flatten().tolist()
    texts = 0
    for _ in range(300):
        row = [draw.choice(allowed) for _ in range(4)]
        text = VOCABULARY.text_of(row)
        if text is None:
            continue
        texts += 1
        assert POLICY.slot_ids(text) == row
        whole = POLICY.base.tokenizer(f"<|im_start|>system\n{text}<|im_end|>\n").input_ids
        assert list(whole)[: len(POLICY.head_ids) + 4] == [*POLICY.head_ids, *row]
    assert 10 < texts < 290


def test_control_tokens_are_never_written() -> None:
    for token in (ENDOFTEXT_ID, IM_START_ID, IM_END_ID):
        assert not VOCABULARY.allowed[token] and not WIDE.named[token]
        assert VOCABULARY.text_of([*POLICY.slot_ids("the rain"), token]) is None


def test_tokens_to_put_in_are_printable_and_ascii_unless_others_are_wanted() -> None:
    texts = [POLICY.decode([t]) for t in VOCABULARY.allowed.nonzero().flatten().tolist()]
    assert texts and all(text.isascii() and text.isprintable() for text in texts)
    assert WIDE.allowed.sum() >= VOCABULARY.allowed.sum()
    assert "\n" not in texts and "" not in texts


@pytest.mark.parametrize("text", ["the rain", "Rules:\n- be brief", "d\u00e9j\u00e0 vu"])
def test_a_start_may_have_line_breaks_and_other_letters(text: str) -> None:
    assert VOCABULARY.text_of(VOCABULARY.ids_of(text)) == text


@pytest.mark.parametrize("text", ["the\x07rain", "the \ufffd rain"])
def test_a_start_that_cannot_be_printed_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="do not decode to a text of the same tokens"):
        VOCABULARY.ids_of(text)


def test_white_space_at_the_ends_is_no_part_of_a_text() -> None:
    space = POLICY.base.tokenizer(" ").input_ids
    assert VOCABULARY.text_of([*POLICY.slot_ids("the rain"), *space]) is None
    assert VOCABULARY.text_of(space) is None


def test_what_can_be_printed() -> None:
    assert is_printable("two\nlines") and is_printable("caf\u00e9")
    assert not any(is_printable(text) for text in ("", "\ufffd", "a\tb", "\x00", "a\u200b"))
