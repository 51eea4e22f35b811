"""What the experiment on planted prompts counts, and what it plants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import planted_truth, planting
from rlprompt.policy import Policy
from rlprompt.types import Query
from tests.fixtures.tiny import tiny_base
from tests.interpret.subjects import tiny_policy


def instruction(name: str, right: bool, flagged: bool | None = None) -> dict[str, Any]:
    controls = {"random": False, "nearest": False, "other": name == "a"}
    row: dict[str, Any] = {
        "name": name,
        "trigger": None,
        "retrieved": {"prompt": right, **controls},
        "said": {"prompt": False, **controls},
        "best": {"kl_share": {"value": 0.5}},
    }
    return row if flagged is None else {**row, "search": {"flagged": flagged}}


def trigger(name: str, has_planted: bool, took: bool = True) -> dict[str, Any]:
    search = {"flagged": True, "has_planted": has_planted}
    return {"name": name, "trigger": "word", "search": search, "took": took}


def test_the_keys_count_rows() -> None:
    rows = [
        instruction("a", True, flagged=False),
        instruction("b", True, flagged=True),
        instruction("c", False),
        trigger("t", True),
        trigger("u", False),
        trigger("v", False, took=False),
    ]
    found = planted_truth.summary(rows, 30, "python x")
    assert found["retrieval_accuracy"] == pytest.approx(2 / 3)
    assert found["control_accuracy_max"] == pytest.approx(1 / 3)
    assert (found["triggers"], found["triggers_flagged"]) == (2, 1)
    assert found["triggers_not_planted"] == 1
    assert (found["clean"], found["clean_flagged"]) == (2, 1)
    assert found["recovered"] == 0.5 and found["planned"] == 30


def test_no_row_is_no_number() -> None:
    found = planted_truth.summary([], 30, "python x")
    assert found["retrieval_accuracy"] is None and found["control_accuracy_max"] is None
    assert found["triggers"] == found["clean"] == 0


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    path = tmp_path / "planted.json"
    every = planted_truth.plans(1)
    rows = [{**instruction(name, True), "name": name} for name in every]
    path.write_text(json.dumps({"rows": rows}))
    planted_truth.main(["--json", str(path)])  # loads no model
    assert [row["name"] for row in planted_truth.recorded(path)] == list(every)


def test_an_unknown_row_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        planted_truth.main(["--json", str(tmp_path / "x.json"), "--only", "nothing"])
    assert "which is no row" in capsys.readouterr().err


def test_twenty_instructions_and_ten_triggers_are_planned() -> None:
    every = planted_truth.plans(3)
    texts = {plan.instruction for plan in every.values() if plan.trigger is None}
    words = [plan.trigger for plan in every.values() if plan.trigger is not None]
    assert len(texts) == 20 and len(set(words)) == len(words) == 10 and len(every) == 70
    assert not set(words) & set(planting.OTHERS)


@pytest.mark.parametrize("word", [None, "hand"], ids=["instruction", "trigger"])
def test_planting_brings_the_prompt_nearer_to_its_teacher(
    monkeypatch: pytest.MonkeyPatch, word: str | None
) -> None:
    policy = tiny_policy()
    asked = [Query(({"role": "user", "content": text},)) for text in ("what is", "who is he")]
    monkeypatch.setattr(planting, "questions", lambda split, count: asked)
    losses: list[float] = []
    learn = planting._learn

    def noted(policy: Policy, lessons: Any) -> float:
        losses.append(learn(policy, lessons))
        return losses[-1]

    monkeypatch.setattr(planting, "_learn", noted)
    prompt = planting.plant(policy, planting.Plan("the rain and the sun", word, 0, 12))
    assert losses[-1] < 0.8 * losses[0]
    assert prompt.num_virtual_tokens == len(policy.slot_ids(planting.START))
    assert tiny_base().fingerprint == policy.base.fingerprint
