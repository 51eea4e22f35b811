"""Chat templates that travel with an export, so that a program without rlprompt gets our tokens.

Each is the base's own template between a few tags. The system turn is put in front of the messages;
where the prompt is no text, a mark stands for it, and the rendered text is cut at the mark. Nothing
that a user writes stands before the first mark, so nobody can move the cut.

- `with_text`: the system text itself;
- `only_tail`: what comes after the slot, for programs that put head and prompt there themselves;
- `with_tokens`: tokens of the prompt in the slot; user text that spells one is broken up.

A system message in the conversation is refused: that is the prompt's place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.render import RenderError, render
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import FOLD_SEPARATOR, template_variables
from rlprompt.types import Message

_TAKEN = (
    "the system prompt of this model is learned; leave the system message out of the conversation"
)
_NO_TEXT = "the first message of this model must be a text"
_GUARD = "{{ '' }}"
"""Keeps Jinja from removing the line break beside a tag."""
_PROBES = (
    ("What is 2 + 2? Answer now.",),
    ("",),
    (" \n Hi \t\n",),
    ("Hi", "It is four.", "Why?\n\nExplain in two lines."),
    ("d\u00e9j\u00e0 vu, {{ 7*7 }} (really?)",),
)


def with_text(slot: ChatSlot, text: str) -> str:
    """A template that writes a system text.

    Args:
        slot: slot of the base's template.
        text: the system text.
    """
    return _opened(slot, _quoted(text.strip())) + _GUARD + _body(slot)


def only_tail(slot: ChatSlot) -> str:
    """A template that writes only what comes after the slot.

    Args:
        slot: slot of the base's template.
    """
    return _captured(slot) + "{{ rendered.split(" + _quoted(slot.template.mark) + ", 1)[1] }}"


def with_tokens(slot: ChatSlot, stem: str, names: Sequence[str]) -> str:
    """A template that writes tokens into the slot.

    Args:
        slot: slot of the base's template.
        stem: what the names of these tokens, and of no other, begin with; without spaces.
        names: the tokens in order.
    """
    # After a space the stem cannot be there again: it has none itself.
    broken = f"{stem[:2]} {stem[2:]}"
    return (
        _captured(slot)
        + "{% set parts = rendered.split("
        + _quoted(slot.template.mark)
        + ", 1) %}{{ parts[0].rstrip(' ') }}{{ "
        + _quoted("".join(names))
        + " }}{{ parts[1].replace("
        + f"{_quoted(stem)}, {_quoted(broken)}"
        + ") }}"
    )


def check_template(
    slot: ChatSlot,
    tokenizer: PreTrainedTokenizerBase,
    before: Sequence[int],
    form: str,
) -> None:
    """Prove that an exported tokenizer gives the tokens that rlprompt gives.

    Args:
        slot: slot of the base's template.
        tokenizer: the exported tokenizer with its template.
        before: tokens that it should write before the tail.
        form: name of the format, for the error.

    Raises:
        InputError: it gives others, for a conversation that the base's template takes.
    """
    variables = template_variables(tokenizer)
    for contents in _PROBES:
        messages = _conversation(contents)
        try:
            tail = slot.tail_ids(messages)
        except InputError:  # the template takes no such conversation
            continue
        try:
            text = render(str(tokenizer.chat_template), messages, variables)
        except RenderError as error:
            raise InputError(
                f"the chat template cannot be written for {form} ({error}); use another format"
            ) from error
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != [*before, *tail]:
            raise InputError(
                f"the tokenizer of this base reads the chat template of {form} in another way than "
                "rlprompt does (a control token in the text, or a word that begins differently "
                "where nothing stands before it), so the format cannot carry the prompt; use "
                "another format"
            )


def _conversation(contents: Sequence[str]) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def _opened(slot: ChatSlot, system: str) -> str:
    """Tags that put the system turn, a Jinja expression, in front of the messages."""
    refuse = (
        "{% if messages and messages[0]['role'] in ('system', 'developer') %}{{ raise_exception("
        + _quoted(_TAKEN)
        + ") }}{% endif %}"
    )
    if not slot.folds_system:
        turn = f"{{'role': 'system', 'content': {system}}}"
        return refuse + "{% set messages = [" + turn + "] + messages %}"
    content = f"{system} ~ {_quoted(FOLD_SEPARATOR)} ~ messages[0]['content']"
    return (
        refuse
        + "{% if messages[0]['content'] is not string %}{{ raise_exception("
        + _quoted(_NO_TEXT)
        + ") }}{% endif %}{% set messages = [{'role': messages[0]['role'], 'content': "
        + f"{content}}}] + messages[1:] %}}"
    )


def _captured(slot: ChatSlot) -> str:
    """Tags after which `rendered` is the conversation with a mark in the slot."""
    opened = _opened(slot, _quoted(slot.template.mark))
    return f"{opened}{{% set rendered %}}{_GUARD}{_body(slot)}{_GUARD}{{% endset %}}"


def _body(slot: ChatSlot) -> str:
    """The base's template with what it was given beside the tokenizer's variables."""
    given: dict[str, Any] = slot.template.variables
    sets = "".join(f"{{% set {name} = {_quoted(str(value))} %}}" for name, value in given.items())
    # Jinja leaves out one line break at the end of a whole template.
    return sets + slot.template.source.removesuffix("\n")


def _quoted(text: str) -> str:
    """A text as a Jinja literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    escaped = escaped.replace("\n", "\\n").replace("\r", "\\r")
    # Where a tag could end, or a comment begin, inside of the literal.
    return "'" + escaped.replace("}", "\\x7d").replace("{", "\\x7b").replace("#", "\\x23") + "'"
