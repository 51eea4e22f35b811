"""The system slot: where in a chat template the learned prompt goes.

A template turns a conversation into `head | slot | tail`. The head is the same for every query, the
slot takes a system text or soft tokens, the tail holds the turns of the query and the assistant's
header. How a query's text is kept free of control tokens is told in `tokenization`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.conversation import checked_text, contents_of
from rlprompt.model.chat.template import (
    PLAIN,
    SYSTEM,
    ChatTemplate,
    Hole,
    Layout,
    TemplateLimitError,
    plain_variables,
    template_source,
)
from rlprompt.model.chat.tokenization import Control, Pieces, TextEncoder, strip_beside
from rlprompt.types import Message

_SYSTEM_PROBES = (
    "You are a helpful assistant.",
    "Answer in French",
    "Rules:\n- be brief\n- be kind!",
    "(really?)",
    '"quoted"',
    "count to 42",
    "```\ncode\n```",
    "d\u00e9j\u00e0 vu",
    "x",
)
_THOROUGH_PROBES: tuple[tuple[str, ...], ...] = (
    ("What is 2 + 2? Answer now.",),
    ("What is 2 + 2? Answer now.", "It is four.", "Why?\n\nExplain in two lines."),
)
"""Conversations that every system text is tried with."""
_CONVERSATION_PROBES = (
    *_THOROUGH_PROBES,
    ("",),
    (" \n Hi \t\n",),
    (" Hi \n", "\nYes. \n", "\n more\n\n"),
    ("Hi", "", "And more"),
    ("", "Yes.", ""),
    ("Hi", "<think>\nHm.\n</think>\n\nHello.", "And more"),
    ("Hi", "<think></think>Yes.", "So?", "<think>why\n\n</think>\nBut", "And more"),
)
"""Conversations that a template may treat in a way of its own."""
_SOME_TEXT = "x"
_MOST_KNOWN = 4096
"""Conversations that are remembered as checked; later ones push them all out."""


class _Split(NamedTuple):
    """A layout with a system message, cut at its slot."""

    layout: Layout
    head: Pieces
    """Before the slot."""
    tail: tuple[str | Hole, ...]
    """The parts after it."""


class ChatSlot:
    """Splits the tokens of every conversation into `head | slot | tail`.

    `head_ids + slot_ids(text) + tail_ids(messages)` are the tokens of the template's text for the
    messages under the system text `text`; `none_head_ids + none_tail_ids(messages)` those without a
    system message, a default of the template included. Either way contents give no control tokens.
    Templates that ask for the date get `template.RENDER_DATE`; those without a system role get
    the system text before the first user content (`template.FOLD_SEPARATOR` between).

    Attributes:
        head_ids: Tokens before the slot.
        none_head_ids: Tokens through the last control token before the first user content when no
            system message is given. May be empty (plain template, no beginning-of-text token).
        stop_ids: Tokens that end a completion: the tokenizer's end of text, and the control token
            that the template writes after an assistant message.
        template_hash: sha256 (hex) of the template's Jinja source.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, encoder: TextEncoder
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = encoder
        self._layouts: dict[tuple[int, bool], Layout] = {}
        self._known: dict[tuple[bool | str, ...], Mapping[int, str]] = {}
        self._known_systems: set[str] = set()
        self.template_hash = template.hash

        self._none_head: Pieces | None = None
        self._head: Pieces | None = None
        self._none_head = self._none_split(1)[1]
        self._head = self._split(1).head
        template.check_header()
        self.none_head_ids = encoder.encode_pieces(self._none_head)
        turn_break = self._turn_break()
        end_of_turn = next(iter(encoder.split(turn_break.lstrip())), None)
        stops = [tokenizer.eos_token_id, getattr(end_of_turn, "id", None)]
        self.stop_ids = frozenset(token for token in stops if token is not None)
        # What the template writes after an answer, where that is a control token.
        self._end_id = next((token for token in reversed(stops) if token is not None), None)
        self._check_no_default(turn_break, end_of_turn)
        self._set_boundary()
        self.head_ids = encoder.encode_pieces(through_control(self._head)) + self._left_ids
        for probe in _SYSTEM_PROBES:
            self.slot_ids(probe)
        self._check_against_tokenizer()

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, template: str | None = None
    ) -> ChatSlot:
        """Find the slot of a tokenizer's chat template, and check it.

        Args:
            tokenizer: The tokenizer, with a chat template unless `template` is given.
            template: `"plain"`, the path of a Jinja file, or Jinja source; it replaces the
                tokenizer's own.

        Raises:
            InputError: There is no template, it has no usable slot, or the tokenizer cannot
                tokenise the parts on their own; the sentence says which.
        """
        source = template_source(tokenizer, template)
        variables = plain_variables(tokenizer) if template == PLAIN else {}
        return cls(tokenizer, ChatTemplate(tokenizer, source, variables), TextEncoder(tokenizer))

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return self._template

    @property
    def folds_system(self) -> bool:
        """Whether the template has no system role, so that the slot opens the first user turn."""
        return self._template.folds_system

    @property
    def control_tokens(self) -> Sequence[str]:
        """The control tokens of the tokenizer, as they are spelled; texts never give one."""
        return self._encoder.control_tokens

    def tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after the slot, through the assistant header where the completion starts.

        Args:
            messages: The turns user, assistant, ..., user.

        Raises:
            InputError: The messages are not such turns, or the template cannot take this many.
        """
        contents = contents_of(messages)
        layout, _, tail = self._split(len(contents))
        return self._encoder.encode_pieces(self._fill(layout, tail, contents), inside=True)

    def none_tail_ids(self, messages: Sequence[Message]) -> list[int]:
        """Tokens after `none_head_ids`; arguments and errors as for `tail_ids`."""
        contents = contents_of(messages)
        layout, head = self._none_split(len(contents))
        pieces = self._fill(layout, layout.parts, contents)
        return self._encoder.encode_pieces(pieces[len(head) :], last_control(head))

    def slot_ids(self, text: str) -> list[int]:
        """A system text as tokens of the slot; white space at its ends is dropped.

        Control tokens in the text are plain text. Text of white space only gives no tokens.

        Raises:
            InputError: The text cannot be encoded, or runs into the template around it.
        """
        text = checked_text(text, "The system text").strip()
        if not text:
            return []
        self._check_system(text)
        ids = self._encoder.encode(self._left + self._lead + text + self._right, self._before)
        end = len(ids) - len(self._right_ids)
        start = len(self._left_ids)
        if start > end or ids[:start] != self._left_ids or ids[end:] != self._right_ids:
            raise InputError(
                f"The slot boundary does not tokenise cleanly: the tokenizer joins the system text "
                f"{text[:40]!r} with the template's {self._left!r} before or {self._right!r} after "
                "it; pass a template with a control token there, or a space before line breaks."
            )
        return ids[start:end]

    def _check_system(self, text: str) -> None:
        """Refuse a system text that the template prints in another way than others."""
        if text in self._known_systems:
            return
        filled = {SYSTEM: text, 0: _SOME_TEXT}
        if self._template.printed(self._split(1).layout, filled)[SYSTEM] != text:
            raise InputError(
                f"The chat template leaves a part of the system text {text[:40]!r} out; change "
                "it, or pass a template that prints it."
            )
        if len(self._known_systems) >= _MOST_KNOWN:
            self._known_systems.clear()
        self._known_systems.add(text)

    def completion_ids(self, text: str) -> list[int]:
        """A given answer as the tokens of a completion, the token that ends the turn included.

        Control tokens in the text are plain text; white space at its ends is dropped.

        Raises:
            InputError: The text cannot be encoded or runs into the template, or neither template
                nor tokenizer has a token that ends a completion.
        """
        if self._end_id is None:
            raise InputError(
                "Neither the chat template nor the tokenizer has a token that ends an answer, so "
                "given answers cannot be learned from; choose a base with one."
            )
        header = self._encoder.pieces(self._split(1).tail, {0: ""})
        before = last_control(header)
        last = header[-1] if header else ""
        lead = strip_beside(last, before, None) if isinstance(last, str) else ""
        text = checked_text(text, "An answer").strip()
        lead_ids, ids = (self._encoder.encode(t, before) for t in (lead, lead + text))
        if ids[: len(lead_ids)] != lead_ids:
            raise InputError(
                f"The tokenizer joins the answer {text[:40]!r} with the template's {lead!r} before "
                "it; remove what it begins with."
            )
        return [*ids[len(lead_ids) :], self._end_id]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a completion without special and stop tokens.

        Tokens that the tokenizer does not call special (Qwen3's `<think>`) stay, as rewards look
        for them.
        """
        kept = [token for token in token_ids if token not in self.stop_ids]
        return str(
            self._tokenizer.decode(
                kept, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _layout(self, num_messages: int, *, with_system: bool) -> Layout:
        key = (num_messages, with_system)
        if key not in self._layouts:
            self._layouts[key] = self._template.layout(num_messages, with_system=with_system)
        return self._layouts[key]

    def _split(self, num_messages: int) -> _Split:
        """The layout of a conversation of so many messages, cut at its slot."""
        layout = self._layout(num_messages, with_system=True)
        at = hole_position(layout, SYSTEM)
        before, tail = layout.parts[:at], layout.parts[at + 1 :]
        if any(isinstance(part, Hole) for part in before):
            raise InputError(
                f"The chat template puts the system text after earlier turns when a conversation "
                f"has {num_messages} messages, so queries would share no prefix; use single-turn "
                "queries or another template."
            )
        if not tail or isinstance(tail[0], Hole):
            raise InputError(
                "The slot boundary does not tokenise cleanly: the chat template writes nothing "
                "between the system text and the first message; pass a template that does."
            )
        head = self._encoder.pieces(before, {})
        self._check_constant("system text", self._head, head, num_messages)
        return _Split(layout, head, tail)

    def _none_split(self, num_messages: int) -> tuple[Layout, Pieces]:
        """Layout without a system message, and its pieces that no content can be joined with.

        Those are the ones through the last control token before the first content.
        """
        layout = self._layout(num_messages, with_system=False)
        first = layout.parts[0]
        pieces = self._encoder.split(first) if isinstance(first, str) else []
        pieces = through_control(pieces)
        self._check_constant("first user text", self._none_head, pieces, num_messages)
        return layout, pieces

    @staticmethod
    def _check_constant(where: str, known: Pieces | None, head: Pieces, num_messages: int) -> None:
        if known is not None and head != known:
            raise InputError(
                f"The chat template changes what it writes before the {where} when a conversation "
                f"has {num_messages} messages; use single-turn queries or another template."
            )

    def check(self, messages: Sequence[Message], *, with_system: bool = True) -> None:
        """Refuse messages that `tail_ids` (or `none_tail_ids`) would refuse, without tokenising.

        Args:
            messages: The turns user, assistant, ..., user.
            with_system: Whether a system text stands before them.

        Raises:
            InputError: See `tail_ids`.
        """
        contents = contents_of(messages)
        self._printed(self._whole(len(contents), with_system), contents)

    def _whole(self, num_messages: int, with_system: bool) -> Layout:
        """The checked layout of a conversation."""
        if with_system:
            return self._split(num_messages).layout
        return self._none_split(num_messages)[0]

    def _fill(self, layout: Layout, parts: Sequence[str | Hole], contents: Sequence[str]) -> Pieces:
        return self._encoder.pieces(parts, self._printed(layout, contents))

    def _printed(self, layout: Layout, contents: Sequence[str]) -> Mapping[int, str]:
        """What the template prints of the contents; the system text is the slot's affair."""
        system = any(isinstance(part, Hole) and part.index == SYSTEM for part in layout.parts)
        key: tuple[bool | str, ...] = (system, *contents)
        if key not in self._known:
            self._check_empty(layout, contents)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            filled = {**({SYSTEM: _SOME_TEXT} if system else {}), **dict(enumerate(contents))}
            self._known[key] = self._template.printed(layout, filled)
        return self._known[key]

    @staticmethod
    def _check_empty(layout: Layout, contents: Sequence[str]) -> None:
        parts = layout.parts
        holes = [part for part in parts if isinstance(part, Hole) and part.index != SYSTEM]
        if not layout.accepts_empty and any(h.fill(contents[h.index]) == "" for h in holes):
            raise InputError(
                "A message of the query is empty and the chat template treats empty messages in "
                "its own way; drop such queries from the data."
            )

    def _turn_break(self) -> str:
        """What the template writes between an assistant and a user content; "" if it does not."""
        try:
            layout = self._layout(3, with_system=False)
        except TemplateLimitError:
            raise
        except InputError:  # a template for single turns
            return ""
        part = layout.parts[hole_position(layout, 1) + 1]
        return part if isinstance(part, str) else ""

    def _check_no_default(self, turn_break: str, end_of_turn: str | Control | None) -> None:
        """Refuse a template that writes its default system message beside ours."""
        _, head, tail = self._split(1)
        layout, _ = self._none_split(1)
        head_text = "".join(p.text if isinstance(p, Control) else p for p in head)
        literals = [part for part in tail if isinstance(part, str)]
        none_text = layout.parts[0] if isinstance(layout.parts[0], str) else ""
        default = added_text(none_text, head_text, turn_break or literals[0])
        sentences = [p.strip() for p in self._encoder.split(default) if isinstance(p, str)]
        given = "\0".join([head_text, *literals])
        is_beside = any(len(text.split()) > 1 and text in given for text in sentences)
        if isinstance(end_of_turn, Control):
            # A whole turn before ours, or one more between ours and the user's.
            is_beside |= end_of_turn in head[1:]
            is_beside |= self._encoder.split(literals[0]).count(end_of_turn) > 1
        if is_beside:
            raise InputError(
                "The chat template writes a system message of its own beside the given one, so the "
                "learned prompt would not stand alone; pass a template that leaves it out."
            )

    def _set_boundary(self) -> None:
        """Remember the texts that touch the slot."""
        _, head, tail = self._split(1)
        after = self._encoder.pieces(tail[:1], {})
        last = head[-1] if head else ""
        self._before = last_control(head)
        left = strip_beside(last, self._before, None) if isinstance(last, str) else ""
        # Tokenizers join a space with the word after it, so that the space belongs to the slot.
        self._left = left.rstrip(" ")
        self._lead = left[len(self._left) :]
        self._left_ids = self._encoder.encode(self._left, self._before)
        self._right = ""
        if isinstance(after[0], str):
            following = after[1] if len(after) > 1 else None
            # Where the text goes on with the first message, a word stands for that.
            word = "x" if following is None and len(tail) > 1 else ""
            self._right = strip_beside(after[0] + word, None, following)
        self._right_ids = self._encoder.encode_inside(self._right)

    def _check_against_tokenizer(self) -> None:
        """Compare harmless conversations with what the tokenizer makes of the rendered text."""
        for contents in _CONVERSATION_PROBES:
            is_thorough = contents in _THOROUGH_PROBES
            for system in (None, *_SYSTEM_PROBES[: None if is_thorough else 1]):
                if self._takes_as_text(contents, with_system=system is not None):
                    ours = self._ids(system, contents)
                    self._check_equal(self._template.render(system, contents), ours)

    def _takes_as_text(self, contents: Sequence[str], *, with_system: bool) -> bool:
        """Whether the template takes this conversation and prints no control token of a content.

        A query that it cannot take is told later.
        """
        try:
            printed = self._printed(self._whole(len(contents), with_system), contents)
        except TemplateLimitError:
            raise
        except InputError:
            return False
        pieces = [piece for i in range(len(contents)) for piece in self._encoder.split(printed[i])]
        return not any(isinstance(piece, Control) for piece in pieces)

    def _ids(self, system: str | None, contents: Sequence[str]) -> list[int]:
        """A whole conversation."""
        messages = [
            {"role": ("user", "assistant")[place % 2], "content": text}
            for place, text in enumerate(contents)
        ]
        if system is None:
            return self.none_head_ids + self.none_tail_ids(messages)
        return self.head_ids + self.slot_ids(system) + self.tail_ids(messages)

    def _check_equal(self, text: str, ids: list[int]) -> None:
        if list(self._tokenizer(text, add_special_tokens=False)["input_ids"]) != ids:
            raise InputError(
                "The tokenizer reads the chat template's text in a way that rlprompt cannot "
                "reproduce piece by piece; pass another template or use another model."
            )


# Small questions about the pieces of a rendered template.


def hole_position(layout: Layout, index: int) -> int:
    """Where the hole of a content (or SYSTEM) stands among a layout's parts."""
    parts = enumerate(layout.parts)
    return next(i for i, part in parts if isinstance(part, Hole) and part.index == index)


def last_control(pieces: Pieces) -> Control | None:
    """The last control token; None without one."""
    return next((piece for piece in reversed(pieces) if isinstance(piece, Control)), None)


def through_control(pieces: Pieces) -> Pieces:
    """The pieces without the text after the last control token."""
    return pieces[:-1] if pieces and isinstance(pieces[-1], str) else pieces


def added_text(none: str, head: str, turn_break: str) -> str:
    """What a template writes only when no system message is given."""
    rest = none[shared_length(none, head) :]
    return rest[: len(rest) - shared_length(rest[::-1], turn_break[::-1])]


def shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
