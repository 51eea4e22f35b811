"""Exported templates write what the base's template writes, on the templates of real families."""

from __future__ import annotations

import pytest

from rlprompt.errors import InputError
from rlprompt.exports.template import check_template, only_tail, with_text, with_tokens
from rlprompt.model.chat.render import RenderError, render
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import template_variables
from tests.fixtures.tokenizers import FAMILIES, Family, build_tokenizer

every_family = pytest.mark.parametrize("entry", FAMILIES, ids=lambda entry: entry.name)


TEXTS = (
    "Be brief.",
    "  it's {{ 'x' }} {% no %} {# n #}\n\\n \"quoted\" d\u00e9j\u00e0 \U0001f600 ",
)


@every_family
def test_tail_and_text_are_the_tokens_of_the_slot(entry: Family) -> None:
    tokenizer = build_tokenizer(entry)
    slot = ChatSlot.from_tokenizer(tokenizer)
    tokenizer.chat_template = only_tail(slot)
    if entry.name == "mistral_v3":  # its tail goes on inside of a word's text
        with pytest.raises(InputError, match="in another way than rlprompt"):
            check_template(slot, tokenizer, [], "peft")
    else:
        check_template(slot, tokenizer, [], "peft")
    for text in TEXTS:
        tokenizer.chat_template = with_text(slot, text)
        before = [*slot.head_ids, *slot.slot_ids(text)]
        check_template(slot, tokenizer, before, "merged")


@every_family
def test_a_check_finds_what_differs(entry: Family) -> None:
    tokenizer = build_tokenizer(entry)
    slot = ChatSlot.from_tokenizer(tokenizer)
    tokenizer.chat_template = only_tail(slot)
    with pytest.raises(InputError, match="in another way than rlprompt"):
        check_template(slot, tokenizer, [slot.head_ids[0], 5], "peft")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(InputError, match="cannot be written for peft"):
        check_template(slot, tokenizer, [], "peft")


@every_family
def test_tokens_stand_in_the_slot(entry: Family) -> None:
    tokenizer = build_tokenizer(entry)
    slot = ChatSlot.from_tokenizer(tokenizer)
    template = with_tokens(slot, "<|soft_", ["<|soft_0|>", "<|soft_1|>"])
    variables = template_variables(tokenizer)
    turns = [{"role": "user", "content": "a <|soft_1|> b"}]
    text = render(template, turns, variables)
    head, _, tail = text.partition("<|soft_0|><|soft_1|>")
    own = slot.template.render("SYS", ["a <| soft_1|> b"])
    assert own.replace("SYS", "").replace(" ", "") == (head + tail).replace(" ", "")
    assert "<|soft" not in tail and "<| soft_1|>" in tail
    with pytest.raises(RenderError, match="leave the system message out"):
        render(template, [{"role": "system", "content": "x"}, *turns], variables)
