"""Writers: the base under a text that is not the prompt, and what a recipe can say of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.search.base import SearchStart
from rlprompt.search.make_writer import WRITERS, AnyWriterSettings, make_writer
from rlprompt.search.writer import BaseWriter
from rlprompt.types import Query
from tests.fixtures.runs import tiny_policy

ASKED = [
    Query(({"role": "user", "content": "the sun"},)),
    Query(({"role": "user", "content": "the rain and the sun"},)),
]


def settings_of(plain: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyWriterSettings)
    return adapter.validate_python(plain)


def engine() -> NativeEngine:
    torch.manual_seed(0)
    return NativeEngine(tiny_policy())


def test_settings_say_how_tokens_are_drawn() -> None:
    chosen = settings_of({"type": "base", "temperature": 0.5, "max_tokens": 9})
    assert (chosen.sampling.temperature, chosen.sampling.max_tokens) == (0.5, 9)
    assert settings_of(chosen.model_dump(mode="json")) == chosen


@pytest.mark.parametrize("plain", [{}, {"type": "bass"}, {"type": "base", "model": "x"}, "base"])
def test_what_no_writer_takes_is_refused(plain: Any) -> None:
    with pytest.raises(ValidationError):
        settings_of(plain)


def test_every_writer_has_settings_of_its_name() -> None:
    for name, writer in WRITERS.items():
        assert writer.Settings.model_fields["type"].default == name


def test_the_base_writes_what_its_engine_draws_under_that_system_text() -> None:
    chosen = settings_of({"type": "base", "max_tokens": 5})
    writer = make_writer(chosen, SearchStart(TextPrompt("Be nice."), 0, engine()))
    assert isinstance(writer, BaseWriter)
    for system in ("", "  ", "Write a line."):
        drawn = engine()
        drawn.sync(TextPrompt(system) if system.strip() else NonePrompt())
        groups = drawn.generate(ASKED, 1, chosen.sampling, 3).groups
        expected = [group.completions[0].text for group in groups]
        assert writer.write(ASKED, chosen.sampling, 3, system) == expected


def test_without_an_engine_nothing_can_write() -> None:
    with pytest.raises(InputError, match=r"search\.writer .* no engine"):
        make_writer(settings_of({"type": "base"}), SearchStart(TextPrompt("Be nice."), 0))
