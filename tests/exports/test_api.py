"""`rlprompt.export` and `rlprompt export`: from an artifact to a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rlprompt
from rlprompt.artifacts.format import save_artifact
from rlprompt.artifacts.identity import content_hash
from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.text import TextPrompt
from tests.cli.runs import rlprompt as command
from tests.fixtures.prompts import make
from tests.fixtures.tiny import save_tiny


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = save_tiny(tmp_path_factory.mktemp("model"))
    return open_policy(ModelSettings(path=str(folder), dtype="float32", device="cpu"))


def saved(folder: Path, policy: Policy, kind: str = "soft") -> Path:
    model = {"path": policy.base.id, "dtype": "float32", "device": "cpu"}
    prompt = make(kind, policy, 0.3)
    save_artifact(folder, policy, prompt, name="n", recipe={"model": model}, metrics={})
    return folder


def test_an_artifact_is_exported_on_its_own_base(policy: Policy, tmp_path: Path) -> None:
    artifact = saved(tmp_path / "run" / "artifact", policy)
    before = content_hash(artifact)
    shown = command("export", tmp_path / "run", "--to", "peft", "--output", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert "adapter_config.json" in shown.out and "README.md says how to load it" in shown.out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == policy.base.id
    assert content_hash(artifact) == before
    again = rlprompt.export(artifact, "peft", tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_loaded_prompt_is_exported_as_its_artifact_is(policy: Policy, tmp_path: Path) -> None:
    artifact = saved(tmp_path / "a", policy)
    loaded = rlprompt.Model(policy).load(artifact)
    one = rlprompt.export(loaded, "vocabulary", tmp_path / "one")
    other = rlprompt.export(
        artifact, "vocabulary", tmp_path / "other", model=rlprompt.Model(policy)
    )
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name
    with pytest.raises(InputError, match="force has no effect for an artifact"):
        rlprompt.export(loaded, "kv", tmp_path / "x", force=True)


def test_a_text_needs_no_base(policy: Policy, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    prompt = TextPrompt("  Be brief.\nAlways. ")
    save_artifact(folder, policy, prompt, name="n", recipe={"model": {"path": "x"}}, metrics={})
    out = rlprompt.export(folder, "text", tmp_path / "out")
    assert (out / "system.txt").read_bytes() == b"Be brief.\nAlways."
    shown = command("export", folder, "--to", "text", "-o", tmp_path / "b", "--model", "x")
    assert shown.code == 2 and "model has no effect in the format text" in shown.err


def test_another_base_is_refused_unless_forced(policy: Policy, tmp_path: Path) -> None:
    artifact = saved(tmp_path / "a", policy)
    info = json.loads((artifact / "prompt.json").read_text())
    (artifact / "prompt.json").write_text(json.dumps({**info, "base_fingerprint": "0" * 64}))
    arguments = ["export", artifact, "--to", "kv", "-o", tmp_path / "out"]
    shown = command(*arguments)
    assert shown.code == 2 and "--force" in shown.err and not (tmp_path / "out").exists()
    assert command(*arguments, "--force").code == 0


@pytest.mark.parametrize(
    ("to", "output", "words"),
    [
        ("merged", "out", "use --to peft or vocabulary or vllm-embeds or kv"),
        ("onnx", "out", "there is no format 'onnx'"),
        ("gguf-control", "out", "no GGUF control vector"),
        ("kv", "a/kv", "lies in the artifact"),
        ("kv", "a", "lies in the artifact"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    policy: Policy, tmp_path: Path, to: str, output: str, words: str
) -> None:
    artifact = saved(tmp_path / "a", policy)
    shown = command("export", artifact, "--to", to, "--output", tmp_path / output)
    assert shown.code == 2 and words in shown.err and len(shown.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_damaged_artifact_is_not_exported(policy: Policy, tmp_path: Path) -> None:
    artifact = saved(tmp_path / "a", policy)
    path = artifact / "prompt.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    shown = command("export", artifact, "--to", "kv", "--output", tmp_path / "out")
    assert shown.code == 2 and "copy the artifact again" in shown.err
    shown = command("export", tmp_path / "absent", "--to", "kv", "--output", tmp_path / "out")
    assert shown.code == 2 and "is not an artifact" in shown.err
