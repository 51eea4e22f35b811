"""The program on a card: run as it stands, it answers as rlprompt does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.artifacts.card import card
from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.artifacts.snippet import loading_example
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.types import Query
from tests.fixtures.artifacts import save_kind
from tests.fixtures.prompts import KINDS
from tests.fixtures.tiny import TEMPLATE, save_tiny

QUESTION = "How do I sharpen a knife?"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + TEMPLATE.partition("{% endif %}")[2]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def opened(folder: Path) -> Policy:
    return open_policy(ModelSettings(path=str(folder), dtype="float32", device="cpu"))


def ours(policy: Policy, artifact: Path) -> list[int]:
    engine = NativeEngine(policy)
    engine.sync(load_artifact(artifact, policy))
    query = Query(messages=({"role": "user", "content": QUESTION},))
    settings = SamplingSettings(max_tokens=12, temperature=0.0)
    return list(engine.generate([query], 1, settings, seed=0).groups[0].completions[0].token_ids)


def run(program: str, monkeypatch: pytest.MonkeyPatch, artifact: Path) -> dict[str, Any]:
    monkeypatch.chdir(artifact)
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(program.replace("max_new_tokens=200", "max_new_tokens=12"), names)
    return names


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_program_answers_as_rlprompt(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    policy = opened(folder)
    artifact = save_kind(tmp_path / "a", policy, kind)
    found = re.search(r"```python\n(.*?)\n```", (artifact / "README.md").read_text(), re.DOTALL)
    assert found is not None
    parts = len(read_artifact_info(artifact).details.get("parts", [1]))
    statements = [line for line in found[1].splitlines() if line and "import" not in line]
    assert len(statements) <= 12 + parts
    names = run(found[1], monkeypatch, artifact)
    assert names["answer"][0, names["ids"].shape[1] :].tolist() == ours(policy, artifact)


@pytest.mark.parametrize("kind", ["soft", "text", "lora"])
def test_it_does_so_where_there_is_no_system_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = save_tiny(tmp_path / "model")
    (model / "chat_template.jinja").write_text(NO_SYSTEM)
    policy = opened(model)
    artifact = save_kind(tmp_path / "a", policy, kind)
    info = read_artifact_info(artifact)
    assert info.system_role is False
    program = loading_example(info.model_dump())
    assert program is not None
    names = run(program, monkeypatch, artifact)
    assert names["answer"][0, names["ids"].shape[1] :].tolist() == ours(policy, artifact)


def info_of(**changes: Any) -> dict[str, Any]:
    own = {
        "name": "n", "representation": "soft", "num_virtual_tokens": 3, "init_text": "x",
        "base": "b", "base_fingerprint": "f", "template_hash": "t", "created": "now",
        "recipe": {}, "metrics": {},
    }  # fmt: skip
    return {**own, **changes}


def test_there_is_none_where_transformers_alone_cannot() -> None:
    assert loading_example(info_of()) is not None
    for changes in (
        {"representation": "mine"},
        {"endpoint": {"model": "m", "base_url": "u"}},
        {"recipe": {"model": {"template": "plain"}}},
        {"representation": "sequence", "details": {"parts": [{"kind": "mine"}]}},
        {"representation": "sequence", "details": {"parts": 3}},
    ):
        assert loading_example(info_of(**changes)) is None, changes
        assert "```python" not in card(info_of(**changes))


@pytest.mark.parametrize(
    "text", ['"""\n```\n# x', "'; import os #", "\\", "<script>", "{base}", "a\u2028b"], ids=ascii
)
def test_texts_cannot_leave_their_quotes(text: str) -> None:
    program = loading_example(info_of(representation="text", init_text=text, base=text))
    assert program is not None and "<script>" not in program
    values: dict[str, Any] = {}
    lines = program.splitlines()
    exec("\n".join(line for line in lines if line.startswith(("BASE", "turns"))), values)
    assert values["BASE"] == text and values["turns"][0]["content"] == text.strip()
