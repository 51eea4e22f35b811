"""A recipe that holds a secret is refused before anything is written, and the secret not shown."""

from __future__ import annotations

from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.recipe.secrets import secret_in, secret_in_command
from rlprompt.rewards.models.http_client import HttpSettings, JsonClient

SECRET = "hunter2hunter2"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"url": f"https://h/score?key={SECRET}"}, "url"),
        ({"url": f"h:80/score?key={SECRET}"}, "url"),
        ({"url": f"https://h/score?api-version=1&sig={SECRET}"}, "url"),
        ({"url": f"https://h/score#token={SECRET}"}, "url"),
        ({"url": f"https://me:{SECRET}@h/score"}, "url"),
        ({"url": f"https://{SECRET}@h/score"}, "url"),
        ({"data": {"path": f"s3://b/x.jsonl?X-Amz-Signature={SECRET}"}}, "data.path"),
        ({"population": [{"changes": {"a.b.url": f"http://h?k={SECRET}"}}]}, "population.0"),
        ({"options": {"endpoints": [f"https://h/?k={SECRET}"]}}, "options.endpoints.0"),
        ({"options": {"api_key": SECRET}}, "options.api_key"),
        ({"options": {"headers": {"Authorization": f"Bearer {SECRET}"}}}, "Authorization"),
        ({"options": {"openai-api-key": SECRET}}, "openai-api-key"),
        ({"options": {"password": [SECRET]}}, "options.password.0"),
        ({"options": {"note": "sk-" + "a1" * 20}}, "options.note"),
        ({"prompt": {"text": f"use hf_{'a1' * 17} for it"}}, "prompt.text"),
        ({"x": JWT}, "x"),
    ],
)
def test_secrets_are_found(tree: dict[str, Any], place: str) -> None:
    found = secret_in(tree)
    assert found is not None
    assert place in found[0]
    assert SECRET not in f"{found}" and "sk-a1" not in f"{found}"


@pytest.mark.parametrize(
    "tree",
    [
        {"url": "https://h:8000/v1/score?api-version=2024-06-01&model=a"},
        {"url": "https://h/score?key=${REWARD_KEY}", "token_env": "REWARD_TOKEN"},
        {"url": "https://${USER_AND_PASSWORD}@h/score"},
        {"url": "http://{server}:8000/score"},
        {"token_header": "X-Api-Key", "options": {"token": "<eos>", "api_key_env": "KEY"}},
        {"options": {"api_key": "${KEY}", "password": ""}},
        {"prompt": {"text": "Read https://example.org/?q=a and the secret is patience."}},
        {"data": {"path": "owner/name", "split": "train[:10]"}, "stop_token_ids": [1]},
    ],
)
def test_what_is_no_secret_passes(tree: dict[str, Any]) -> None:
    assert secret_in(tree) is None


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"vllm serve m --api-key {SECRET}", "--api-key"),
        (f"vllm serve m --api-key={SECRET}", "--api-key"),
        (f"serve --token '{SECRET}'", "--token"),
        (f"VLLM_API_KEY={SECRET} vllm serve m", "VLLM_API_KEY"),
        (f"export HF_TOKEN={SECRET}; vllm", "HF_TOKEN"),
        ("curl -H 'Authorization: sk-" + "a1" * 20 + "' x", "it"),
        (f"curl https://h/?key={SECRET}", "an address"),
        (f'serve --password "{SECRET}', "--password"),
        ('vllm serve m --api-key "$KEY" --max-model-len 10', None),
        ("vllm serve m --tokenizer x --max-num-batched-tokens 9 --api-key=$KEY", None),
        ("echo token", None),
    ],
)
def test_secrets_of_commands_are_found(line: str, name: str | None) -> None:
    assert secret_in_command(line) == name


def test_a_url_takes_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HttpSettings(url="https://h/score?key=${REWARD_KEY_OF_TEST}")
    monkeypatch.delenv("REWARD_KEY_OF_TEST", raising=False)
    with pytest.raises(InputError, match="REWARD_KEY_OF_TEST"):
        JsonClient(settings)
    monkeypatch.setenv("REWARD_KEY_OF_TEST", SECRET)
    assert JsonClient(settings).shown == "https://h/score"
    with pytest.raises(InputError) as told:
        JsonClient(HttpSettings(url=f"h/score?key={SECRET}"))
    assert SECRET not in str(told.value)
