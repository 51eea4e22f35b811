"""Which tokens a text prompt may be made of, and which rows of tokens are a text at all.

A prompt of tokens is only as good as its text: whoever uses it sends the text, and the tokenizer
makes tokens of it again. So text -> tokens -> text must be a fixed point, with the template's own
tokens on both sides of the slot.

Letters: V vocabulary, m slot tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.model.chat.tokenization import is_control
from rlprompt.policy import Policy


class Vocabulary:
    """The tokens that a searcher may write."""

    def __init__(self, policy: Policy, *, ascii_only: bool) -> None:
        """Read every token once.

        Args:
            policy: the policy whose tokens are written.
            ascii_only: whether tokens with other characters are left out.

        Raises:
            InputError: no token is left.
        """
        self._policy = policy
        self._controls = _control_ids(policy)
        kept = [
            token not in self._controls and _is_writable(policy.decode([token]), ascii_only)
            for token in range(policy.vocab_size)
        ]
        self.allowed: Tensor = torch.tensor(kept)
        """Bool [V]: tokens that may be put in. Those that a text began with may stay."""
        named = [token not in self._controls for token in range(policy.vocab_size)]
        self.named: Tensor = torch.tensor(named)
        """Bool [V]: all that are no control tokens."""
        if not self.allowed.any():
            raise InputError(
                f"no token of {policy.base.id} can be written as printable text; set "
                "search.ascii_only: false, or choose another base"
            )

    def text_of(self, token_ids: Sequence[int]) -> str | None:
        """The text whose slot tokens these are.

        Returns:
            None where there is none: the tokenizer would cut the text in another way, or join it
            with the template around it; it begins or ends with white space; it holds a control
            token or a character that cannot be printed.
        """
        if not self._controls.isdisjoint(token_ids):
            return None
        text = self._policy.decode(token_ids)
        if text != text.strip() or not is_printable(text):
            return None
        try:
            is_fixed = self._policy.slot_ids(text) == list(token_ids)
        except InputError:
            return None  # it runs into the template
        return text if is_fixed else None

    def ids_of(self, text: str) -> list[int]:
        """The slot tokens of a text, which must come back as a text of the same tokens.

        Raises:
            InputError: they do not, or the text runs into the template.
        """
        token_ids = self._policy.slot_ids(text)
        if self.text_of(token_ids) is None:
            raise InputError(
                f"the tokens of the text {text[:40]!r} do not decode to a text of the same tokens, "
                "so a search among tokens cannot begin there; write it with plain printable "
                "characters"
            )
        return token_ids


def is_printable(text: str) -> bool:
    """Whether a text has a character, and only such as can be printed; line breaks can be."""
    # U+FFFD is what half a character decodes to.
    return bool(text) and all(_is_printed(letter) for letter in text)


def _is_printed(letter: str) -> bool:
    return letter == "\n" or (letter.isprintable() and letter != "\ufffd")


def _is_writable(text: str, ascii_only: bool) -> bool:
    if not is_printable(text) or "\n" in text:
        return False
    return text.isascii() or not ascii_only


def _control_ids(policy: Policy) -> frozenset[int]:
    added = policy.base.tokenizer.added_tokens_decoder
    return policy.stop_ids | {number for number, token in added.items() if is_control(token)}
