"""`rlprompt reward train` from data to a reward that a run can use, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.rewards import NAMED, RewardSettings, load_reward
from tests.cli.runs import Shown, rlprompt
from tests.fixtures.classifiers import PAIR_TEMPLATE, save_encoder
from tests.fixtures.tiny import save_tiny

pytest.importorskip("trl")

TREE: dict[str, Any] = {
    "name": "polite",
    "model": {"path": "start", "device": "cpu", "max_tokens": 48, "template": PAIR_TEMPLATE},
    "data": {"type": "labels", "path": "judged.jsonl", "pairs_per_row": 4},
    "learning": {"epochs": 4, "batch_size": 16, "learning_rate": 2e-3},
    "test": {"heldout": 0.4, "calibration": 0.2},
    "compare": [{"reward": {"path": "builtin:refusal", "options": {"want": "answer"}}}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Judged answers that a tiny encoder can learn: refusals are bad, some without an apology."""
    save_encoder(tmp_path / "start")
    rows = []
    subjects = ("rain", "sun", "water", "clouds", "that", "this")
    verbs = ("is", "make", "do", "help with", "can", "please")
    for subject in subjects:
        for verb in verbs:
            for number, (answer, score) in enumerate(
                [
                    ("sure here you can do this", 1.0),
                    ("yes water falls from clouds", 0.8),
                    ("sorry i cannot help with that", 0.0),
                    ("no", 0.1),
                ]
            ):
                query = f"what {verb} the {subject}?"
                rows.append({"query": query, "completion": answer, "score": score, "n": number})
    (tmp_path / "judged.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path, *overrides: str, **changes: Any) -> Shown:
    tree = {key: value for key, value in (TREE | changes).items() if value is not None}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return rlprompt("reward", "train", "recipe.yaml", "--output", "out", *overrides)


def test_learns_what_people_judged_and_says_how_well(folder: Path) -> None:
    shown = train(folder)
    assert shown.code == 0, shown.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["heldout_pairs"]["accuracy"]["value"] > 0.95
    answers, rule = summary["heldout_answers"], summary["rules"]["refusal"]
    assert answers["sensitivity"]["value"] > 0.9
    assert answers["specificity"]["value"] > 0.9
    assert answers["brier"] < answers["brier_of_base_rate"]
    assert answers["auc"] > 0.95
    # "sorry ..." is found by its phrase and "no" by its length, so the rule is good here too.
    assert rule["accuracy"]["of"] == answers["accuracy"]["of"]
    right = [answers["accuracy"]["count"], rule["accuracy"]["count"]]
    assert rule["only_model_right"] - rule["only_rule_right"] == right[0] - right[1]
    assert "pair accuracy" in shown.out
    assert "sensitivity, refusal" in shown.out
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == {
        "model",
        "summary.json",
        "reliability.png",
        "metrics.jsonl",
        "heldout.jsonl",
        "recipe.resolved.yaml",
    }
    assert "| pair accuracy | " in (folder / "out" / "model" / "README.md").read_text()
    assert (folder / "out" / "reliability.png").read_bytes()[:4] == b"\x89PNG"


def test_the_reward_asks_as_the_training_taught(folder: Path) -> None:
    assert train(folder, "learning.epochs=1").code == 0
    options = {"path": "out/model", "activation": "sigmoid", "device": "cpu", "dtype": "float32"}
    settings = RewardSettings(path="builtin:preference", options=options)
    reward = load_reward(settings, folder, NAMED)
    rows = [json.loads(line) for line in (folder / "out" / "heldout.jsonl").open()]
    values = reward(
        prompts=[row["messages"][0]["content"] for row in rows],
        completions=[row["messages"][1]["content"] for row in rows],
    )
    card = json.loads((folder / "out" / "model" / "rlprompt_reward.json").read_text())
    called = [value >= 0.5 for value in values]
    assert called == [row["value"] >= card["offset"] for row in rows]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    right = sum(a == (row["score"] > 0.5) for a, row in zip(called, rows, strict=True))
    assert right == summary["heldout_answers"]["accuracy"]["count"]


def test_equal_seeds_give_equal_models(folder: Path) -> None:
    short = ("learning.epochs=0.5",)
    assert train(folder, *short).code == 0
    (folder / "out").rename(folder / "first")
    assert train(folder, *short).code == 0
    for name in ("model/model.safetensors", "heldout.jsonl"):
        assert (folder / "out" / name).read_bytes() == (folder / "first" / name).read_bytes()


def test_published_pairs_in_both_forms(folder: Path) -> None:
    turn = [{"role": "user", "content": "what is rain?"}]
    good, bad = "sure here you can", "sorry i cannot help"
    rows = [
        {
            "prompt": f"what is the {n} rain?",
            "chosen": good,
            "rejected": [{"role": "assistant", "content": bad}],
        }
        for n in ("a", "the", "sun", "water", "no", "yes", "how", "who", "it", "i") * 4
    ]
    for number, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']} {number}"
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data: dict[str, Any] = {"type": "pairs", "path": "pairs.jsonl", "query_column": "prompt"}
    shown = train(folder, "learning.epochs=1", data=data, compare=None)
    assert shown.code == 0, shown.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["heldout_answers"] is None
    whole = [
        {
            "chosen": [*turn, {"role": "assistant", "content": f"{good} {n}"}],
            "rejected": [*turn, {"role": "assistant", "content": bad}],
        }
        for n in range(10)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in whole))
    data = {"type": "pairs", "path": "pairs.jsonl", "query_column": None}
    (folder / "out").rename(folder / "first")
    shown = train(folder, data=data, compare=None)
    assert "pair(s) for the" in shown.err  # one query is on one side, so the others are empty


def test_a_rule_can_be_distilled_from_sampled_completions(folder: Path) -> None:
    save_tiny(folder / "base")
    queries = [f"what is {a} {b}" for a in ("rain", "sun", "land", "men") for b in "abcdef"]
    data = {
        "type": "sampled",
        "queries": {"rows": queries, "heldout": 4},
        "base": {"path": "base", "device": "cpu", "dtype": "float32"},
        "sampling": {"max_tokens": 12},
        "completions_per_query": 3,
        "rewards": [{"path": "builtin:length", "options": {"max": 2, "unit": "words"}}],
        "min_gap": 0.05,
    }
    shown = train(folder, "learning.epochs=1", data=data, compare=None)
    assert shown.code == 0, shown.err
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["pairs"]["train"] >= 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"type": "labels", "path": "missing.jsonl"}}, "missing.jsonl"),
        (
            {"data": {"type": "labels", "path": "judged.jsonl", "score_column": "mark"}},
            "judged.jsonl line 1: 'mark' is None; write a number",
        ),
        ({"data": {"type": "pairs", "path": "judged.jsonl"}}, "compare has no effect on data"),
        ({"model": {"path": "start", "device": "cpu"}}, "has no chat template"),
        ({"model": {"path": "start", "template": "pair"}}, "template: pair is for scoring only"),
        ({"model": {"path": "stat", "device": "cpu"}}, "path is 'stat'"),
        ({"test": {"heldout": 0.8, "calibration": 0.2}}, "leave less than a tenth"),
        ({"learning": {"epoch": 1}}, "did you mean 'epochs'"),
    ],
)
def test_wrong_recipes_get_a_sentence(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    shown = train(folder, **changes)
    assert shown.code == 2
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_a_folder_with_something_in_it_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")
    shown = train(folder)
    assert shown.code == 2
    assert "is not an empty folder" in shown.err
