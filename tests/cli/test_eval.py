"""`rlprompt eval`: what it prints is what the run measured, and a text becomes an artifact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe


def test_an_artifact_does_as_in_its_run(finished: Path, tmp_path: Path) -> None:
    recipe = finished.parent / "recipe.yaml"
    shown = rlprompt("eval", finished / "artifact", "--recipe", recipe, "--output", tmp_path)
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    summary = json.loads((finished / "summary.json").read_text())
    rewards = {who: row["reward"] for who, row in report["heldout"].items()}
    assert rewards == {
        "base": summary["heldout_reward_before"],
        "handwritten": summary["heldout_reward_handwritten"],
        "prompt": summary["heldout_reward_after"],
    }
    assert (report["representation"], report["recipe"]) == ("soft", "tiny")
    assert not (tmp_path / "artifact").exists()


@pytest.fixture(scope="module")
def text_recipe(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    prompt = {"type": "text", "text": "Answer in one line."}
    return write_recipe(folder, model_dir, prompt=prompt)


def test_a_text_is_evaluated_saved_and_talked_to(text_recipe: Path, tmp_path: Path) -> None:
    shown = rlprompt("eval", "--recipe", text_recipe, "--output", tmp_path)
    assert shown.code == 0, shown.err
    heldout = json.loads(shown.out)["heldout"]
    assert heldout["prompt"] == heldout["handwritten"] != heldout["base"]
    again = rlprompt("eval", tmp_path / "artifact", "--recipe", text_recipe)
    assert json.loads(again.out)["heldout"] == heldout
    query = ("--query", "what is rain", "--max-tokens", "5")
    chat = rlprompt("chat", tmp_path / "artifact", "--compare", *query)
    assert chat.code == 0, chat.err
    answers = dict(line.split("] ", 1) for line in chat.out.splitlines() if line.startswith("["))
    assert answers["[learned"] == answers["[hand-written"] != answers["[base"]


def test_a_text_cannot_be_trained(text_recipe: Path, tmp_path: Path) -> None:
    shown = rlprompt("train", text_recipe, "--output", tmp_path / "run")
    assert shown.code == 2
    assert "prompt.type is text, which has nothing to train; evaluate it with" in shown.err
    assert not (tmp_path / "run").exists()


def test_changes_to_the_recipe_and_no_queries(text_recipe: Path) -> None:
    shown = rlprompt("eval", "--recipe", text_recipe, "--set", "data.heldout=0")
    assert shown.code == 2
    assert "data.heldout is 0" in shown.err
