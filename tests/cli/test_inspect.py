"""`rlprompt inspect`: what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt
from tests.interpret.subjects import QUESTIONS

QUERIES = "\n".join(json.dumps({"query": text}) for text in QUESTIONS)


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "queries.jsonl"
    path.write_text(QUERIES)
    return path


@pytest.fixture(scope="module")
def reward(queries: Path) -> Path:
    path = queries.parent / "vowels.py"
    path.write_text(
        "def reward(completions, **kwargs):\n"
        "    return [sum(c in 'aeiou' for c in text) / 8 for text in completions]\n"
    )
    return path


def test_it_writes_what_it_found(
    finished: Path, queries: Path, reward: Path, tmp_path: Path
) -> None:
    (tmp_path / "sentences.txt").write_text("Say <b>the rain</b>.\n\nAnswer in one line.\n")
    shown = rlprompt(
        "inspect",
        finished,
        *("--queries", queries, "--reward", reward, "--output", tmp_path / "out"),
        *("--sentences", tmp_path / "sentences.txt", "--no-library", "--minutes", 0.1),
    )
    assert shown.code == 0, shown.err
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert report["kind"] == "soft" and report["positions"] == 3
    assert report["num_selection"] == 3 and report["num_test"] == 6
    assert report["rewards"] == [f"{reward.resolve()}:reward"]
    best = report["sentences"][0]
    assert best["residual_kl"]["low"] <= best["residual_kl"]["value"] and best["reward"] is not None
    names = [row["name"] for row in report["controls"]]
    assert names[0] == "random prompt of equal norm"
    assert len(report["importance"]["spans"]) == 3
    assert report["summary"][0] in shown.out
    page = (tmp_path / "out" / "inspection.html").read_text()
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert "<b>the rain</b>" not in page
    assert report["nearest"]["verdict"] in ("wayward", "explains", "unclear", "unknown")


def test_the_queries_and_rewards_of_the_run_are_taken_where_none_are_named(
    finished: Path, tmp_path: Path
) -> None:
    shown = rlprompt("inspect", finished, "--output", tmp_path, "--minutes", 0.05)
    assert shown.code == 2 and "2 different queries are too few" in shown.err


def test_an_artifact_alone_runs_no_code_of_its_recipe(
    finished: Path, queries: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(finished / "artifact", alone)
    refused = rlprompt("inspect", alone, "--output", tmp_path / "out")
    assert refused.code == 2 and "--queries FILE" in refused.err
    shown = rlprompt(
        *("inspect", alone, "--output", tmp_path / "out", "--queries", queries),
        *("--minutes", 0.02, "--no-triggers", "--no-library", "--json"),
    )
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert report["triggers"] is None and report["behaviour"]["gain"] is None
    assert "No reward was measured" in report["notes"][0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--minutes", 0), "give a number above 0"),
        (("--minutes", "nan"), "give a number above 0"),
        (("--sentences", "none.txt"), "cannot be read"),
        (("--against", "nowhere"), "is not an artifact"),
        (("--max-queries", 5), "--max-queries"),
        (("--reward-sets", 3), "give at least 4, or 0 for none"),
        (("--word", " "), "--word is blank"),
        (("--word", "x", "--no-triggers"), "--word has no effect"),
    ],
    ids=[
        "no time",
        "no number",
        "no sentences",
        "no other",
        "few",
        "few sets",
        "blank",
        "no search",
    ],
)
def test_what_is_refused(
    finished: Path,
    queries: Path,
    reward: Path,
    tmp_path: Path,
    options: tuple[object, ...],
    told: str,
) -> None:
    named = ("--queries", queries, "--reward", reward, "--output", tmp_path)
    shown = rlprompt("inspect", finished, *named, *options)
    assert shown.code == 2 and told in shown.err


def test_the_inspected_prompt_is_no_other_one(
    finished: Path, queries: Path, reward: Path, tmp_path: Path
) -> None:
    named = ("--queries", queries, "--reward", reward, "--output", tmp_path)
    shown = rlprompt("inspect", finished, *named, "--against", finished)
    assert shown.code == 2 and "is the inspected one" in shown.err
