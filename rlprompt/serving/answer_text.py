"""The text of an answer while its tokens come.

Characters are whole, stop strings end it, and no white space stands at its ends. The pieces joined
are the text that `rlprompt chat` shows of the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF_A_CHARACTER = "\ufffd"
"""What a decoder gives for bytes that are not yet a whole character."""
_LONGEST_WAIT = 8
"""Tokens after which bytes that make no character are shown as they are."""


class AnswerText:
    """One answer that grows by tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        """Begin without a token.

        Args:
            decode: function from token ids to text.
            stop: strings before which the answer ends; the first that occurs counts.
        """
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._shown = 0
        """Tokens whose text was taken."""
        self._before = 0
        """Where the tokens begin that new ones are decoded behind: a tokenizer may join them."""
        self._held = ""
        """Text that is not given out yet."""
        self._given = False
        self.stopped = False
        """Whether a stop string has ended it."""

    def push(self, token_id: int, *, last: bool) -> str:
        """Take a token in; returns what can be told now.

        Args:
            token_id: the token.
            last: whether no more will come.
        """
        if self.stopped:
            return ""
        self._ids.append(token_id)
        self._held += self._new_text(last)
        found = [place for each in self._stop if (place := self._held.find(each)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
        return self._taken(everything=last or self.stopped)

    def _new_text(self, last: bool) -> str:
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        waits = len(self._ids) - self._shown < _LONGEST_WAIT and not last
        if text.endswith(_HALF_A_CHARACTER) and waits:
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def _taken(self, *, everything: bool) -> str:
        """What of the held text is given out."""
        if not self._given:
            kept = 0 if everything else self._may_stop()
            front = len(self._held) - len(self._held.lstrip())
            self._held = self._held[min(front, len(self._held) - kept) :]
        end = len(self._held) if everything else len(self._held) - self._may_stop()
        text = self._held[:end].rstrip()
        self._held = self._held[len(text) :]
        self._given = self._given or bool(text)
        return text

    def _may_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
