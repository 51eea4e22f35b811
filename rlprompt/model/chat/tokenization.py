"""Turn conversations into tokens without ever parsing control tokens out of what people wrote.

Control tokens count in what a template writes (the literals of `template.Layout`), and never in a
content (its holes). Between two control tokens of the literals the text is tokenised in one piece
by a copy of the tokenizer that knows no control tokens. For harmless contents this gives exactly
the tokens of the rendered text; for harmful ones it never gives a control token.

A control token is any added token, special or not, except those that are not special and only
stand for white space or one character (Gemma and GPT-NeoX add those as plain vocabulary).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.template import Hole

_WHITE_SPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode White_Space, which added tokens strip; Python's `strip()` takes a little more."""

_LEAD = "x"
"""A word to stand before a text that continues a run."""


@dataclass(frozen=True)
class Control:
    """A token that only the template may write."""

    id: int
    text: str
    lstrip: bool
    """The token swallows white space on its left."""
    rstrip: bool
    normalized: bool


Pieces = list[str | Control]
"""Texts and control tokens in order."""


class TextEncoder:
    """Encodes pieces of a conversation: control tokens by id, texts as plain text.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library; it is not changed.

    Raises:
        InputError: The tokenizer is of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise InputError(
                f"The tokenizer {type(tokenizer).__name__} is not one of the tokenizers library, "
                "whose texts rlprompt can keep free of control tokens; use a model folder that "
                "holds a tokenizer.json."
            )
        added = backend.get_added_tokens_decoder()
        self._controls = {t.content: _control(i, t) for i, t in added.items() if is_control(t)}
        self._control_ids = frozenset(control.id for control in self._controls.values())
        # Unknown characters are no harm, unless their token would end the conversation.
        is_harmless = tokenizer.unk_token_id != tokenizer.eos_token_id
        self._unknown = (tokenizer.unk_token_id if is_harmless else None, tokenizer.unk_token)
        longest_first = sorted(map(re.escape, self._controls), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or r"(?!)")
        self._build_plain(backend, {i: t for i, t in added.items() if not is_control(t)})

    def _build_plain(self, backend: Tokenizer, words: Mapping[int, AddedToken]) -> None:
        """Share model and pre-processing with the tokenizer, but not its control tokens."""
        plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
        # New tokens are numbered from the vocabulary's size; where that has gaps they would take
        # ids that mean something, so fill up to the first free one. Secrets keep texts from
        # spelling these tokens.
        secret = f"q{secrets.token_hex(16)}"
        first_free = max([*backend.get_vocab(with_added_tokens=True).values(), -1]) + 1
        num_missing = first_free - plain.get_vocab_size()
        plain.add_special_tokens([f"{secret}f{i}q" for i in range(num_missing)])
        self._anchors: dict[bool, str] = {}
        for normalized in (False, True):
            anchor = self._anchors[normalized] = f"{secret}n{int(normalized)}q"
            plain.add_special_tokens([AddedToken(anchor, special=True, normalized=normalized)])
        plain.add_tokens(list(words.values()))
        self._original_ids = {
            new: old
            for old, token in words.items()
            if (new := plain.token_to_id(token.content)) is not None and new != old
        }
        self._plain = plain

    @property
    def control_tokens(self) -> Sequence[str]:
        """The control tokens of the tokenizer, as they are spelled."""
        return tuple(self._controls)

    def split(self, literal: str) -> Pieces:
        """A text of the template as plain texts (never empty) and control tokens."""
        pieces: Pieces = []
        end = 0
        for found in self._pattern.finditer(literal):
            pieces += [literal[end : found.start()], self._controls[found.group()]]
            end = found.end()
        return [piece for piece in [*pieces, literal[end:]] if piece != ""]

    def pieces(self, parts: Sequence[str | Hole], contents: Mapping[int, str]) -> Pieces:
        """Fill the holes; neighbouring texts are joined, so texts and control tokens alternate."""
        joined: Pieces = []
        for part in parts:
            filled: Pieces = self.split(part) if isinstance(part, str) else [_fill(part, contents)]
            for piece in filled:
                if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                    joined[-1] += piece
                elif piece != "":
                    joined.append(piece)
        return joined

    def encode_pieces(
        self, pieces: Pieces, previous: Control | None = None, *, inside: bool = False
    ) -> list[int]:
        """Token ids of pieces in order.

        Args:
            pieces: The pieces, as `TextEncoder.pieces` returns them.
            previous: The control token before the first piece, if any.
            inside: Whether the first piece, if a text, goes on with a text that is not part of
                `pieces`.

        Raises:
            InputError: A text cannot be tokenised on its own (see `encode_inside`).
        """
        ids: list[int] = []
        for position, piece in enumerate(pieces):
            if isinstance(piece, Control):
                ids.append(piece.id)
                previous = piece
                continue
            following = pieces[position + 1] if position + 1 < len(pieces) else None
            text = strip_beside(piece, previous, following)
            starts_inside = inside and position == 0
            ids += self.encode_inside(text) if starts_inside else self.encode(text, previous)
        return ids

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that goes on after a word.

        Raises:
            InputError: The tokenizer joins the word and the text.
        """
        word = self.encode(_LEAD, None)
        ids = self.encode(_LEAD + text, None)
        if ids[: len(word)] != word:
            raise InputError(
                f"The tokenizer joins the text {text[:20]!r} with the word before it, so it has no "
                "tokens of its own; pass a template with white space or a control token there."
            )
        return ids[len(word) :]

    def encode(self, text: str, previous: Control | None) -> list[int]:
        """Token ids of a plain text that follows a control token, or (None) starts everything.

        Control tokens are not parsed. A vocabulary that spells one as a plain word (Unigram does)
        has the text cut inside that word.
        """
        if text == "":
            return []
        anchor = "" if previous is None else self._anchors[previous.normalized]
        encoding = self._plain.encode(anchor + text, add_special_tokens=False)
        start = encoding.tokens.index(anchor) + 1 if anchor else 0
        ids = [self._original_ids.get(i, i) for i in encoding.ids[start:]]
        if self._control_ids.isdisjoint(ids):
            return ids
        spans = [(a - len(anchor), b - len(anchor)) for a, b in encoding.offsets[start:]]
        cuts = [
            (a + b + 1) // 2
            for number, (a, b) in zip(ids, spans, strict=True)
            if self._is_spelled_control(number, text[a:b])
        ]
        return ids if not cuts else self._encode_cut(text, cuts, previous)

    def _is_spelled_control(self, number: int, span: str) -> bool:
        if number not in self._control_ids:
            return False
        unknown_id, unknown_text = self._unknown
        if number == unknown_id and span != unknown_text:
            return False
        if len(span) < 2:
            raise InputError(
                f"The tokenizer turns the character {span!r} into a control token, so texts that "
                "hold it cannot be used; remove it or use another model."
            )
        return True

    def _encode_cut(self, text: str, cuts: Sequence[int], previous: Control | None) -> list[int]:
        inner = Control(-1, "", lstrip=False, rstrip=False, normalized=False)
        ids = self.encode(text[: cuts[0]], previous)
        for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
            ids += self.encode(text[start:end], inner)
        return ids


def strip_beside(text: str, previous: str | Control | None, following: str | Control | None) -> str:
    """A text without the white space that the control tokens beside it swallow."""
    if isinstance(previous, Control) and previous.rstrip:
        text = text.lstrip(_WHITE_SPACE)
    if isinstance(following, Control) and following.lstrip:
        text = text.rstrip(_WHITE_SPACE)
    return text


def _fill(hole: Hole, contents: Mapping[int, str]) -> str:
    return hole.fill(contents[hole.index])


def _control(number: int, token: AddedToken) -> Control:
    return Control(number, token.content, token.lstrip, token.rstrip, bool(token.normalized))


def is_control(token: AddedToken) -> bool:
    """Whether an added token is one that only a template may write; see the module."""
    is_layout = not token.content.strip(_WHITE_SPACE + "\u2581") or len(token.content) == 1
    return bool(token.special) or not is_layout
