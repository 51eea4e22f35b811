"""What the system slot refuses: templates, tokenizers, queries and system texts, with why."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.slot import ChatSlot
from tests.fixtures.tokenizers import build_tokenizer, edited, family, turns

DEFAULT_TURN = "{{ '<|im_start|>system\\nYou are good.<|im_end|>\\n' }}"
SMOLLM2_DEFAULT = "You are a small and friendly model that likes to help"
AFTER_SYSTEM = "{% if message.role == 'system' %}{{ 'TEXT' }}{% endif %}\n{%- endfor"

# Case -> family, what to replace in its template, by what, and what the refusal says.
REFUSED_TEMPLATES = {
    "no system message": (
        "qwen3",
        "{%- set content = message.content -%}",
        "{%- if message.role == 'system' %}{% continue %}{% endif %}"
        "{%- set content = message.content -%}",
        "leaves the system message out",
    ),
    "capitals": ("phi4", "['content'] +", "['content'] | upper +", "repeats or rewrites"),
    "twice": ("phi4", "['content'] +", "['content'] * 2 +", "repeats or rewrites"),
    "escaped": ("phi4", "['content'] +", "['content'] | e +", "another way than stripping"),
    "breaks stripped": (
        "phi4",
        "['content'] +",
        "['content'].strip('\\n') +",
        "another way than stripping",
    ),
    "no separator": ("gemma3", "+ '\\n\\n' -%}", "-%}", "writes nothing between"),
    "default turn before ours": (
        "smollm2",
        "{%- for message",
        DEFAULT_TURN + "{%- for message",
        "beside the given one",
    ),
    "default turn after ours": (
        "smollm2",
        "{%- endfor",
        AFTER_SYSTEM.replace("TEXT", f"<|im_start|>system\\n{SMOLLM2_DEFAULT}<|im_end|>\\n"),
        "beside the given one",
    ),
    "default text after ours": (
        "smollm2",
        "{%- endfor",
        AFTER_SYSTEM.replace("TEXT", SMOLLM2_DEFAULT),
        "beside the given one",
    ),
    "broken": ("phi4", "{%- endfor -%}", "", "fails on the roles"),
    "raises": (
        "phi4",
        "{%- endfor -%}",
        "{%- endfor -%}{{ raise_exception('closed on Mondays') }}",
        "closed on Mondays",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TEMPLATES, ids=lambda case: case.replace(" ", "-"))
def test_templates_without_a_usable_slot_are_refused(case: str) -> None:
    name, old, new, sentence = REFUSED_TEMPLATES[case]
    with pytest.raises(InputError, match=sentence):
        ChatSlot.from_tokenizer(edited(family(name), old, new))


def test_a_boundary_that_the_tokenizer_joins_is_refused() -> None:
    # This way of cutting words takes the line breaks after a full stop along with it.
    gemma_template = family("gemma3").template
    with pytest.raises(InputError, match="boundary does not tokenise cleanly"):
        ChatSlot.from_tokenizer(build_tokenizer(family("llama3"), gemma_template))
    assert ChatSlot.from_tokenizer(build_tokenizer(family("smollm2"), gemma_template)).head_ids


def test_a_tokenizer_of_another_library_is_refused() -> None:
    class OtherTokenizer(PreTrainedTokenizerBase):
        def __init__(self) -> None:
            self.chat_template = family("phi4").template

        @property
        def special_tokens_map(self) -> dict[str, str]:
            return {}

    with pytest.raises(InputError, match=r"tokenizer\.json"):
        ChatSlot.from_tokenizer(OtherTokenizer())


REFUSED_QUERIES: dict[str, tuple[Any, str]] = {
    "no messages": ([], "has no messages"),
    "system turn": ([{"role": "system", "content": "a"}, *turns("b")], "the role system"),
    "assistant first": ([{"role": "assistant", "content": "a"}], "'assistant' where 'user' is due"),
    "two users": (turns("a") * 2, "'user' where 'assistant' is due"),
    "tool": ([*turns("a"), {"role": "tool", "content": "b"}], "'tool' where 'assistant' is due"),
    "no role": ([{"content": "a"}], "None where 'user' is due"),
    "assistant last": (turns("a", "b"), "ends with an assistant message"),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "type list"),
    "no content": ([{"role": "user"}], "type NoneType"),
    "more keys": ([{"role": "user", "content": "a", "tool_calls": "b"}], "'tool_calls'"),
    "surrogate": (turns("a\ud800"), "surrogate pair at character 1"),
}


@pytest.mark.parametrize("case", REFUSED_QUERIES, ids=lambda case: case.replace(" ", "-"))
def test_wrong_queries_are_refused(case: str) -> None:
    messages, sentence = REFUSED_QUERIES[case]
    slot = ChatSlot.from_tokenizer(build_tokenizer(family("phi4")))
    for tail in (slot.tail_ids, slot.none_tail_ids):
        with pytest.raises(InputError, match=sentence):
            tail(messages)


def test_wrong_system_texts_are_refused() -> None:
    slot = ChatSlot.from_tokenizer(build_tokenizer(family("phi4")))
    with pytest.raises(InputError, match="The system text has content of type int"):
        slot.slot_ids(3)  # type: ignore[arg-type]  # the error
    with pytest.raises(InputError, match="surrogate"):
        slot.slot_ids("\udfff")
