"""`rlprompt forecast`: what it prints, for a reward that differs and for one that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe


@pytest.fixture(scope="module")
def recipe(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("forecast"), model_dir)


def test_it_says_what_the_reward_tells(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text('["Be brief.", "Be nice."]')
    options = ("--queries", 4, "--completions", 3, "--texts", tmp_path / "texts.json")
    shown = rlprompt("forecast", recipe, *options, "--json")
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    # The start is what is left of "Be nice." in three tokens, so the whole text is another one.
    assert list(report["means"]) == ["start", "base", "handwritten", "text 2", "text 3"]
    assert sum(report["shares"].values()) == pytest.approx(1.0)
    assert report["noise"] == 0.0 and report["num_queries"] == 4
    spreads = [row["spread"] for row in report["signal"]]
    assert len(spreads) == 4 and spreads == sorted(spreads, reverse=True)
    again = rlprompt("forecast", recipe, *options, "--difference", 0.1)
    assert again.code == 0, again.err
    assert "mean reward" in again.out and "a difference of 0.1 needs" in again.out


def test_a_reward_that_never_differs_is_told(recipe: Path) -> None:
    (recipe.parent / "flat.py").write_text(
        "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    shown = rlprompt("forecast", recipe, "rewards.0.path=flat.py:reward", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["outlook"] == "unclear"
    assert json.loads(shown.out)["queries_needed"] is None
    assert "nothing to learn from" in json.loads(shown.out)["sentence"]


def test_what_no_forecast_can_be_made_of(recipe: Path, tmp_path: Path) -> None:
    (recipe.parent / "none.py").write_text(
        "def reward(completions, **kwargs):\n    return [None] * len(completions)\n"
    )
    unscored = rlprompt("forecast", recipe, "rewards.0.path=none.py:reward")
    assert unscored.code == 2 and "0 of 4 queries were scored in full" in unscored.err
    (tmp_path / "texts.json").write_text('{"a": 1}')
    wrong = rlprompt("forecast", recipe, "--texts", tmp_path / "texts.json")
    assert wrong.code == 2 and "is not a list of texts" in wrong.err
    missing = rlprompt("forecast", recipe, "--texts", tmp_path / "no.json")
    assert missing.code == 2 and "cannot be read as JSON" in missing.err
    nothing = rlprompt("forecast", recipe, "--difference", 0)
    assert nothing.code == 2 and "give one above 0" in nothing.err
