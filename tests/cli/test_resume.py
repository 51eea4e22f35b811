"""`rlprompt resume`: a run goes on with what it was begun with, and with what may change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.files import read_jsonl
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.runs.changes import CHANGEABLE, may_change
from rlprompt.runs.claim_folder import overridden_keys, recipe_folder
from tests.cli.runs import rlprompt, write_recipe

OVERRIDES = [
    "training.steps=2",
    "training.optimizer.lr=0.01",
    "training.optimizer.schedule=constant",
]


def steps_of(run: Path) -> list[int]:
    return [row["step"] for row in read_jsonl(run / "metrics.jsonl")]


def summary_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def begun(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was begun with overrides; `recipe.yaml` is beside it. Not to be changed."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"query": f"what is {word}"}) + "\n" for word in "abcdefgh")
    )
    recipe = write_recipe(folder, model_dir, data={"path": "data.jsonl", "heldout": 2})
    overrides = [
        "training.steps=2",
        "training.optimizer.lr=0.01",
        "training.optimizer.schedule=constant",
    ]
    shown = rlprompt("train", recipe, *overrides, "-o", folder / "run")
    assert shown.code == 0, shown.err
    return folder / "run"


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    shutil.copytree(begun.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def test_a_finished_run_is_made_longer_with_all_that_was_set(run: Path, tmp_path: Path) -> None:
    shown = rlprompt("resume", run, "training.steps=4")
    assert shown.code == 0, shown.err
    assert "training.steps: 2 -> 4" in shown.out
    assert steps_of(run) == [1, 2, 3, 4]
    summary = summary_of(run)
    assert (summary["steps"], summary["stopped_because"]) == (4, "finished")
    stored = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    assert stored["training"]["optimizer"]["lr"] == 0.01
    assert set(overridden_keys(run)) >= {"training.steps", "training.optimizer.lr"}
    # What was drawn is what one run of four steps draws.
    straight = tmp_path / "straight"
    made = rlprompt("train", run / "recipe.resolved.yaml", "-o", straight)
    assert made.code == 0, made.err
    rewards = [[row["reward"] for row in read_jsonl(r / "metrics.jsonl")] for r in (run, straight)]
    assert rewards[0] == rewards[1]
    # And the readme's second line goes on with it, though it names no override.
    again = rlprompt("train", run.parent / "recipe.yaml", "--output", run, "--resume")
    assert again.code == 0, again.err
    assert steps_of(run) == [1, 2, 3, 4]
    assert "training." not in again.out


def test_a_command_that_changes_what_was_set_says_so(run: Path) -> None:
    recipe = run.parent / "recipe.yaml"
    shown = rlprompt("train", recipe, "training.steps=3", "-o", run, "--resume")
    assert shown.code == 0, shown.err
    assert "training.steps: 2 -> 3" in shown.out and steps_of(run) == [1, 2, 3]
    shown = rlprompt("train", recipe, "training.optimizer.lr=0.5", "-o", run, "--resume")
    assert shown.code == 2
    assert "training.optimizer.lr (was 0.01, is 0.5); go on as it began with `rlprompt" in shown.err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=1", "seed (was 0, is 1)"),
        ("sampling.temperature=0.5", "sampling.temperature (was 1.0, is 0.5)"),
        ("prompt.num_virtual_tokens=9", "prompt.num_virtual_tokens (was 3, is 9)"),
        ("rewards.0.weight=2", "rewards.0.weight (was 1.0, is 2.0)"),
        ("evaluation.handwritten=null", '(was "Answer in one line.", is null)'),
        ("algorithm={type: rloo, group_size: 2}", "algorithm.type (was \"grpo\", is \"rloo\")"),
        ("training.steps=1", "training.steps is 1, but the run has made 2 steps"),
        ("training.step=5", "unknown key 'training.step'"),
        ("nonsense", "not of the form key=value"),
        ("data.path=absent.jsonl", "data"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_go_on_with(begun: Path, override: str, told: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    shown = rlprompt("resume", begun, override)
    assert shown.code == 2
    assert told in shown.err and shown.err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before


def test_other_queries_at_the_path_are_refused(run: Path) -> None:
    (run.parent / "other.jsonl").write_text(
        "".join(json.dumps({"query": f"who is {word}"}) + "\n" for word in "abcdefgh")
    )
    shown = rlprompt("resume", run, f"data.path={run.parent / 'other.jsonl'}")
    assert shown.code == 2 and "the dataset has changed" in shown.err
    same = shutil.copyfile(run.parent / "data.jsonl", run.parent / "same.jsonl")
    assert rlprompt("resume", run, f"data.path={same}").code == 0


def test_folders_that_hold_no_run_to_go_on_with(begun: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent", begun / "artifact"):
        shown = rlprompt("resume", folder)
        assert shown.code == 2 and "holds no run to resume" in shown.err
    member = tmp_path / "members" / "a"
    member.mkdir(parents=True)
    shutil.copyfile(begun / "recipe.resolved.yaml", tmp_path / "recipe.resolved.yaml")
    shutil.copyfile(begun / "recipe.resolved.yaml", member / "recipe.resolved.yaml")
    shown = rlprompt("resume", member)
    assert shown.code == 2 and "is a member of the population in" in shown.err


def test_the_stored_recipe_is_named_by_its_path_too(begun: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(begun.parent.parent)
    shown = rlprompt("resume", Path(begun.parent.name) / "run" / "recipe.resolved.yaml", "seed=3")
    assert "seed (was 0, is 3)" in shown.err


def test_every_changeable_key_is_a_key_of_a_recipe_and_has_a_reason() -> None:
    definitions = Recipe.model_json_schema()
    reference = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    for key, reason in CHANGEABLE.items():
        assert reason.strip()
        first = key.split(".")[0]
        assert first in definitions["properties"], key
        if ".options." not in key and "*" not in key and "." in key:
            assert f"`{key}`" in reference, key
    assert may_change("rewards.12.timeout") and may_change("tracking.trackers.0")
    for key in ("seed", "training.optimizer.lr", "training", "rewards.0", "rewards.0.weight",
                "training.steps_more", "evaluation", "data", "name"):  # fmt: skip
        assert not may_change(key), key


def test_a_resolved_recipe_has_absolute_paths_and_runs_from_where_it_lies(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = begun / "recipe.resolved.yaml"
    tree = yaml.safe_load(stored.read_text())
    assert tree["data"]["path"] == str(begun.parent / "data.jsonl")
    assert tree["rewards"][0]["path"] == f"{begun.parent / 'reward.py'}:reward"
    assert recipe_folder(stored) == begun.parent
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "elsewhere.yaml"  # without its comments
    bare.write_text(yaml.safe_dump(tree))
    assert (
        load_recipe(bare)
        == load_recipe(stored)
        == load_recipe(begun.parent / "recipe.yaml", OVERRIDES)
    )


def test_a_run_of_an_earlier_version_goes_on(run: Path) -> None:
    """It stored relative paths, and in a comment what they are relative to."""
    stored = run / "recipe.resolved.yaml"
    tree = yaml.safe_load(stored.read_text())
    tree["data"]["path"], tree["rewards"][0]["path"] = "data.jsonl", "reward.py:reward"
    head = f"# rlprompt 0.1.0; paths are relative to {str(run.parent)!r}\n"
    stored.write_text(head + yaml.safe_dump(tree))
    shown = rlprompt("resume", run, "training.steps=3")
    assert shown.code == 0, shown.err
    assert steps_of(run) == [1, 2, 3] and "data.path" not in shown.out


def test_a_cosine_that_gets_longer_is_told(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir, data__heldout=0)
    run = tmp_path / "run"
    assert rlprompt("train", recipe, "training.steps=2", "-o", run).code == 0
    before = read_jsonl(run / "metrics.jsonl")
    shown = rlprompt("resume", run, "training.steps=6")
    assert shown.code == 0, shown.err
    assert "the cosine learning rate follows the new training.steps from here on" in shown.out
    rates = [row["learning_rate"] for row in read_jsonl(run / "metrics.jsonl")]
    assert rates[:2] == [row["learning_rate"] for row in before]
    assert rates[2] > rates[1] and rates[2:] == sorted(rates[2:], reverse=True)
