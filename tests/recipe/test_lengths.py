"""Rows that do not fit the base are told by file and line, before its weights are read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.errors import InputError
from rlprompt.recipe.build import build_shared, build_single_run
from rlprompt.recipe.schema import Recipe, load_recipe
from tests.cli.runs import REWARD, with_changes
from tests.fixtures.tiny import save_tiny

LONG = "the rain and the sun " * 200
"""More tokens than the 512 positions of the tiny model, though not many more."""


def recipe(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> Recipe:
    save_tiny(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = with_changes({"model.path": str(folder / "model"), **changes})
    tree["data"] = {"path": name, "heldout": 3, **changes.get("data", {})}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return load_recipe(folder / "recipe.yaml")


def rows(*long: int) -> list[dict[str, Any]]:
    return [{"query": f"{LONG} {i}" if i in long else f"what is rain {i}"} for i in range(8)]


def test_the_line_is_named_and_the_weights_are_not_read(tmp_path: Path) -> None:
    found = recipe(tmp_path, "q.jsonl", rows(4))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000] + b"\0" * 1000)  # loads, as something else
    with pytest.raises(InputError) as caught:
        build_single_run(found, tmp_path, tmp_path / "run")
    sentence = str(caught.value)
    assert sentence.startswith("q.jsonl line 5 is too long: ")
    assert "has 512; shorten it, lower sampling.max_tokens, or set data.too_long: skip" in sentence


def test_several_are_counted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\(so are 2 more rows\)"):
        build_shared(recipe(tmp_path, "q.jsonl", rows(1, 4, 6)), tmp_path)


def test_they_are_skipped_when_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = recipe(tmp_path, "q.jsonl", rows(1, 4), data={"too_long": "skip"})
    with caplog.at_level(logging.WARNING):
        shared = build_shared(found, tmp_path)
    kept = {query.index for query in (*shared.data.train, *shared.data.heldout)}
    assert kept == {0, 2, 3, 5, 6, 7}
    assert "left out 2 of 8 queries" in caplog.text
    whole = build_shared(recipe(tmp_path, "q.jsonl", rows()), tmp_path)
    assert shared.data.fingerprint != whole.data.fingerprint


def test_skipping_must_leave_something(tmp_path: Path) -> None:
    found = recipe(tmp_path, "q.jsonl", rows(*range(8)), data={"too_long": "skip"})
    with pytest.raises(InputError, match="every training query is longer"):
        build_shared(found, tmp_path)


def test_completion_and_prompt_count(tmp_path: Path) -> None:
    fits = recipe(tmp_path, "q.jsonl", rows())
    build_shared(fits, tmp_path)
    longer = fits.model_copy(
        update={"sampling": fits.sampling.model_copy(update={"max_tokens": 500})}
    )
    with pytest.raises(InputError, match="is too long"):
        build_shared(longer, tmp_path)
    under = fits.model_copy(
        update={"evaluation": fits.evaluation.model_copy(update={"handwritten": LONG})}
    )
    with pytest.raises(InputError, match="is too long"):
        build_shared(under, tmp_path)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [("supervised", ["completion"]), ("dpo", ["chosen", "rejected"])],
    ids=["supervised", "preferences"],
)
def test_given_answers_count_too(tmp_path: Path, kind: str, columns: list[str]) -> None:
    given = [{"query": f"what is rain {i}", **dict.fromkeys(columns, "water")} for i in range(8)]
    given[3][columns[-1]] = LONG
    changes = {"algorithm": {"type": kind}, "rewards": [], "data": {"heldout": 0}}
    found = recipe(tmp_path, "q.jsonl", given, **changes)
    with pytest.raises(InputError, match=r"q\.jsonl line 4 is too long"):
        build_shared(found, tmp_path)


def test_an_answer_that_is_none_is_named_by_its_line(tmp_path: Path) -> None:
    given = [{"query": f"what is rain {i}", "completion": "water" if i else ""} for i in range(8)]
    changes = {"algorithm": {"type": "supervised"}, "rewards": [], "data": {"heldout": 0}}
    with pytest.raises(InputError, match=r"q\.jsonl line 1, column 'completion', holds no answer"):
        build_shared(recipe(tmp_path, "q.jsonl", given, **changes), tmp_path)
