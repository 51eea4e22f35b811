"""The sentence of an `InputError` is one line that cannot harm a terminal, whatever it quotes."""

from __future__ import annotations

import pickle

from rlprompt.errors import InputError


def test_what_breaks_a_line_or_moves_a_cursor_becomes_a_space() -> None:
    error = InputError("the name 'a\nb\x1b[31m\u2028\u202ec\ud800\0' is wrong; change it")
    assert str(error) == "the name 'a b [31m  c  ' is wrong; change it"
    assert str(error).encode()


def test_a_long_sentence_loses_its_middle() -> None:
    text = str(InputError("begin " + "x" * 100_000 + "; mend it"))
    assert text.startswith("begin ") and text.endswith("; mend it") and len(text) < 1500


def test_it_survives_another_process() -> None:
    error = InputError("the file 'a\tb' is damaged; copy it again")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
