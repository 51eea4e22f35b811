"""From a query and a completion to the tokens that a preference model reads.

Training and scoring use the same function, so that a model is asked what it was trained on. Control
tokens inside the texts are taken out, whether the tokenizer calls them special or not: a completion
that ends its own turn and praises itself in the next would otherwise be scored as if a person had
praised it. The tokenizer itself says what it would read as one, since it may do so in another
spelling: after lower-casing, for example, or in a vocabulary that holds one as a plain word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.render import RenderError, render
from rlprompt.model.chat.template import (
    PLAIN,
    PLAIN_TEMPLATE,
    plain_variables,
    template_source,
    template_variables,
)
from rlprompt.model.chat.tokenization import is_control
from rlprompt.types import Message

PAIR = "pair"
"""Name of the form that BERT-like models take: question and answer as two segments."""

Keep = Literal["start", "end"]


@dataclass(frozen=True)
class Encoded:
    """The tokens of one conversation."""

    ids: list[int]
    segments: list[int] | None
    """Token type ids, for `template: pair`."""
    is_cut: bool
    """Whether a text had to be shortened."""


class ConversationEncoder:
    """Renders and tokenises conversations for one preference model.

    Args:
        tokenizer: the tokenizer of the preference model.
        template: the template: Jinja source, `plain`, `pair`, or None for the tokenizer's own.
        max_tokens: the longest result; the longest text of a conversation is shortened to fit.
        keep: the end of that text that stays.

    Raises:
        InputError: the tokenizer has no chat template and none is given.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        max_tokens: int,
        keep: Keep = "start",
    ) -> None:
        if template is None and not tokenizer.chat_template:
            raise InputError(
                "the preference model has no chat template; set template: pair for a model that "
                "takes question and answer as two segments, plain, or the path of a .jinja file"
            )
        self._tokenizer = tokenizer
        self._source = template or template_source(tokenizer, None)
        if template == PLAIN:
            self._source = PLAIN_TEMPLATE
        self._variables = template_variables(tokenizer)
        if template == PLAIN:
            self._variables |= plain_variables(tokenizer)
        self.max_tokens = max_tokens
        self._keep = keep
        added = tokenizer.added_tokens_decoder
        self._control_ids = {number for number, each in added.items() if is_control(each)}
        self._control_ids |= set(tokenizer.all_special_ids)
        control = {str(added[number]) for number in self._control_ids & added.keys()}
        control |= set(tokenizer.all_special_tokens)
        longest_first = sorted(control, key=lambda text: (-len(text), text))
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, messages: Sequence[Message]) -> Encoded:
        """The tokens of one conversation that ends with the assistant's turn.

        Raises:
            InputError: the template cannot render it, or leaves no room for any text.
        """
        texts = [self.plain_text(message["content"]) for message in messages]
        ids, segments = self._tokens(messages, texts)
        is_cut = len(ids) > self.max_tokens
        while len(ids) > self.max_tokens:
            longest = max(range(len(texts)), key=lambda i: len(texts[i]))
            if not texts[longest]:
                raise InputError(
                    f"max_tokens {self.max_tokens} leaves no room for any text beside the template "
                    f"of the preference model; raise it"
                )
            characters = sum(map(len, texts))
            excess = 1 + (len(ids) - self.max_tokens) * characters // (2 * len(ids))
            left = max(0, len(texts[longest]) - excess)
            text = texts[longest]
            texts[longest] = text[:left] if self._keep == "start" else text[len(text) - left :]
            ids, segments = self._tokens(messages, texts)
        return Encoded(ids, segments, is_cut)

    def plain_text(self, text: str) -> str:
        """A text with a space in the place of everything that would be read as a control token."""
        while True:
            plain = self._control.sub(" ", text)
            for start, end in reversed(self._control_spans(plain)):
                plain = f"{plain[:start]} {plain[end:]}"
            if plain == text:
                return plain
            text = plain  # what stood around a token may be one now

    def _control_spans(self, text: str) -> list[tuple[int, int]]:
        """Where in a text its tokens are control tokens, in order and apart from each other."""
        if not self._tokenizer.is_fast:  # others do not tell where a token stood
            return []
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        unknown, spelled = self._tokenizer.unk_token_id, self._tokenizer.unk_token
        if unknown == self._tokenizer.eos_token_id:  # it would end the conversation
            unknown = None
        spans: list[tuple[int, int]] = []
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            counts = number in self._control_ids and end > start
            if number == unknown and text[start:end] != spelled:
                counts = False  # a character that the vocabulary lacks
            if counts and (not spans or start >= spans[-1][1]):
                spans.append((start, end))
        return spans

    def _tokens(
        self, messages: Sequence[Message], texts: Sequence[str]
    ) -> tuple[list[int], list[int] | None]:
        if self._source == PAIR:
            before = "\n\n".join(texts[:-1])
            found = self._tokenizer(before, texts[-1], return_token_type_ids=True)
            return found["input_ids"], found["token_type_ids"]
        filled = [
            {"role": message["role"], "content": text}
            for message, text in zip(messages, texts, strict=True)
        ]
        try:
            rendered = render(self._source, filled, self._variables, add_generation_prompt=False)
        except RenderError as error:
            raise InputError(
                f"the chat template of the preference model cannot render a conversation "
                f"({error}); set template"
            ) from error
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"], None


def conversation(prompt: str | Sequence[Message], completion: Any) -> list[Message]:
    """A TRL prompt and completion, strings or messages, as one list of messages."""
    messages = (
        [{"role": "user", "content": prompt}]
        if isinstance(prompt, str)
        else [dict(message) for message in prompt]
    )
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    return [*messages, {"role": "assistant", "content": text}]
