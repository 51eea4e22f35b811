"""A registry behind HTTP: our paths, and those that clients of Langfuse and MLflow read.

The requests of both clients were recorded from langfuse 5.0.4 and mlflow-skinny 3.17.2, which also
read this server's answers.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from rlprompt.artifacts.identity import prompt_hash
from rlprompt.errors import InputError
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.registry.catalog import Catalog
from rlprompt.registry.records import Target
from rlprompt.registry.store import Registry
from rlprompt.serving.access import Access, KeySettings
from rlprompt.serving.prompt_server import PromptServer
from tests.fixtures.server import BASE, call, save, serving, tiny_policy

KEY, OTHER = "sk-lf-0123456789abcdef", "chat-0123456789abcdef"
TEXTS = ("Answer in one line.", "Speak of {{the}} sun.\nÄ „quote“ \U0001f600")
MLFLOW = "/api/2.0/mlflow"
LANGFUSE = "/api/public/v2/prompts"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry-api")
    policy = tiny_policy()
    registry = Registry(folder / "registry")
    for number, text in enumerate(TEXTS):
        made = save(policy, folder / f"text{number}", text)
        registry.add(made, "mine", message=f"number {number}", tags=[f"tag{number}"], by="anna")
    settings = SoftPrompt.Settings(init_text="The secret text of the start.")
    soft = save(policy, folder / "soft", SoftPrompt.create(settings, policy, 0))
    registry.add(soft, "learned")
    registry.point("learned", "prod", [Target(version=1)])
    registry.point("mine", "prod", [Target(version=2)])
    registry.point("mine", "ab", [Target(version=1, share=0.5), Target(version=2, share=0.5)])
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[PromptServer]:
    access = Access(
        [
            KeySettings(name="reader", key=KEY, scopes=("prompts",)),
            KeySettings(name="chat", key=OTHER),
        ]
    )
    with serving(
        tiny_policy(), {}, access=access, catalog=Catalog(root / "registry")
    ) as made:  # fmt: skip
        yield made


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"pk-lf-anything:{key}".encode()).decode()


def get(server: PromptServer, path: str, **query: Any) -> tuple[int, Any]:
    asked = f"{path}?{urlencode(query)}" if query else path
    status, body, headers = call(server, "GET", asked, Authorization=basic(KEY))
    if status == 200:
        assert headers["cache-control"] == "no-store"
    return status, body


def test_all_names_are_listed_and_only_texts_are_told(server: PromptServer, root: Path) -> None:
    status, body = get(server, "/prompts")
    assert status == 200
    learned, mine = body["prompts"]
    assert (learned["name"], learned["versions"][0]["kind"]) == ("learned", "soft")
    assert [each["aliases"] for each in mine["versions"]] == [["ab"], ["ab", "prod"]]
    assert mine["aliases"]["ab"] == [{"version": 1, "share": 0.5}, {"version": 2, "share": 0.5}]
    assert "secret" not in str(body) and TEXTS[0] not in str(body)
    status, body = get(server, "/prompts/mine")
    assert (status, body["version"], body["prompt"]) == (200, 2, TEXTS[1])
    assert body["hash"] == prompt_hash(root / "text1") and body["base"] == BASE
    assert get(server, "/prompts/mine", version=1)[1]["prompt"] == TEXTS[0]
    status, body = get(server, "/prompts/learned")
    assert (status, body["prompt"], body["hash"]) == (200, None, prompt_hash(root / "soft"))
    assert "secret" not in str(body)


def test_an_alias_with_shares_keeps_to_its_key(server: PromptServer) -> None:
    def versions(keys: list[str]) -> list[int]:
        asked = [get(server, "/prompts/mine", alias="ab", key=key) for key in keys]
        return [body["version"] for _, body in asked]

    users = [f"user-{i}" for i in range(12)]
    assert versions(users) == versions(users)
    assert set(versions(users)) == {1, 2}
    drawn = {get(server, "/prompts/mine", alias="ab")[1]["version"] for _ in range(40)}
    assert drawn == {1, 2}


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/prompts/nothing", 404, "no prompt 'nothing'"),
        ("/prompts/..%2f..", 404, "there is no"),
        ("/prompts/Mine", 404, "cannot be used"),
        ("/prompts/mine?version=3", 404, "its versions are 1 to 2"),
        ("/prompts/mine?version=0", 400, "no whole number"),
        ("/prompts/mine?version=1e3", 400, "no whole number"),
        ("/prompts/mine?version=%D9%A1", 400, "no whole number"),
        ("/prompts/mine?version=1&alias=prod", 400, "give one of them"),
        ("/prompts/mine?version=1&key=a", 400, "no effect"),
        ("/prompts/mine?alias=latest", 404, "no alias 'latest'; it has ab, prod"),
        ("/prompts/mine?alias=a&alias=b", 400, "twice"),
        ("/prompts?label=prod", 400, "not known"),
    ],
)
def test_wrong_questions_are_told_so(
    server: PromptServer, path: str, status: int, sentence: str
) -> None:
    got, body = get(server, path)
    assert (got, set(body["error"])) == (status, {"message", "type", "param", "code"})
    assert sentence in body["error"]["message"]


def test_keys_open_it_as_bearer_and_as_the_password_of_basic(server: PromptServer) -> None:
    def status(path: str, authorization: str) -> int:
        return call(server, "GET", path, Authorization=authorization)[0]

    for path in ("/prompts", f"{LANGFUSE}/mine", f"{MLFLOW}/registered-models/get?name=mine"):
        assert status(path, f"Bearer {KEY}") == status(path, basic(KEY)) == 200
        assert status(path, basic(OTHER)) == 403
        for wrong in ("", "Basic", "Basic !!", "Basic " + base64.b64encode(b"x").decode(),
                      "Basic /////w==", basic(""), basic(KEY + "x"), f"Digest {KEY}"):  # fmt: skip
            assert status(path, wrong) == 401, wrong
    assert status("/v1/models", basic(OTHER)) == 401
    assert status("/v1/models", f"Bearer {KEY}") == 403


def test_the_requests_of_langfuses_client(server: PromptServer, root: Path) -> None:
    for query in ({}, {"version": 2}, {"label": "prod"}, {"label": "prod", "resolve": "true"}):
        status, body = get(server, f"{LANGFUSE}/mine", **query)
        assert status == 200
        assert (body["type"], body["prompt"], body["version"]) == ("text", TEXTS[1], 2)
        assert (body["labels"], body["tags"]) == (["ab", "prod"], ["tag1"])
        assert body["config"]["rlprompt"]["hash"] == prompt_hash(root / "text1")
        assert body["commitMessage"] == "number 1"
    status, body = get(server, LANGFUSE, label="prod", limit=10)
    assert (status, body["meta"]["totalItems"]) == (200, 1)
    (listed,) = body["data"]
    assert (listed["name"], listed["versions"], listed["type"]) == ("mine", [2], "text")
    assert {"labels", "tags", "lastUpdatedAt", "lastConfig"} <= set(listed)
    for query, count in (
        ({"tag": "tag0"}, 1), ({"name": "learned"}, 0), ({"version": 3}, 0), ({"page": 2}, 0),
        ({"fromUpdatedAt": "2020-01-01T00:00:00Z"}, 1), ({"toUpdatedAt": "2020-01-01"}, 0),
    ):  # fmt: skip
        assert len(get(server, LANGFUSE, **query)[1]["data"]) == count, query
    for path, wanted in (
        ("/learned", 404), ("/folder%2Fmine", 404), ("/mine?version=1&label=prod", 400),
        ("?limit=101", 400), ("?fromUpdatedAt=monday", 400),
    ):  # fmt: skip
        status, body = get(server, f"{LANGFUSE}{path}")
        assert (status, set(body)) == (wanted, {"message", "error"}), body
    assert "secret" not in str(get(server, f"{LANGFUSE}/learned"))
    status, body, _ = call(server, "POST", LANGFUSE, {}, Authorization=basic(KEY))
    assert status == 403 and "only read" in body["message"]


def test_the_requests_of_mlflows_client(server: PromptServer) -> None:
    status, body = get(server, f"{MLFLOW}/registered-models/get", name="mine")
    model = body["registered_model"]
    assert status == 200 and model["tags"] == [{"key": "mlflow.prompt.is_prompt", "value": "true"}]
    assert {"alias": "prod", "version": "2"} in model["aliases"]
    for path, query in (
        ("registered-models/alias", {"alias": "prod"}),
        ("model-versions/get", {"version": "2"}),
    ):
        status, body = get(server, f"{MLFLOW}/{path}", name="mine", **query)
        version = body["model_version"]
        tags = {each["key"]: each["value"] for each in version["tags"]}
        assert (status, version["version"], tags["mlflow.prompt.text"]) == (200, "2", TEXTS[1])
        assert tags["mlflow.prompt.is_prompt"] == "true" and version["description"] == "number 1"
        assert isinstance(version["creation_timestamp"], int)
    is_prompt = "tags.`mlflow.prompt.is_prompt` = 'true'"
    for clause, count in (
        (is_prompt, 1), (f"{is_prompt} AND name='mine'", 1), (f"{is_prompt} AND name='x'", 0),
        (f"{is_prompt} and name LIKE 'm%n_'", 1), ("name ILIKE '%INE'", 1), ("name LIKE 'n%'", 0),
        ("tag.mlflow.prompt.is_prompt != 'true'", 0), ("name LIKE '" + "%n" * 2000 + "'", 0),
    ):  # fmt: skip
        status, body = get(
            server, f"{MLFLOW}/registered-models/search", filter=clause, max_results=100
        )
        assert (status, len(body["registered_models"])) == (200, count), clause
    query = {"filter": f"name = 'mine' AND {is_prompt}", "order_by": "version_number DESC"}
    status, body = get(server, f"{MLFLOW}/model-versions/search", **query, max_results=1)
    assert [each["version"] for each in body["model_versions"]] == ["2"]
    status, body = get(server, f"{MLFLOW}/model-versions/search", **query,
                       page_token=body["next_page_token"])  # fmt: skip
    assert [each["version"] for each in body["model_versions"]] == ["1"]
    assert "next_page_token" not in body


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("registered-models/get?name=nothing", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("registered-models/get?name=learned", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("registered-models/get", 400, "INVALID_PARAMETER_VALUE"),
        ("registered-models/alias?name=mine&alias=latest", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("model-versions/get?name=learned&version=1", 404, "RESOURCE_DOES_NOT_EXIST"),
        ("model-versions/get?name=mine&version=x", 400, "INVALID_PARAMETER_VALUE"),
        ("registered-models/search?filter=x%3D1", 400, "INVALID_PARAMETER_VALUE"),
        ("registered-models/search?order_by=color", 400, "INVALID_PARAMETER_VALUE"),
        ("registered-models/search?page_token=x", 400, "INVALID_PARAMETER_VALUE"),
        ("experiments/search", 404, "RESOURCE_DOES_NOT_EXIST"),
    ],
)
def test_mlflow_is_told_errors_in_its_shape(
    server: PromptServer, path: str, status: int, code: str
) -> None:
    got, body = get(server, f"{MLFLOW}/{path}")
    assert (got, body["error_code"]) == (status, code)
    assert "secret" not in body["message"]


def test_nothing_is_written_for_mlflow(server: PromptServer) -> None:
    body = {"name": "mine", "key": "_mlflow_experiment_ids", "value": ",0,"}
    for method, path in (("POST", "registered-models/set-tag"), ("DELETE", "model-versions/x")):
        status, told, _ = call(server, method, f"{MLFLOW}/{path}", body, Authorization=basic(KEY))
        assert (status, told["error_code"]) == (403, "PERMISSION_DENIED")


def test_it_follows_the_registry_and_tells_of_damage_without_paths(tmp_path: Path) -> None:
    policy = tiny_policy()
    registry = Registry(tmp_path / "registry")
    with pytest.raises(InputError, match="is no registry"):
        Catalog(tmp_path / "registry")
    for number in range(2):
        registry.add(save(policy, tmp_path / f"a{number}", TEXTS[number]), "mine")
    with serving(policy, {}, catalog=Catalog(tmp_path / "registry")) as server:
        status, body, _ = call(server, "GET", "/prompts/mine")
        assert status == 404 and "neither of the aliases" in body["error"]["message"]
        for number, alias in ((1, "prod"), (2, "prod"), (1, "production")):
            registry.point("mine", alias, [Target(version=number)])
            assert call(server, "GET", "/prompts/mine")[1]["version"] == number
        third = registry.add(save(policy, tmp_path / "a2", "Third."), "mine")
        damaged = registry.path(third) / "prompt.json"
        damaged.write_text(damaged.read_text().replace("Third.", "Other."))
        status, body, _ = call(server, "GET", "/prompts/mine?version=3")
        assert status == 503 and str(tmp_path) not in str(body)
        assert call(server, "GET", "/prompts/mine?version=1")[0] == 200
        status, _, _ = call(server, "GET", "/prompts", Origin="https://elsewhere.example")
        assert status == 403
    with serving(policy, {}) as server:
        assert call(server, "GET", "/prompts")[0] == 404
