"""`rlprompt registry` from the outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprompt.cli.main import main
from rlprompt.registry.store import Registry
from tests.registry.test_store import artifact


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLPROMPT_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("RLPROMPT_USER", "ann")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def registry(capsys: pytest.CaptureFixture[str], *arguments: str, fails: bool = False) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["registry", *arguments])
    told = capsys.readouterr()
    assert ended.value.code == (2 if fails else 0), told.err
    return told.err if fails else told.out


def test_from_a_run_to_production_and_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact(folder / "run" / "artifact", "Be brief.", reward=0.4)
    artifact(folder / "second", "Be very brief.", reward=0.5, learned=True, verdict="Better.")
    assert "brief:1 is prompt" in registry(
        capsys, "add", str(folder / "run"), "brief", "-m", "the first", "--tag", "short"
    )
    registry(capsys, "add", str(folder / "second"), "brief")
    registry(capsys, "protect", "brief", "prod", "--verdict")
    refused = registry(capsys, "promote", "brief", "prod", "1", fails=True)
    assert "'brief@prod' is protected: version 1 has no verdict" in refused
    told = registry(capsys, "promote", "brief", "prod", "2", "--why", "better on test queries")
    assert "brief@prod is 2, was nothing (version 2 has the verdict: Better.)" in told
    registry(capsys, "promote", "brief", "prod", "1=0.5", "2=0.5", "--force", "--why", "a test")
    assert "brief@prod is 2, was 1=0.5 2=0.5" in registry(capsys, "rollback", "brief", "prod")
    story = registry(capsys, "history", "brief", "prod")
    assert "forced: a test" in story and "better on test queries" in story
    rows = json.loads(registry(capsys, "history", "brief", "--json"))
    assert [row["by"] for row in rows] == ["ann"] * 3
    listed = registry(capsys, "list")
    assert "brief:1" in listed and "prod" in listed and "the first" in listed
    only: dict[str, Any] = json.loads(registry(capsys, "list", "--tag", "short", "--json"))
    assert [v["number"] for v in only["brief"]["versions"]] == [1]
    shown = json.loads(registry(capsys, "show", "brief@prod", "--json"))
    assert (shown["text"], shown["aliases"], shown["number"]) == ("Be very brief.", ["prod"], 2)
    assert (Path(shown["path"]) / "prompt.json").is_file()
    assert "Be very brief." in registry(capsys, "show", "brief:2")
    changes = registry(capsys, "diff", "brief:1", "brief@prod")
    assert "+Be very brief." in changes and "0.4" in changes and "0.5" in changes
    pushed = registry(capsys, "push", "brief@prod", str(folder / "shared"))
    assert "pushed as brief:1" in pushed
    pulled = registry(capsys, "pull", str(folder / "shared"), "brief:1", "--name", "again")
    assert "again:1 is prompt" in pulled
    assert Registry(folder / "registry").names() == ["again", "brief"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["list"], "there is no registry in"),
        (["add", "nowhere", "brief"], "is not an artifact"),
        (["promote", "brief", "prod"], "or --remove, not both"),
        (["promote", "brief", "prod", "1", "--remove"], "or --remove, not both"),
        (["promote", "brief", "prod", "one"], "'one' names no version"),
        (["promote", "brief", "prod", "1=0"], "'1=0' names no version"),
        (["promote", "brief", "prod", "1=nan"], "'1=nan' names no version"),
        (["protect", "brief", "prod", "--reward", "x"], "give --certificate too"),
        (["protect", "brief", "prod", "--certificate", "0"], "no sample can certify"),
        (["pull", "hf://a/b"], "give one with --name"),
    ],
)
def test_wrong_input_is_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = registry(capsys, *arguments, fails=True)
    assert says in " ".join(told.split())
    assert "Traceback" not in told
