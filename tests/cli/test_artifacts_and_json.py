"""Commands that take an artifact take a run too, `eval` needs no recipe, and what prints JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import rlprompt, write_recipe


def heldout(shown: Any) -> Any:
    assert shown.code == 0, shown.err
    return json.loads(shown.out)["heldout"]


def test_eval_takes_the_recipe_of_the_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = finished.parent / "recipe.yaml"
    expected = heldout(rlprompt("eval", finished / "artifact", "--recipe", recipe))
    monkeypatch.chdir(tmp_path)
    assert heldout(rlprompt("eval", finished)) == expected
    assert heldout(rlprompt("eval", finished / "artifact" / "prompt.json")) == expected
    overrides = ("sampling.max_tokens=2", "evaluation.handwritten=null")
    changed = heldout(rlprompt("eval", finished, *overrides))
    assert changed["prompt"]["mean_length"] <= 2 and "handwritten" not in changed
    assert changed == heldout(rlprompt("eval", finished, overrides[1], "--set", overrides[0]))
    wrong = rlprompt("eval", finished, "sampling.max_token=2")
    assert wrong.code == 2 and "unknown key 'sampling.max_token'" in wrong.err


def test_an_override_comes_first_where_there_is_no_artifact(
    model_dir: Path, tmp_path: Path
) -> None:
    prompt = {"type": "text", "text": "Answer in one line."}
    recipe = write_recipe(tmp_path, model_dir, prompt=prompt)
    found = heldout(rlprompt("eval", "sampling.max_tokens=3", "--recipe", recipe))
    assert found["prompt"]["mean_length"] <= 3
    shown = rlprompt("eval", "sampling.max_tokens=3")
    assert shown.code == 2 and "there is nothing to evaluate" in shown.err


def test_an_artifact_alone_runs_no_code_that_it_names(
    finished: Path, model_dir: Path, tmp_path: Path
) -> None:
    alone = shutil.copytree(finished / "artifact", tmp_path / "got")
    shown = rlprompt("eval", alone)
    assert shown.code == 2
    assert "names rewards.0.path" in shown.err and "name the recipe with --recipe" in shown.err
    named = f"rewards.0.path={finished.parent / 'reward.py'}"
    assert heldout(rlprompt("eval", alone, named)) == heldout(rlprompt("eval", finished))
    content = json.loads((alone / "prompt.json").read_text())
    content["recipe"]["rewards"] = [{"path": "builtin:length", "options": {"max": 5}}]
    (alone / "prompt.json").write_text(json.dumps(content))
    assert set(heldout(rlprompt("eval", alone))["prompt"]["rewards"]) == {"length"}
    for path in ("builtin:http", "subprocess:run", "builtin:openai_judge", "memory:f", ""):
        content["recipe"]["rewards"] = [{"path": path, "options": {"url": "http://127.0.0.1:1"}}]
        (alone / "prompt.json").write_text(json.dumps(content))
        shown = rlprompt("eval", alone)
        assert shown.code == 2 and "an artifact alone does not run" in shown.err, path
    content["recipe"] |= {"rewards": [], "algorithm": {"type": "evil.py:Evil"}}
    (alone / "prompt.json").write_text(json.dumps(content))
    assert "names algorithm.type: evil.py:Evil" in rlprompt("eval", alone).err
    content["recipe"] = {}
    (alone / "prompt.json").write_text(json.dumps(content))
    assert "carries no recipe" in rlprompt("eval", alone).err


def test_chat_takes_a_run_and_answers_in_json(finished: Path) -> None:
    ask = ("--query", "what is rain", "-q", "what is sun", "--max-tokens", 4)
    plain = rlprompt("chat", finished / "artifact", *ask)
    assert plain.out == rlprompt("chat", finished, *ask).out
    shown = rlprompt("chat", finished, *ask, "--json", "--compare")
    assert (shown.code, shown.err) == (0, "")
    rows = [json.loads(line) for line in shown.out.splitlines()]
    assert [row["query"] for row in rows] == ["what is rain", "what is sun"]
    assert all(list(row["answers"]) == ["base", "hand-written", "learned"] for row in rows)
    assert all(set(a) == {"text", "terminated"} for row in rows for a in row["answers"].values())
    piped = rlprompt(
        "chat", finished, "--json", "--max-tokens", 4, stdin="what is rain\n/reset\nwhat is sun\n"
    )
    told = [json.loads(line)["answers"]["learned"] for line in piped.out.splitlines()]
    assert told == [row["answers"]["learned"] for row in rows]


def test_plan_and_model_list_in_json(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt("plan", recipe, "--model-size", "8b", "--gpus", 2, "--json")
    assert (shown.code, shown.err) == (0, "")
    made = json.loads(shown.out)
    assert (made["recipe"], made["gpus"], made["model_size"]) == ("tiny", 2, "8b")
    assert made["rollout_bytes"] > 0 and isinstance(made["fits"], bool)
    assert set(made["memory_bytes"]) and made["step_seconds"] > 0
    shown = rlprompt("model", "list", "--json")
    assert (shown.code, shown.err) == (0, "")
    rows = json.loads(shown.out)
    assert {"name", "folder", "fetched"} <= rows[0].keys() and rows[0]["name"] == "smollm2-135m"
