"""Clients of OpenAI's API other than `openai`: the bodies that they send are answered.

`recorded_requests.json` holds bodies that langchain-openai and litellm have sent to a server that
wrote them down, and those that the source of Open WebUI puts together. Both recorded clients were
also run against `rlprompt serve`, and read its answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlprompt.serving.chat_requests import RequestLimits
from rlprompt.serving.prompt_server import PromptServer
from tests.fixtures.server import call, save, serving, tiny_policy

RECORDED = json.loads(Path(__file__).with_name("recorded_requests.json").read_text())
CASES = [(client, name) for client, bodies in RECORDED.items() for name in bodies]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    policy = tiny_policy()
    folder = save(policy, tmp_path_factory.mktemp("recorded") / "sun", "Speak of the sun.")
    limits = RequestLimits(tokens=16)  # bodies without a length get this one
    with serving(policy, {"sun": folder}, requests=limits) as made:
        yield made


@pytest.mark.parametrize(("client", "name"), CASES, ids=[f"{c}: {n}" for c, n in CASES])
def test_a_recorded_request_is_answered(server: PromptServer, client: str, name: str) -> None:
    body: dict[str, Any] = RECORDED[client][name]
    path = "/v1/responses" if "input" in body else "/v1/chat/completions"
    status, told, headers = call(server, "POST", path, body, Authorization="Bearer unused")
    assert status == 200, told
    if body.get("stream"):
        assert headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in told.strip().split("\n\n")]
        chunks = [json.loads(each) for each in events[:-1]]
        assert events[-1] == "[DONE]"
        assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
        assert any(c["finish_reason"] for each in chunks for c in each["choices"])
        asked = body.get("stream_options", {}).get("include_usage", False)
        assert bool(chunks[-1].get("usage")) == asked
    elif "input" in body:
        (part,) = told["output"][0]["content"]
        assert told["object"] == "response" and isinstance(part["text"], str)
    else:
        assert told["choices"][0]["message"]["role"] == "assistant"
        assert told["usage"]["completion_tokens"] > 0


def test_what_asks_for_more_than_there_is_gets_a_sentence(server: PromptServer) -> None:
    good = RECORDED["litellm 1.110.2"]["completion"]
    for fields in (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tool_choice": "required"},
    ):
        status, body, _ = call(server, "POST", "/v1/chat/completions", {**good, **fields})
        assert status == 400
        assert body["error"]["code"] == "unsupported_parameter"
        assert body["error"]["param"] == next(iter(fields))
