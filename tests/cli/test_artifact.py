"""`rlprompt artifact` and `rlprompt schema --artifact`."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from rlprompt.artifacts.identity import content_hash, prompt_hash
from tests.cli.runs import rlprompt
from tests.fixtures.artifacts import of_version, save_kind
from tests.fixtures.prompts import KINDS
from tests.fixtures.runs import tiny_policy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_kind(tmp_path / "run" / "artifact", tiny_policy(), "soft")


def test_verify_says_what_it_is(folder: Path) -> None:
    shown = rlprompt("artifact", "verify", folder.parent)
    assert shown.code == 0 and "soft prompt for tiny-llama, version 3" in shown.out
    assert "signature: none" in shown.out
    report = json.loads(rlprompt("artifact", "verify", folder, "--json").out)
    assert report["content"] == content_hash(folder) and report["prompt"] == prompt_hash(folder)
    assert report["signed_by"] is None and report["signature_verified"] is False


def test_verify_refuses_damage(folder: Path) -> None:
    (folder / "code.py").write_text("print('hello')")
    shown = rlprompt("artifact", "verify", folder)
    assert shown.code == 2 and "is no file that an artifact has" in shown.err
    (folder / "code.py").unlink()
    path = folder / "prompt.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    shown = rlprompt("artifact", "verify", folder)
    assert shown.code == 2 and "copy the artifact again" in shown.err


def test_sign_and_verify(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    from tests.fixtures.keys import key_pair

    private, public = key_pair(tmp_path)
    shown = rlprompt("artifact", "sign", folder, "--key", private)
    assert shown.code == 0 and "signed content" in shown.out
    shown = rlprompt("artifact", "verify", folder, "--key", public)
    assert shown.code == 0 and "made with the key of" in shown.out
    assert "give --key to prove whose" in rlprompt("artifact", "verify", folder).out
    (folder / "README.md").write_text("x")
    assert rlprompt("artifact", "verify", folder).code == 2


def test_migrate(folder: Path, tmp_path: Path) -> None:
    of_version(folder, 2)
    before = prompt_hash(folder)
    shown = rlprompt("artifact", "migrate", folder, "-o", tmp_path / "new")
    assert shown.code == 0 and "version 2 is now 3" in shown.out
    assert json.loads((folder / "prompt.json").read_text())["schema_version"] == 2
    assert prompt_hash(tmp_path / "new") == before
    assert "nothing was changed" in rlprompt("artifact", "migrate", tmp_path / "new").out
    shown = rlprompt("artifact", "migrate", folder, "-o", tmp_path / "new")
    assert shown.code == 2 and "is not empty" in shown.err
    assert rlprompt("artifact", "migrate", folder.parent).code == 0
    assert json.loads((folder / "prompt.json").read_text())["schema_version"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "run"]


def test_the_schema_is_that_of_what_is_written(tmp_path: Path) -> None:
    schema = json.loads(rlprompt("schema", "--artifact").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    for kind in sorted(KINDS):
        folder = save_kind(tmp_path / kind, tiny_policy(), kind)
        content = json.loads((folder / "prompt.json").read_text())
        jsonschema.validate(content, schema)
        for wrong in ({**content, "schema_version": 2}, {**content, "more": 1}, {"name": "n"}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, schema)
    assert schema == json.loads((ROOT / "docs" / "artifact.schema.json").read_text())
