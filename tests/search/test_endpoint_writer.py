"""The writer behind an endpoint: it counts for the run's budget, and writes nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from rlprompt.endpoints.ledger import BudgetSpentError, Ledger
from rlprompt.endpoints.settings import BudgetSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import SearchStart
from rlprompt.search.endpoint_writer import EndpointWriter
from rlprompt.search.make_writer import AnyWriterSettings, make_writer
from rlprompt.types import Query
from tests.fixtures.http_server import Answer, Seen, answering

ASKED = [Query(({"role": "user", "content": text},)) for text in ("Write one.", "Write two.")]


def reply(seen: Seen) -> Answer:
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    text = f"for {seen.body['messages'][-1]['content']}"
    choices = [{"message": {"content": text}, "finish_reason": "stop"}]
    return Answer({"choices": choices, "usage": usage})


def writer(url: str, ledger: Ledger | None, **changes: Any) -> EndpointWriter:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyWriterSettings)
    plain = {"type": "endpoint", "base_url": f"{url}/v1", "model": "m", "max_tokens": 20, **changes}
    settings = adapter.validate_python(plain)
    assert adapter.validate_python(settings.model_dump(mode="json")) == settings
    made = make_writer(settings, SearchStart(TextPrompt("a"), 0, ledger=ledger))
    assert isinstance(made, EndpointWriter)
    return made


def test_it_writes_through_the_ledger_of_the_run(tmp_path: Path) -> None:
    with answering(reply) as (url, seen):
        made = writer(url, Ledger(None, tmp_path), temperature=0.5)
        expected = ["for Write one.", "for Write two."]
        assert made.write(ASKED, made.settings.sampling, 3, "You write prompts.") == expected
        assert seen[0].body["messages"][0] == {"role": "system", "content": "You write prompts."}
        assert (seen[0].body["temperature"], seen[0].body["max_tokens"]) == (0.5, 20)
        again = writer(url, Ledger(None, tmp_path), temperature=0.5)
        assert again.write(ASKED, made.settings.sampling, 3, "You write prompts.") == expected
        assert len(seen) == 2
        again.write(ASKED, made.settings.sampling, 4, "You write prompts.")
        again.write(ASKED, made.settings.sampling, 3)
        assert len(seen) == 6 and len(seen[-1].body["messages"]) == 1


def test_what_it_writes_counts_for_the_budget() -> None:
    ledger = Ledger(BudgetSettings(max_tokens=330))  # 302 at most, 15 in the end
    with answering(reply) as (url, seen):
        made = writer(url, ledger)
        with pytest.raises(BudgetSpentError):
            made.write(ASKED * 1 + [Query(ASKED[0].messages)] * 3, made.settings.sampling, 0)
    assert ledger.spent.tokens == 15 * len(seen) == 30
