"""Logs of Inspect, in its JSON form, compared sample by sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprompt.certify.comparison import paired_difference
from rlprompt.errors import InputError
from rlprompt.evaluation.inspect_logs import compare_inspect_logs, read_inspect_log
from tests.cli.runs import rlprompt


def log(
    path: Path, grades: dict[str, list[Any]], task: str = "quiz", scorer: str = "match"
) -> Path:
    samples = [
        {"id": id_, "epoch": epoch, "scores": {scorer: {"value": value, "answer": "x"}}}
        for id_, own in grades.items()
        for epoch, value in enumerate(own, 1)
    ]
    about = {"task": task, "model": "rlprompt/a", "created": "2026-01-01"}
    path.write_text(
        json.dumps({"version": 2, "status": "success", "eval": about, "samples": samples})
    )
    return path


def test_the_difference_is_paired_by_sample(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    one = (draws.random((30, 2)) < 0.4).astype(float)
    two = np.maximum(one, draws.random((30, 2)) < 0.4).astype(float)
    letter = {0.0: "I", 1.0: "C"}
    files = [
        log(
            tmp_path / f"{i}.json",
            {
                f"s{q}": [letter[v] for v in row]
                for q, row in (enumerate(table) if i == 0 else reversed(list(enumerate(table))))
            },
        )
        for i, table in enumerate((one, two))
    ]
    (found,) = compare_inspect_logs([read_inspect_log(file) for file in files])
    assert found.against_first[0] == paired_difference(two, one)
    assert found.against_first[0].outcome == "better"
    assert found.means[0].value == pytest.approx(one.mean())
    shown = rlprompt("compare", *files)
    assert shown.code == 0, shown.err
    assert "match, 30 samples" in shown.out
    assert "1.json (rlprompt/a): better than 0.json (rlprompt/a) by 0." in shown.out
    plain = json.loads(rlprompt("compare", *files, "--json").out)
    assert plain["scorers"][0]["against_first"][0]["outcome"] == "better"


def test_values_of_all_forms_are_read(tmp_path: Path) -> None:
    values = ["C", "P", "I", "N", True, 0.25, "0.5", "yes", "prose", None]
    file = log(tmp_path / "a.json", {str(i): [v] for i, v in enumerate(values)})
    read = read_inspect_log(file).values["match"]
    numbers = [read[str(i)][0] for i in range(len(values))]
    assert numbers[:8] == [1.0, 0.5, 0.0, 0.0, 1.0, 0.25, 0.5, 1.0]
    assert np.isnan(numbers[8:]).all()
    named = log(tmp_path / "b.json", {"a": [{"tone": 1, "form": "I"}]})
    assert read_inspect_log(named).values.keys() == {"match/tone", "match/form"}


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    one = log(tmp_path / "one.json", {"a": ["C"], "b": ["I"]})
    cases = {
        "name logs of one task": log(tmp_path / "t.json", {"a": ["C"], "b": ["I"]}, task="other"),
        "different samples": log(tmp_path / "s.json", {"a": ["C"], "c": ["I"]}),
        "share no scorer": log(tmp_path / "r.json", {"a": ["C"], "b": ["I"]}, scorer="model"),
        "holds no samples": log(tmp_path / "e.json", {}),
    }
    for why, other in cases.items():
        shown = rlprompt("compare", one, other)
        assert shown.code == 2 and why in shown.err, shown.err
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(InputError, match="is not a log of Inspect in JSON"):
        read_inspect_log(tmp_path / "x.json")
    assert "is named twice" in rlprompt("compare", one, one).err
    assert "one log cannot be compared" in rlprompt("compare", one).err
    assert "no JSON log and others are" in rlprompt("compare", one, tmp_path).err
    assert "cannot be read" in rlprompt("compare", one, tmp_path / "no.json").err
