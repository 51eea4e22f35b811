"""`rlprompt init`: what it writes runs as it is, and nothing is ever overwritten."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from rlprompt.recipe.schema import load_recipe
from rlprompt.recipe.starter import DATA_NAME, RECIPE_NAME, REWARD_NAME, STARTERS
from tests.cli.runs import rlprompt

TARGETS = sorted(STARTERS)
NAMES = {RECIPE_NAME, DATA_NAME, REWARD_NAME}
SMALL = (
    "training.steps=2",
    "sampling.max_tokens=8",
    "prompt.init_text=be brief",
    "prompt.num_virtual_tokens=4",
    "evaluation.handwritten=be brief",
    "evaluation.max_queries=4",
    "model.device=cpu",
)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_runs_as_it_is(
    target: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = rlprompt("init", "mine", "--target", target)
    assert shown.code == 0, shown.err
    assert {path.name for path in Path("mine").iterdir()} == NAMES
    checked = rlprompt("reward", "check", "mine/reward.py")
    assert checked.code == 0 and "ready to train on" in checked.out
    planned = rlprompt("plan", "mine/recipe.yaml")
    assert planned.code == 0, planned.err
    trained = rlprompt(
        "train", "mine/recipe.yaml", f"model.path={model_dir}", *SMALL, "--output", "run"
    )
    assert trained.code == 0, trained.err
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("target", TARGETS)
def test_the_recipe_is_the_shipped_one_in_another_place(target: str, tmp_path: Path) -> None:
    folder = tmp_path / "a b'c"
    assert rlprompt("init", folder, "--target", target).code == 0
    ours = load_recipe(folder / RECIPE_NAME).plain()
    root = Path(__file__).parents[2]
    shipped = load_recipe(root / STARTERS[target].recipe).plain()
    assert ours.pop("name") == "a-b-c" and shipped.pop("name")
    assert ours.pop("data") == shipped.pop("data") | {"path": str(folder / DATA_NAME)}
    for mine, theirs in zip(ours.pop("rewards"), shipped.pop("rewards"), strict=True):
        file, _, name = theirs["path"].rpartition(":")
        assert mine.pop("path") == (
            f"{folder / REWARD_NAME}:{name}" if "/" in file else theirs["path"]
        )
        theirs.pop("path")
        assert mine == theirs
    assert ours == shipped
    text = (folder / RECIPE_NAME).read_text()
    assert "EXAMPLES, to be replaced by queries of your own" in text
    keys = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert text.count("# ") > len(keys) / 2  # most keys say what they are
    assert "reward_models" not in (folder / REWARD_NAME).read_text()
    rows = [json.loads(line) for line in (folder / DATA_NAME).read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "other.txt").write_text("other")
    shown = rlprompt("init", tmp_path)
    assert shown.code == 2 and shown.err.count("\n") == 1
    assert f"'{tmp_path / name}' is there already and was left as it is" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "other.txt"])
    assert (tmp_path / name).read_text() == "mine"


def test_a_second_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rlprompt("init").code == 0
    assert yaml.safe_load(Path("style/recipe.yaml").read_text())["name"] == "style"
    assert rlprompt("init").code == 2
    Path("here").mkdir()
    monkeypatch.chdir("here")
    assert rlprompt("init", ".").code == 0
    assert yaml.safe_load(Path("recipe.yaml").read_text())["name"] == "here"


def test_wrong_folders_and_targets_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
        (["x", "--target", "styl"], "there is no target 'styl'; did you mean 'style'?"),
        (["x", "--target", ""], "there is no target ''; choose from persona, safety, style, task"),
        ([tmp_path / "file"], "is a file; name a folder"),
        ([tmp_path / "file" / "below"], "cannot be written to (Not a directory)"),
        ([f"{tmp_path}/{'x' * 300}"], "cannot be written to (File name too long)"),
    ):
        shown = rlprompt("init", *arguments)
        assert shown.code == 2 and shown.err.count("\n") == 1, shown.err
        assert sentence in shown.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written to (Permission denied)" in rlprompt("init", tmp_path).err


def test_a_link_that_leads_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / RECIPE_NAME).symlink_to(tmp_path / "elsewhere")
    shown = rlprompt("init", tmp_path)
    assert shown.code == 2 and "recipe.yaml' is there already" in shown.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECIPE_NAME]
