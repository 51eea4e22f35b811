"""Answers in JSON over HTTP: whole, streamed, cut, refused, and beside answers in text."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI

from rlprompt.engines.grammar import GrammarFaultError, GrammarRow, JsonGrammar
from rlprompt.serving.prompt_server import PromptServer
from tests.fixtures.server import BASE, call, chat, save, serving, tiny_policy

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
PERSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptServer]:
    policy = tiny_policy()
    folder = save(policy, tmp_path_factory.mktemp("prompts") / "sun", "Speak of the sun.")
    with serving(policy, {"sun": folder}) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: PromptServer) -> OpenAI:
    return OpenAI(base_url=f"{server.origin}/v1", api_key="unused", max_retries=0)


def said(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"])


@pytest.mark.parametrize("model", [BASE, "sun"])
def test_an_answer_is_json_of_the_schema_whole_and_streamed(
    server: PromptServer, model: str
) -> None:
    fields: dict[str, Any] = {"response_format": PERSON_FORMAT, "max_tokens": 60}
    status, body, _ = chat(server, model, "the rain", **fields)
    assert status == 200 and body["choices"][0]["finish_reason"] == "stop"
    jsonschema.validate(json.loads(said(body)), PERSON)
    status, stream, _ = chat(server, model, "the rain", stream=True, **fields)
    lines = [line.removeprefix("data: ") for line in stream.strip().split("\n\n")]
    assert status == 200 and lines.pop() == "[DONE]"
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert "".join(each["delta"].get("content", "") for each in choices) == said(body)
    assert choices[-1]["finish_reason"] == "stop"


def test_openai_parses_what_it_asked_for(client: OpenAI) -> None:
    made = client.chat.completions.create(
        model="sun",
        messages=[{"role": "user", "content": "the sea"}],
        response_format={"type": "json_object"},
        n=3,
        seed=5,
        max_tokens=60,
        logprobs=True,
    )
    ended = [each for each in made.choices if each.finish_reason == "stop"]
    assert all(isinstance(json.loads(each.message.content or ""), dict) for each in ended)
    assert all((each.message.content or "{").startswith("{") for each in made.choices)
    assert made.choices[0].logprobs is not None
    answer = client.responses.create(
        model="sun",
        input="the sea",
        temperature=0,
        max_output_tokens=60,
        text={"format": {"type": "json_schema", "name": "person", "schema": PERSON}},
    )
    jsonschema.validate(json.loads(answer.output_text), PERSON)
    assert answer.text is not None and answer.text.format is not None
    assert answer.text.format.type == "json_schema"


def test_an_answer_that_is_cut_says_so(server: PromptServer) -> None:
    _, body, _ = chat(server, "sun", "the rain", response_format=PERSON_FORMAT, max_tokens=4)
    assert body["choices"][0]["finish_reason"] == "length"
    assert said(body).startswith('{"')
    asked = {"model": "sun", "input": "the rain", "max_output_tokens": 1,
             "text": {"format": {"type": "json_object"}}}  # fmt: skip
    _, told, _ = call(server, "POST", "/v1/responses", asked)
    assert told["status"] == "incomplete" and told["text"] == {"format": {"type": "json_object"}}


def _named(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, **fields}}


WRONG: list[tuple[Any, str]] = [
    (7, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": ["json_object"]}, "response_format.type"),
    ({"type": "text", "more": 1}, "response_format.more"),
    ({"type": "json_schema", "json_schema": 5}, "response_format.json_schema"),
    (_named(name="a b"), "response_format.json_schema.name"),
    (_named(name=None), "response_format.json_schema.name"),
    (_named(schema=None), "response_format.json_schema.schema"),
    (_named(schema=True), "response_format.json_schema.schema"),
    (_named(description=4), "response_format.json_schema.description"),
    (_named(strict="yes"), "response_format.json_schema.strict"),
    (_named(extra=1), "response_format.json_schema.extra"),
    (_named(schema={"not": {}}), "response_format.json_schema.schema"),
    (_named(schema={"enum": ["x" * 40_000]}), "response_format.json_schema.schema"),
    (_named(schema={"type": "string", "pattern": "("}), "response_format.json_schema.schema"),
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_a_form_that_cannot_be_used_is_refused(server: PromptServer, place: int) -> None:
    wanted, param = WRONG[place]
    status, body, _ = chat(server, "sun", "the rain", response_format=wanted)
    assert status == 400 and body["error"]["param"] == param
    assert "\n" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("text", "param"),
    [
        ("json", "text"),
        ({"verbosity": "high"}, "text.verbosity"),
        ({"format": {"type": "json_schema", "schema": {}}}, "text.format.name"),
        ({"format": {"type": "json_object", "schema": {}}}, "text.format.schema"),
    ],
)
def test_so_is_one_of_a_response(server: PromptServer, text: Any, param: str) -> None:
    asked = {"model": "sun", "input": "the rain", "text": text}
    status, body, _ = call(server, "POST", "/v1/responses", asked)
    assert status == 400 and body["error"]["param"] == param


def test_answers_in_text_beside_it_are_those_without(server: PromptServer) -> None:
    alone = said(chat(server, "sun", "the land", max_tokens=40)[1])
    got: list[str] = []

    def ask(**fields: Any) -> None:
        got.append(said(chat(server, "sun", "the land", max_tokens=40, **fields)[1]))

    fields: list[dict[str, Any]] = [{}, {"response_format": PERSON_FORMAT}, {}]
    threads = [threading.Thread(target=ask, kwargs=each) for each in fields]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(got).count(alone) == 2
    assert sum(text.startswith("{") for text in got) == 1


def test_a_schema_that_becomes_too_much_work_ends_its_own_request(
    server: PromptServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = JsonGrammar.begin

    def failing(self: JsonGrammar, stop_token_ids: Any = ()) -> GrammarRow:
        row = begin(self, stop_token_ids)

        def fail(token_id: int) -> None:
            raise GrammarFaultError("the JSON schema takes too much work; simplify it")

        row.push = fail  # type: ignore[method-assign]
        return row

    monkeypatch.setattr(JsonGrammar, "begin", failing)
    fields: dict[str, Any] = {"response_format": PERSON_FORMAT}
    status, body, _ = chat(server, "sun", "the rain", n=2, **fields)
    assert status == 400 and "too much work" in body["error"]["message"]
    assert chat(server, "sun", "the rain")[0] == 200
    assert server.scheduler.num_running == 0


def test_without_the_library_the_client_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with serving(tiny_policy(), {}) as made:
        status, body, _ = chat(made, BASE, "the rain", response_format={"type": "json_object"})
        assert status == 400 and "rlprompt[serve]" in body["error"]["message"]
        assert chat(made, BASE, "the rain")[0] == 200
