"""Hashes: every byte counts for the artifact, only what acts counts for the prompt."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rlprompt.artifacts import identity
from rlprompt.artifacts.identity import artifact_files, content_hash, prompt_hash
from rlprompt.errors import InputError
from tests.fixtures.artifacts import of_version, save_kind
from tests.fixtures.runs import tiny_policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_kind(tmp_path / "a", tiny_policy(), "lora")


def test_content_is_names_and_bytes(folder: Path) -> None:
    digest = hashlib.sha256()
    for name in (
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "prompt.json",
        "prompt.safetensors",
    ):
        content = (folder / name).read_bytes()
        digest.update(f"{len(name)} {len(content)}\n{name}".encode() + content)
    assert content_hash(folder) == digest.hexdigest()


def test_every_byte_is_content_and_the_card_is_not_the_prompt(folder: Path) -> None:
    content, prompt = content_hash(folder), prompt_hash(folder)
    (folder / "README.md").write_text("another card")
    assert content_hash(folder) != content and prompt_hash(folder) == prompt
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert prompt_hash(folder) != prompt


def test_the_prompt_hash_does_not_know_the_version(folder: Path) -> None:
    prompt = prompt_hash(folder)
    assert prompt_hash(of_version(folder, 2)) == prompt


def test_certificate_and_signature_are_not_the_prompt(folder: Path) -> None:
    prompt = prompt_hash(folder)
    for name in ("certificate.json", "signature.json"):
        (folder / name).write_text("{}")
    assert prompt_hash(folder) == prompt


def test_what_has_no_end_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "MOST_BYTES", 10)
    with pytest.raises(InputError, match="have more than 10 bytes"):
        content_hash(folder)
    monkeypatch.setattr(identity, "DATA_BYTES", 10)
    with pytest.raises(InputError, match=r"cannot be read \(it has more than"):
        content_hash(folder)


@pytest.mark.parametrize("function", [content_hash, prompt_hash], ids=["content", "prompt"])
def test_neither_waits_for_a_pipe(folder: Path, function: object) -> None:
    os.mkfifo(folder / "pipe")
    assert callable(function)
    with pytest.raises(InputError, match="no regular file"):
        function(folder)


def test_a_link_is_a_file_for_the_prompt_only(folder: Path, tmp_path: Path) -> None:
    prompt = prompt_hash(folder)
    path = folder / "prompt.safetensors"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    assert prompt_hash(folder) == prompt
    with pytest.raises(InputError, match="no regular file"):
        content_hash(folder)


def test_many_files_are_refused(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number}.json").touch()
    with pytest.raises(InputError, match="more than 256 files"):
        artifact_files(folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"a":' * 99 + "1" + "}" * 99, json.dumps("x")])
def test_a_damaged_description_is_one_sentence(folder: Path, content: str) -> None:
    (folder / "prompt.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        prompt_hash(folder)
