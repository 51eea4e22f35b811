"""The log of requests: one line each, in the client's trace, without what was said."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlprompt.artifacts.identity import prompt_hash
from rlprompt.errors import InputError
from rlprompt.serving.access import Access, KeySettings
from rlprompt.serving.request_log import RequestLog, Trace
from tests.fixtures.server import BASE, call, save, serving, tiny_policy

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GIVEN = f"00-{TRACE}-{PARENT}-00"
KEY = "0123456789abcdef"
QUESTION = "the secret question"


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        ["garbage"],
        [GIVEN, GIVEN],
        [GIVEN.upper()],
        [f"ff-{TRACE}-{PARENT}-00"],
        [f"00-{'0' * 32}-{PARENT}-00"],
        [f"00-{TRACE}-{'0' * 16}-00"],
        [f"{GIVEN}-more"],
        [f"{GIVEN}\nx"],
        [f"00-{TRACE[:-1]}-{PARENT}-00"],
    ],
)
def test_what_is_no_traceparent_begins_a_new_trace(headers: list[str]) -> None:
    trace = Trace.of(headers)
    assert trace.trace_id != TRACE and trace.parent_id is None
    assert Trace.of([trace.traceparent]).trace_id == trace.trace_id


@pytest.mark.parametrize("header", [GIVEN, f" {GIVEN} ", f"01-{GIVEN[3:]}-more", f"cc-{GIVEN[3:]}"])
def test_a_traceparent_is_gone_on_with(header: str) -> None:
    trace = Trace.of([header])
    assert (trace.trace_id, trace.parent_id, trace.flags) == (TRACE, PARENT, "00")
    assert trace.span_id not in (PARENT, "0" * 16)
    assert trace.traceparent == f"00-{TRACE}-{trace.span_id}-00"


def test_every_request_for_an_answer_is_one_line(tmp_path: Path) -> None:
    policy, path = tiny_policy(), tmp_path / "requests.jsonl"
    path.write_text('{"kept": true}\n')
    folder = save(policy, tmp_path / "sun", "Speak of the sun.")
    access = Access([KeySettings(name="web", key=KEY), KeySettings(name="ops", key=KEY * 2,
                                                                   scopes=("admin",))])  # fmt: skip
    log = RequestLog(path)
    chat = {"messages": [{"role": "user", "content": QUESTION}], "model": "sun", "max_tokens": 7,
            "temperature": 0}  # fmt: skip
    asked: list[tuple[str, Any, str, str, int]] = [
        ("/v1/chat/completions", {**chat, "n": 2}, KEY, GIVEN, 200),
        ("/v1/chat/completions", {**chat, "stream": True}, KEY, GIVEN, 200),
        ("/v1/responses", {"model": BASE, "input": QUESTION, "max_output_tokens": 3}, KEY, "", 200),
        ("/v1/chat/completions", {**chat, "model": QUESTION}, KEY, GIVEN, 404),
        ("/v1/chat/completions", {**chat, "tools": [QUESTION]}, KEY, GIVEN, 400),
        ("/v1/chat/completions", b"{" + QUESTION.encode(), KEY, GIVEN, 400),
        ("/v1/chat/completions", chat, QUESTION, GIVEN, 401),
        ("/v1/chat/completions", chat, KEY * 2, GIVEN, 403),
    ]
    answers = []
    with serving(policy, {"sun": folder}, access=access, log=log) as server:
        for where, body, key, parent, status in asked:
            headers = {"Authorization": f"Bearer {key}", "traceparent": parent}
            got, _, told = call(server, "POST", where, body, **headers)
            assert got == status
            answers.append(told)
        counted = server.metrics.text()
    log.close()
    assert 'status="401"' in counted
    kept, *rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert kept == {"kept": True}
    assert QUESTION not in path.read_text() and KEY not in path.read_text()
    assert len(rows) == len(asked)
    for (where, _, _, parent, status), told, row in zip(asked, answers, rows, strict=True):
        assert (row["path"], row["status"]) == (where, status)
        assert row["parent"] == (PARENT if parent else None)
        assert told["traceparent"] == f"00-{row['trace']}-{row['span']}-{'00' if parent else '01'}"
        assert told["x-request-id"] == row["request"]
        assert row["seconds"] >= 0
        if status == 200:
            assert row["seconds"] >= row["first_token_seconds"] > 0 and row["key"] == "web"
            assert row["prompt"] == told["x-rlprompt-prompt"] and row["prompt_tokens"] > 0
        else:
            assert row["model"] is row["prompt"] is row["completion_tokens"] is None
    assert rows[0]["prompt"] == prompt_hash(folder) and rows[0]["model"] == f"{BASE}@sun"
    assert rows[0]["completion_tokens"] == 14 and rows[0]["finish"] == ["length", "length"]
    assert [row["stream"] for row in rows[:3]] == [False, True, False]
    assert rows[2]["prompt"] == "none"
    assert rows[3]["code"] == "model_not_found"


def test_a_log_that_cannot_be_written_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(InputError, match="log of requests cannot be written"):
            RequestLog(place)
    log = RequestLog(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.write({"a": 1})
    log.close()
    assert [each.message for each in caplog.records] == [
        "requests are not logged: No space left on device"
    ]
