"""`rlprompt eval --suite` and `--gate`: pages, numbers, going on, and a verdict for CI."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.cli.runs import Shown, rlprompt, write_recipe

SUITE: dict[str, Any] = {
    "name": "small",
    "queries": 2,
    "max_tokens": 5,
    "situations": [
        {"type": "system", "name": "date", "before": "Today is Monday."},
        {"type": "frame", "name": "script", "texts": ["<script>alert(1)</script> {query}"]},
        {"type": "quantised", "bits": 4, "group_size": 16},
        {"type": "dialogue", "turns": [1, 2], "user": "rules"},
    ],
    "measures": [
        {"type": "neutral"},
        {"type": "leakage", "max_tokens": 3, "copies": 1},
        {"type": "standard", "set": "xstest", "path": "not_there.csv"},
    ],
}
GATE = {
    "limits": [
        {
            "metric": "measures/neutral/kl",
            "at_most": 0.32,
            "why": "neutral text must stay what it is",
        },
        {"metric": "adherence/reward", "at_least": -1.0},
    ]
}


def written(path: Path, value: Any) -> Path:
    path.write_text(yaml.safe_dump(value))
    return path


@pytest.fixture(scope="module")
def artifacts(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prompt as it was learned, and the same with vectors blown up until it speaks otherwise."""
    folder = tmp_path_factory.mktemp("bad")
    bad = folder / "artifact"
    bad.mkdir()
    for file in (finished / "artifact").iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bad / "prompt.safetensors")
    noise = torch.Generator().manual_seed(0)
    save_file(
        {k: 2.0 * torch.randn(v.shape, generator=noise) for k, v in tensors.items()},
        bad / "prompt.safetensors",
    )
    return {"good": finished, "bad": bad}


@pytest.fixture(scope="module")
def both(
    artifacts: dict[str, Path], finished: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Shown, Path]:
    """The command on both artifacts, with suite and gate, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("both")
    suite = written(folder / "suite.yaml", SUITE)
    gate = written(folder / "gate.yaml", GATE)
    recipe = finished.parent / "recipe.yaml"
    options = ("--recipe", recipe, "--suite", suite, "--gate", gate, "--output", folder / "out")
    return rlprompt("eval", artifacts["good"], artifacts["bad"], *options), folder / "out"


def test_a_good_artifact_passes_and_a_bad_one_fails_for_the_stated_reason(
    both: tuple[Shown, Path],
) -> None:
    shown, output = both
    assert shown.code == 1, shown.err
    report = json.loads((output / "evaluation.json").read_text())
    verdicts = report["gate"]["artifacts"]
    assert {name: each["passes"] for name, each in verdicts.items()} == {
        "tiny": True,
        "tiny (2)": False,
    }
    (reason,) = [c["sentence"] for c in verdicts["tiny (2)"]["checks"] if not c["passes"]]
    assert reason.startswith("the upper bound of measures/neutral/kl is ")
    assert reason.endswith("which is not at most 0.32 (neutral text must stay what it is)")
    assert "gate passed: tiny\n" in shown.out and "gate FAILED: tiny (2)\n" in shown.out
    assert reason in shown.out
    assert report["gate"]["passes"] is False


def test_the_numbers_are_all_there(both: tuple[Shown, Path]) -> None:
    report = json.loads((both[1] / "evaluation.json").read_text())
    result = report["artifacts"]["tiny"]
    assert list(result["adherence"]["rewards"]) == ["reward", "vowels", "repetition"]
    reward = result["adherence"]["rewards"]["reward"]
    assert reward["best_written"]["text"] == "Answer in one line."
    assert {"minus_base", "minus_written"} <= reward.keys()
    labels = [row["situation"] for row in result["situations"]]
    assert labels == ["date", "script", "quantised", "dialogue_turn_1", "dialogue_turn_2"]
    change = result["situations"][0]["rewards"]["reward"]["change"]
    assert change["num_compared"] == len(labels) * 3
    assert result["metrics"]["situations/date/reward/change"] == change
    kl = result["measures"][0]["numbers"]["kl"]
    assert kl["base"]["value"] == 0.0 < kl["prompt"]["value"]
    assert result["left_out"] == [s for s in result["left_out"] if "xstest" in s]
    assert len(result["left_out"]) == 1
    assert result["findings"]


def test_the_page_stands_alone_and_is_escaped(both: tuple[Shown, Path]) -> None:
    page = (both[1] / "suite.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert page.count("<svg") >= 2
    assert "Does not pass the gate" in page and "Passes the gate" in page


def test_a_run_goes_on_from_what_is_there(
    both: tuple[Shown, Path], artifacts: dict[str, Path], finished: Path
) -> None:
    output = both[1]
    before = json.loads((output / "evaluation.json").read_text())
    cells = sorted((output / "cells").iterdir())
    cells[0].unlink()
    cells[1].write_text("{")
    recipe = finished.parent / "recipe.yaml"
    again = rlprompt(
        "eval", artifacts["good"], artifacts["bad"], "--recipe", recipe, "--output", output,
        "--suite", output.parent / "suite.yaml", "--gate", output.parent / "gate.yaml",
    )  # fmt: skip
    assert again.code == 1, again.err
    after = json.loads((output / "evaluation.json").read_text())
    assert after["cells_computed"] == 2
    assert after["artifacts"] == before["artifacts"]
    # The base's cells served the second artifact too.
    assert before["cells_kept"] >= 6


def test_a_suite_with_data_and_rewards_of_its_own_needs_no_recipe(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"query": "what is rain", "kind": "wet"}, {"query": "what is sun", "kind": "dry"}]
    own = {
        "name": "own",
        "max_tokens": 4,
        "slices": "kind",
        "data": {"rows": [*rows, {"query": "who is he", "kind": "dry"}], "heldout": 0},
        "rewards": [{"path": "builtin:repetition"}],
    }
    suite = written(tmp_path / "own.yaml", own)
    shown = rlprompt("eval", artifacts["bad"], "--suite", suite, "--output", tmp_path / "out")
    assert shown.code == 0, shown.err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    row = report["artifacts"]["tiny"]["adherence"]["rewards"]["repetition"]
    counts = {value: each["prompt"]["num_queries"] for value, each in row["slices"].items()}
    assert counts == {"wet": 1, "dry": 2}
    assert report["gate"] is None
    changed = rlprompt(
        "eval", artifacts["bad"], "seed=3", "--suite", suite, "--output", tmp_path / "out"
    )
    assert changed.code == 2 and "'seed=3' changes a recipe" in changed.err


def test_a_text_of_a_recipe_is_evaluated_too(model_dir: Path, tmp_path: Path) -> None:
    prompt = {"type": "text", "text": "Answer in one line."}
    recipe = write_recipe(tmp_path / "text", model_dir, prompt=prompt)
    suite = written(tmp_path / "s.yaml", {"name": "s", "queries": 2, "max_tokens": 3})
    shown = rlprompt("eval", "--recipe", recipe, "--suite", suite, "--output", tmp_path / "out")
    assert shown.code == 0, shown.err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    row = report["artifacts"]["tiny"]["adherence"]["rewards"]["reward"]
    assert row["minus_written"]["value"] == 0.0
    assert row["minus_written"]["outcome"] == "same"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--suite", "quick"], "name a folder with --output"),
        (["--suite", "quik", "--output", "OUT"], "there is no suite 'quik'; did you mean 'quick'"),
        (["--gate", "no.yaml", "--output", "OUT"], "gate 'no.yaml' cannot be read"),
        (["--suite", "quick", "--output", "OUT", "data.heldout=0"], "suite needs two at least"),
    ],
    ids=["output", "name", "gate", "queries"],
)
def test_wrong_input_is_told(finished: Path, tmp_path: Path, options: list[str], why: str) -> None:
    given = [str(tmp_path / "out") if each == "OUT" else each for each in options]
    shown = rlprompt("eval", finished, *given)
    assert shown.code == 2
    assert why in shown.err
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_gate_on_what_was_not_measured_is_an_error(finished: Path, tmp_path: Path) -> None:
    gate = written(tmp_path / "g.yaml", {"limits": [{"metric": "nothing/here", "at_least": 0}]})
    suite = written(tmp_path / "s.yaml", {"name": "s", "queries": 2, "max_tokens": 3})
    shown = rlprompt("eval", finished, "--suite", suite, "--gate", gate, "-o", tmp_path / "out")
    assert shown.code == 2
    assert "the gate limits 'nothing/here', which this suite did not measure" in shown.err


def test_an_error_names_its_situation(finished: Path, tmp_path: Path) -> None:
    situations = [{"type": "long_context", "words": 900}]
    suite = written(
        tmp_path / "s.yaml",
        {"name": "s", "queries": 2, "max_tokens": 3, "situations": situations},
    )
    shown = rlprompt("eval", finished, "--suite", suite, "--output", tmp_path / "out")
    assert shown.code == 2
    assert "error: situation long_context: " in shown.err and "positions" in shown.err
