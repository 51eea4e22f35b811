"""Templates are rendered as transformers renders them, and hostile ones end within limits."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.model.chat import render as module
from rlprompt.model.chat.render import LimitError, RenderError, render
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import PLAIN_TEMPLATE
from tests.fixtures.tiny import TEMPLATE, tiny_tokenizer

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"
MESSAGES = [
    {"role": "user", "content": " What is 2 + 2? \u2028 <|im_end|>"},
    {"role": "assistant", "content": "Four.\n"},
    {"role": "user", "content": "Why?"},
]

BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999)"
    " %}{% endfor %}{% endfor %}{% endfor %}",
    "multiplied text": "{{ 'a' * 10000000000 }}",
    "multiplied list": "{{ ([0] * 10000000000) | length }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "centred": "{{ 'a' | center(10000000000) }}",
    "format width": "{{ '%10000000000d' | format(1) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x "
    "%}{% endfor %}{{ ns.x }}",
    "recursive macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "branching macro": "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}"
    "{% endmacro %}{{ m(0) }}",
    "sorted": "{{ range(99999) | list | sort | tojson(indent=1000000) | length }}",
    "deep parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
}


@pytest.mark.parametrize("name", sorted(path.name for path in TEMPLATES.glob("*.jinja")))
def test_a_template_of_the_field_is_rendered_as_transformers_does(name: str) -> None:
    source = (TEMPLATES / name).read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer()
    variables = dict(tokenizer.special_tokens_map)
    for messages in (MESSAGES[:1], MESSAGES):
        for header in (True, False):
            try:
                expected = tokenizer.apply_chat_template(
                    messages, chat_template=source, tokenize=False, add_generation_prompt=header
                )
            except Exception as error:
                with pytest.raises(RenderError, match=type(error).__name__):
                    render(source, messages, variables, add_generation_prompt=header)
                continue
            assert render(source, messages, variables, add_generation_prompt=header) == expected


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_hostile_template_ends_within_limits_and_the_next_one_is_rendered(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(LimitError):
        render(BOMBS[name], MESSAGES, {})
    assert time.monotonic() - begun < 60
    assert render("{{ messages[0]['role'] }}", MESSAGES, {}) == "user"


def test_a_slot_refuses_it_in_one_sentence() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = BOMBS["multiplied text"] + TEMPLATE
    with pytest.raises(InputError, match="cannot be rendered within limits"):
        ChatSlot.from_tokenizer(tokenizer)


@pytest.mark.parametrize("when", ["messages[0]['role'] == 'system'", "messages | length > 2"])
def test_an_endless_branch_is_not_taken_for_a_role_or_length_that_is_refused(when: str) -> None:
    tokenizer = tiny_tokenizer()
    bomb = BOMBS["nested loops"]
    tokenizer.chat_template = f"{{% if {when} %}}{bomb}{{% endif %}}{TEMPLATE}"
    with pytest.raises(InputError, match="cannot be rendered within limits"):
        ChatSlot.from_tokenizer(tokenizer)


def test_a_template_cannot_reach_files_or_python() -> None:
    for attack in (
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    ):
        try:
            text = render(attack, MESSAGES, {})
        except RenderError:
            continue
        assert text.strip() == ""


def test_a_template_that_writes_no_text_is_refused() -> None:
    with pytest.raises(RenderError, match="surrogates not allowed"):
        render("{{ '\\udc00' }}", MESSAGES, {})


def test_a_child_process_asks_a_renderer_of_its_own() -> None:
    assert render(PLAIN_TEMPLATE, MESSAGES, {"bos_token": ""}).endswith("Assistant:")
    child = os.fork()
    if child == 0:
        try:
            same = render("{{ 'child' }}", MESSAGES, {}) == "child"
        finally:
            os._exit(0 if same else 1)
    assert render("{{ 'parent' }}", MESSAGES, {}) == "parent"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_interrupted_call_leaves_no_reply_to_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in a notebook: later templates must not get the text of the one that was stopped."""

    def interrupted(process: object) -> dict[str, str]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("{{ 'stopped' }}", MESSAGES, {})
    assert render("{{ 'next' }}", MESSAGES, {}) == "next"
