"""`rlprompt train` on a recipe with `search`, and the other commands on what came of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlprompt.files import read_jsonl
from tests.cli.runs import Shown, rlprompt, write_recipe
from tests.fixtures.ranks import run_ranks
from tests.fixtures.runs import comparable_rows

TEXTS = ["Answer in one line.", "the rain and the sun", "she is in here", "user"]


def search_recipe(folder: Path, model_dir: Path, **changes: Any) -> Path:
    plain: dict[str, Any] = {
        "algorithm": None,
        "prompt": {"type": "text", "text": "Be nice."},
        "search": {"type": "texts", "texts": TEXTS, "completions": 4},
        "training": {"steps": 20, "queries_per_step": 2, "save_every": 1},
    }
    return write_recipe(folder, model_dir, **{**plain, **changes})


@pytest.fixture(scope="module")
def searched(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shown]:
    """A finished search: its run folder, with the recipe beside it, and what was shown."""
    folder = tmp_path_factory.mktemp("search")
    recipe = search_recipe(folder, model_dir)
    shown = rlprompt("train", recipe, "--output", folder / "run")
    assert shown.code == 0, shown.err
    return folder / "run", shown


def test_a_search_is_shown_from_its_first_step_to_its_candidates(
    searched: tuple[Path, Shown],
) -> None:
    folder, shown = searched
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["stopped_because"] == "finished" and summary["steps"] < 20
    assert f"step {summary['steps']}/20: reward" in shown.out
    table = shown.out.split("made by")[1].split("held-out queries")[0]
    assert all(text in table for text in ["Be nice.", *TEXTS])
    numbers = [row["completions"] for row in summary["candidates"]]
    order = [line.split()[1] for line in table.splitlines() if "given" in line]
    assert sorted(numbers, reverse=True) == [numbers[int(number)] for number in order]
    assert (folder / "report.html").stat().st_size > 10_000


def test_the_artifact_is_a_text_that_is_evaluated_and_talked_to(
    searched: tuple[Path, Shown],
) -> None:
    folder, _ = searched
    info = json.loads((folder / "artifact" / "prompt.json").read_text())
    assert info["representation"] == "text" and info["init_text"] in ["Be nice.", *TEXTS]
    assert info["recipe"]["search"]["texts"] == TEXTS
    shown = rlprompt("eval", folder / "artifact", "--recipe", folder.parent / "recipe.yaml")
    assert shown.code == 0, shown.err
    summary = json.loads((folder / "summary.json").read_text())
    heldout = json.loads(shown.out)["heldout"]
    assert heldout["prompt"]["reward"] == summary["heldout_reward_after"]
    chat = rlprompt("chat", folder / "artifact", "--query", "what is rain", "--max-tokens", "5")
    assert chat.code == 0, chat.err


def test_a_search_that_was_cut_off_goes_on(searched: tuple[Path, Shown], tmp_path: Path) -> None:
    folder, _ = searched
    shutil.copytree(folder.parent, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    shutil.rmtree(run / "artifact")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    (run / "summary.json").unlink()
    shown = rlprompt("train", tmp_path / "recipe.yaml", "-o", run, "--resume")
    assert shown.code == 0, shown.err
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(run, kind) == comparable_rows(folder, kind), kind
    texts = [
        json.loads((each / "artifact" / "prompt.json").read_text())["init_text"]
        for each in (folder, run)
    ]
    assert texts[0] == texts[1]
    assert newest.name in {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(
    searched: tuple[Path, Shown], model_dir: Path, tmp_path: Path
) -> None:
    folder, _ = searched
    recipe = search_recipe(tmp_path, model_dir)
    ended = run_ranks(2, tmp_path / "logs", "train", recipe, "-o", tmp_path / "run")
    assert ended.codes == [0, 0], ended.logs
    ours, theirs = (
        [(row["step"], row.get("candidate"), row["completion"]) for row in read_jsonl(path)]
        for path in (folder / "completions.jsonl", tmp_path / "run" / "completions.jsonl")
    )
    assert ours == theirs
