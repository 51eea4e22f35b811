"""Artifacts of versions 1 and 2 are read, and written anew without a change of the prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.artifacts.identity import content_hash, prompt_hash
from rlprompt.artifacts.migration import migrate_artifact
from rlprompt.errors import InputError
from tests.fixtures.artifacts import of_version, save_kind
from tests.fixtures.prompts import KINDS
from tests.fixtures.runs import tiny_policy

_BY_VERSION = [(1, "soft"), (1, "text"), *((2, kind) for kind in sorted(KINDS))]


@pytest.mark.parametrize(("version", "kind"), _BY_VERSION)
def test_a_migrated_prompt_is_the_same(tmp_path: Path, version: int, kind: str) -> None:
    policy = tiny_policy()
    folder = of_version(save_kind(tmp_path / "a", policy, kind), version)
    before = load_artifact(folder, policy)
    own = prompt_hash(folder)
    files = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    assert migrate_artifact(folder) == version
    assert read_artifact_info(folder).schema_version == 3
    assert prompt_hash(folder) == own
    assert {p: p.read_bytes() for p in folder.rglob("*.safetensors")} == files
    after = load_artifact(folder, policy)
    for one, other in zip(policy.prefix(before).keys, policy.prefix(after).keys, strict=True):
        assert torch.equal(one, other)
    content = content_hash(folder)
    assert migrate_artifact(folder) == 3 and content_hash(folder) == content


def test_a_damaged_one_stays_as_it_is(tmp_path: Path) -> None:
    folder = of_version(save_kind(tmp_path / "a", tiny_policy(), "soft"), 2)
    content = json.loads((folder / "prompt.json").read_text())
    (folder / "prompt.json").write_text(json.dumps({**content, "surprise": 1}))
    before = content_hash(folder)
    with pytest.raises(InputError, match="surprise"):
        migrate_artifact(folder)
    assert content_hash(folder) == before


def test_a_number_that_was_written_as_text_is_no_other_prompt(tmp_path: Path) -> None:
    """A reader that is lenient about types would migrate to another hash."""
    folder = of_version(save_kind(tmp_path / "a", tiny_policy(), "soft"), 2)
    content = json.loads((folder / "prompt.json").read_text())
    content["num_virtual_tokens"] = str(content["num_virtual_tokens"])
    (folder / "prompt.json").write_text(json.dumps(content))
    before = content_hash(folder)
    with pytest.raises(InputError):
        migrate_artifact(folder)
    assert content_hash(folder) == before


def test_a_signed_one_is_not_touched(tmp_path: Path) -> None:
    folder = of_version(save_kind(tmp_path / "a", tiny_policy(), "soft"), 2)
    (folder / "signature.json").write_text("{}")
    with pytest.raises(InputError, match=r"is signed.*remove signature\.json, migrate, and sign"):
        migrate_artifact(folder)


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path) -> None:
    folder = of_version(save_kind(tmp_path / "a", tiny_policy(), "soft"), 2)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    names = {path.name for path in folder.iterdir()}
    migrate_artifact(folder)
    assert {path.name for path in folder.iterdir()} == names
