"""Chat templates: where a template comes from, and where it puts the contents of a conversation.

A chat template is rendered once with markers in place of every content, so each character of the
result is known to be the template's (a literal) or a content (a hole).
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.render import LimitError, RenderError, render
from rlprompt.reading.files import expanded, read_text, reason
from rlprompt.types import Message
from rlprompt.user_code import as_submitted

logger = logging.getLogger(__name__)

PLAIN = "plain"
"""Name of the template for base models that have none."""

# The space before a blank line keeps tokenizers that join punctuation with line breaks from joining
# the end of the system text with the template.
PLAIN_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{{- 'System:\\n' + (messages[0]['content'] | trim) + ' \\n\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- 'User: ' + (message['content'] | trim) + '\\nAssistant:' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + (message['content'] | trim) + '\\n\\n' }}
{%- endif %}
{%- endfor %}"""

SYSTEM = -1
"""The index of the hole that takes the system text; other holes carry their message's index."""

FOLD_SEPARATOR = "\n\n"
"""Between system text and first user content, where the template has no system role."""

MOST_BYTES = 1 << 20
"""Of a template's file."""

RENDER_DATE = date(2024, 7, 26)
"""What a template that asks for today's date is told (Llama 3.1's own default): the tokens before
the slot must not change from one day to the next."""


class TemplateLimitError(InputError):
    """A template takes more time or memory than any template needs: no sign of what it supports."""


@dataclass(frozen=True)
class Hole:
    """A place in a rendered template that takes a content."""

    index: int
    """Message index, or `SYSTEM`."""
    strips_left: bool
    strips_right: bool

    def fill(self, content: str) -> str:
        """The content as the template would print it here."""
        content = content.lstrip() if self.strips_left else content
        return content.rstrip() if self.strips_right else content


@dataclass(frozen=True)
class Layout:
    """What a template prints for a number of messages: literals and holes in order."""

    parts: tuple[str | Hole, ...]
    accepts_empty: bool
    """False when the template prints something else around an empty content."""

    def filled(self, contents: Mapping[int, str]) -> str:
        """The text with contents in the holes.

        Args:
            contents: content by the index of its hole.
        """
        return "".join(
            part if isinstance(part, str) else part.fill(contents[part.index])
            for part in self.parts
        )


def template_source(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The Jinja source that a `template` argument of `ChatSlot.from_tokenizer` names.

    Raises:
        InputError: There is no such file, or None is given and the tokenizer has no template.
    """
    if template == PLAIN:
        return PLAIN_TEMPLATE
    if template is not None:
        return read_template(template, Path())
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise InputError(
            f"The tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; pass "
            f"template: {PLAIN} for a base model, or the path of a Jinja file."
        )
    return str(own)


def read_template(template: str, folder: Path) -> str:
    """A `template` argument with a path, relative to `folder`, replaced by the file's text.

    Raises:
        InputError: It is a path and the file cannot be read or holds no Jinja.
    """
    if template == PLAIN or _is_source(template):
        return template
    try:
        text = read_text(as_submitted(folder / expanded(template, "model.template")), MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The template {template[:200]!r} is neither {PLAIN!r} nor Jinja source nor a file "
            f"that can be read ({reason(error)}); check the path, relative to the recipe's folder."
        ) from error
    if not _is_source(text):
        raise InputError(
            f"The file {template!r} holds no Jinja, so it is not a chat template; name another "
            "file."
        )
    return text


def _is_source(template: str) -> bool:
    return "{{" in template or "{%" in template


def plain_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The plain template starts with BOS exactly where the tokenizer itself would write one."""
    starts = tokenizer("x")["input_ids"][:1]
    writes_bos = tokenizer.bos_token_id is not None and starts == [tokenizer.bos_token_id]
    return {"bos_token": str(tokenizer.bos_token) if writes_bos else ""}


def template_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The special tokens, by the names that templates call them."""
    return {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}


class ChatTemplate:
    """A Jinja chat template as a function from conversation shape to `Layout`.

    Args:
        tokenizer: The tokenizer, which renders (its special tokens are the template's variables).
        text: The Jinja source.
        variables: Further variables of the template; they win over the tokenizer's.

    Raises:
        InputError: The template cannot be rendered for one user message.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, text: str, variables: Mapping[str, Any]
    ) -> None:
        self.text = text
        self.variables = dict(variables)
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self._all_variables = template_variables(tokenizer) | dict(variables)
        self._source = _date_macro(text) + text
        # Letters and digits only, so no trimming touches it; the hash keeps it out of the template.
        self._salt = f"q{self.hash[:20]}"
        self._marker = re.compile(rf"{self._salt}a(\d{{6}})z")
        self._render(self.conversation(None, ["a"]))
        self.folds_system = False
        self.folds_system = self._refuses_system()
        if self.folds_system:
            logger.info(
                "the chat template has no system role: the prompt opens the first user turn"
            )

    @property
    def source(self) -> str:
        """The Jinja that is rendered, which asks for no date; variables may be given beside it."""
        return self._source

    @property
    def mark(self) -> str:
        """Letters and digits that the template itself does not write."""
        return self._mark(SYSTEM)

    def conversation(self, system: str | None, contents: Sequence[str]) -> list[Message]:
        """The messages for contents that alternate user, assistant, ..., user.

        A template that refuses the system role gets the system text in front of the first user
        content, `FOLD_SEPARATOR` between them.
        """
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
        if system is None:
            return turns
        if self.folds_system:
            turns[0]["content"] = system + FOLD_SEPARATOR + turns[0]["content"]
            return turns
        return [{"role": "system", "content": system}, *turns]

    def render(self, system: str | None, contents: Sequence[str]) -> str:
        """The template's text through the generation prompt.

        Raises:
            InputError: The template raised an error.
        """
        return self._render(self.conversation(system, contents))

    def layout(self, num_messages: int, *, with_system: bool) -> Layout:
        """Find where the contents land.

        Raises:
            InputError: The template fails, drops or repeats a content, or changes one in another
                way than stripping white space at its ends.
        """
        indices = [*([SYSTEM] if with_system else []), *range(num_messages)]
        literals, order = self._split(self._fill(indices, self._mark))
        _check_every_content_once(indices, order)
        sides = self._stripped_sides(literals, order, "\n\u2003")
        if sides != self._stripped_sides(literals, order, " \u2003"):
            raise InputError(_CHANGES_CONTENT)
        parts: list[str | Hole] = [literals[0]]
        for index, (left, right), literal in zip(order, sides, literals[1:], strict=True):
            parts += [Hole(index, left, right), literal]
        return Layout(
            tuple(part for part in parts if part != ""), self._accepts_empty(indices, literals)
        )

    def printed(self, layout: Layout, contents: Mapping[int, str]) -> Mapping[int, str]:
        """What the template prints of each content in a conversation, checked to the letter.

        Usually that is the content. A template may leave a part of it out (thoughts of earlier
        turns are a custom), and what is left is the content then.

        Args:
            layout: the layout for as many messages.
            contents: content by index, with `SYSTEM` where the layout has a system message.

        Raises:
            InputError: it prints something else, because of what the contents say.
        """
        indices = sorted(contents)
        text = self._fill(indices, contents.__getitem__)
        if layout.filled(contents) == text:
            return contents
        left = {index: self._left_of(layout, contents, index) for index in indices}
        known = {index: part for index, part in left.items() if part is not None}
        if len(known) == len(indices) and layout.filled(known) == text:
            return known
        treated = next((i for i in indices if known.get(i) != contents[i]), indices[-1])
        who = "the system text" if treated == SYSTEM else f"message {treated} of a query"
        raise InputError(
            f"The chat template changes its text because of what {who} says "
            f"({contents[treated][:60]!r}), so its tokens cannot be found; change that text, or "
            "pass a template that prints contents as they are."
        )

    def _left_of(self, layout: Layout, contents: Mapping[int, str], index: int) -> str | None:
        """The part of one content that is printed while markers stand for the others.

        None where what is printed in its place is no part of it.
        """
        marks = {i: self._mark(i) for i in contents}
        place = next(
            number
            for number, part in enumerate(layout.parts)
            if isinstance(part, Hole) and part.index == index
        )
        before = Layout(layout.parts[:place], layout.accepts_empty).filled(marks)
        after = Layout(layout.parts[place + 1 :], layout.accepts_empty).filled(marks)
        text = self._fill(sorted(contents), lambda i: contents[i] if i == index else marks[i])
        if len(text) < len(before) + len(after):
            return None
        if not (text.startswith(before) and text.endswith(after)):
            return None
        left = text[len(before) : len(text) - len(after)]
        return left if left in contents[index] else None

    def check_header(self) -> None:
        """Refuse a template that leaves the assistant's header out when it is asked for one.

        Raises:
            InputError: it prints the same with and without `add_generation_prompt`, and something
                stands before the assistant's content that is not there for the answer to come.
        """
        turn, mark = self.conversation(None, [self._mark(0)]), self._mark(0)
        asked, unasked = self._render(turn), self._render(turn, header=False)
        if asked.rstrip() != unasked.rstrip():
            return
        opening = self._opening()
        written = asked.rpartition(mark)[2]
        if opening is not None and written.rstrip().startswith(opening.rstrip()):
            return
        raise InputError(
            "The chat template writes no header of the assistant when it is asked for one "
            "(add_generation_prompt), so an answer would continue the user's turn; pass a template "
            "that ends with the header."
        )

    def _opening(self) -> str | None:
        """What stands between a user's content and the assistant's; None where neither shows.

        Earlier turns are asked first: some templates write more before the last answer.
        """
        for count in (3, 2):
            turns = self.conversation(None, [self._mark(i) for i in range(count)])
            try:
                literals, order = self._split(self._render(turns, header=count == 3))
            except InputError:  # a template for single turns
                continue
            if order[:2] == [0, 1]:
                return literals[1]
        return None

    def _fill(self, indices: Sequence[int], content: Callable[[int], str]) -> str:
        system = content(SYSTEM) if SYSTEM in indices else None
        return self.render(system, [content(i) for i in indices if i != SYSTEM])

    def _mark(self, index: int) -> str:
        return f"{self._salt}a{index + 1:06d}z"

    def _split(self, text: str) -> tuple[list[str], list[int]]:
        pieces = self._marker.split(text)
        return pieces[::2], [int(number) - 1 for number in pieces[1::2]]

    def _stripped_sides(
        self, literals: Sequence[str], order: Sequence[int], pad: str
    ) -> list[tuple[bool, bool]]:
        inside = f" Ab\u00e9 <i>&\"'\\ \r\n\n\t{{{{ 7*7 }}}} Z{self._salt}e"
        back = pad[::-1]
        pattern = re.escape(literals[0])
        for index, literal in zip(order, literals[1:], strict=True):
            core = re.escape(self._mark(index) + inside)
            pattern += f"((?:{re.escape(pad)})?){core}((?:{re.escape(back)})?){re.escape(literal)}"
        text = self._fill(sorted(order), lambda index: pad + self._mark(index) + inside + back)
        found = re.fullmatch(pattern, text)
        if found is None:
            raise InputError(_CHANGES_CONTENT)
        stripped = [kept == "" for kept in found.groups()]
        return list(zip(stripped[::2], stripped[1::2], strict=True))

    def _accepts_empty(self, indices: Sequence[int], literals: Sequence[str]) -> bool:
        try:
            text = self._fill(indices, lambda index: self._mark(index) if index == SYSTEM else "")
        except TemplateLimitError:
            raise
        except InputError:
            return False
        return self._marker.sub("", text) == "".join(literals)

    def _refuses_system(self) -> bool:
        try:
            self.render("a", ["a"])
        except TemplateLimitError:
            raise
        except InputError:
            return True
        return False

    def _render(self, messages: list[Message], *, header: bool = True) -> str:
        try:
            return render(self._source, messages, self._all_variables, add_generation_prompt=header)
        except LimitError as error:
            raise TemplateLimitError(
                f"The chat template cannot be rendered within limits ({error}), so its program may "
                "have no end; pass another template."
            ) from error
        except RenderError as error:
            raise InputError(
                f"The chat template fails on the roles {[m['role'] for m in messages]} "
                f"({error}); use conversations that it supports or pass another template."
            ) from error


_CHANGES_CONTENT = (
    "The chat template changes message contents in another way than stripping white space at "
    "their ends, so the tokens of a content cannot be told apart; pass a template that prints "
    "contents as they are."
)


def _check_every_content_once(indices: Sequence[int], order: Sequence[int]) -> None:
    if SYSTEM in indices and SYSTEM not in order:
        raise InputError(
            "The chat template leaves the system message out, so there is no slot for a prompt; "
            "pass a template that prints it."
        )
    if sorted(order) != sorted(indices):
        raise InputError(
            f"The chat template drops, repeats or rewrites the content of some of {len(indices)} "
            "messages, so their tokens cannot be found; use shorter queries or another template."
        )


def _plain(token: object) -> object:
    """A special token, or a list of them, as text."""
    return [str(each) for each in token] if isinstance(token, list | tuple) else str(token)


def _date_macro(text: str) -> str:
    """A macro that hides transformers' `strftime_now`; template variables cannot be functions."""
    if "strftime_now" not in text:
        return ""
    value = "format"
    for letter in "aAbBdHIjmMpSyYf":
        padded = RENDER_DATE.strftime(f"%{letter}")
        value += f' | replace("%{letter}", "{padded}")'
        value += f' | replace("%-{letter}", "{padded.lstrip("0") or 0}")'
    # The newline is removed by Jinja's trim_blocks, so the template starts as it did.
    return f"{{% macro strftime_now(format) %}}{{{{ {value} }}}}{{% endmacro %}}\n"
