"""Which checkpoint, and which member, a run keeps under `evaluation.keep: accepted`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_run
from rlprompt.runs.outcome import read_summary
from rlprompt.runs.population import Population
from rlprompt.runs.read_folder import load_run
from tests.fixtures.runs import QUERIES, assert_same_run, tiny_recipe, tiny_trainer

ROWS = [f"{query} {word}" for query in QUERIES for word in ("sun", "men", "rain")]


def scripted(*heldout: float | None) -> dict[str, Any]:
    """A run whose validation completions all get the value written for the step."""
    reward = {"path": "rewards.py:Scripted", "name": "s", "options": {"heldout": list(heldout)}}
    return {
        "data": {"rows": ROWS, "heldout": 16},
        "rewards": [reward],
        "training": {"steps": len(heldout) - 1, "save_every": 1},
        "evaluation": {"every": 1, "completions_per_query": 1, "keep": "accepted"},
    }


def test_the_highest_of_those_accepted_against_the_start_is_kept(tmp_path: Path) -> None:
    """On 16 queries that all agree, whatever the size of the difference."""
    run = tiny_trainer(tmp_path, tmp_path / "run", **scripted(0.1, 0.1, 0.3, 0.29))
    summary = run.run()
    assert summary["best_step"] == 2 and summary["learned"]
    tests = summary["selection"]["challenges"]
    assert [(each["step"], each["against"], each["accepted"], each["kept"]) for each in tests] == [
        (1, 0, False, False), (2, 0, True, True), (3, 0, True, False)
    ]  # fmt: skip
    assert summary["verdict"]["sentence"].startswith(
        "The prompt of step 2 was kept: the highest mean of 2 that were accepted against the one "
        "it began with, at 5% over the run."
    )


def test_a_checkpoint_replaces_the_one_that_it_is_accepted_against(tmp_path: Path) -> None:
    changes = scripted(0.1, 0.1, 0.3, 0.29, 0.31)
    changes["evaluation"]["evidence"] = {"against": "kept"}
    run = tiny_trainer(tmp_path, tmp_path / "run", **changes)
    summary = run.run()
    assert summary["best_step"] == 4 and summary["learned"]
    tests = summary["selection"]["challenges"]
    assert [(each["step"], each["against"], each["accepted"]) for each in tests] == [
        (1, 0, False), (2, 0, True), (3, 2, False), (4, 2, True)
    ]  # fmt: skip
    sentence = summary["verdict"]["sentence"]
    assert sentence.startswith(
        "The prompt of step 4 was kept: accepted against that of step 2, at 5% over the run."
    )
    rows = [r for r in read_jsonl(tmp_path / "run" / "evaluation.jsonl") if r["who"] == "learned"]
    assert [row.get("accepted") for row in rows] == [None, False, True, False, True]
    assert rows[4]["against_step"] == 2 and rows[4]["acceptance_p_value"] < 0.01
    assert sentence == read_artifact_info(tmp_path / "run" / "artifact").metrics["verdict"]


def test_where_nothing_is_shown_the_start_is_kept_and_said(tmp_path: Path) -> None:
    """A mean of 0.9 on one query of 16 is the highest, and no evidence."""
    changes = scripted(0.1, 0.1, 0.1)
    changes["rewards"] = [{"path": "lucky.py:lucky", "name": "s"}]
    (tmp_path / "lucky.py").write_text(
        "def lucky(completions, trainer_state, **kwargs):\n"
        "    step = trainer_state.global_step\n"
        "    rest = [0.1] * (len(completions) - 1)\n"
        "    return [0.1 + 0.4 * (step == 1), *rest]\n",
        encoding="utf-8",
    )
    summary = tiny_trainer(tmp_path, tmp_path / "run", **changes).run()
    assert summary["best_step"] == 0 and summary["learned"] is False
    assert summary["verdict"]["sentence"].startswith(
        "No later prompt was shown to be better than the one it began with, so that was kept (at "
        "5% over the run; the highest mean was that of step 1, +0.025)."
    )
    assert summary["verdict"]["mood"] == "bad"


def test_a_run_that_goes_on_has_the_tests_of_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = scripted(0.1, 0.2, 0.15, 0.3)
    tiny_trainer(tmp_path, tmp_path / "whole", **changes).run()
    short = {**changes, "training": {"steps": 1, "save_every": 1}}
    tiny_trainer(tmp_path, tmp_path / "parts", **short).run()
    again = tiny_trainer(tmp_path, tmp_path / "parts", **changes)
    summary = again.run(resume=True)
    tests = summary["selection"]["challenges"]
    # One was announced: the others are tested at what was put aside.
    assert [each["accepted"] for each in tests] == [True, True, True]
    assert tests[1]["level"] == pytest.approx(0.05 * (0.9 + 0.1 / 2))
    before = read_summary(tmp_path / "whole")["selection"]
    assert before["acceptance"]["num_candidates"] == 3


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = scripted(0.1, 0.2, 0.15, 0.3, 0.3, 0.2, 0.4)
    whole = tiny_trainer(tmp_path, tmp_path / "whole", **changes)
    whole.run()
    cut = tiny_trainer(tmp_path, tmp_path / "cut", **changes)
    real = cut.parts.learner.step

    def fails(step: int, *args: Any, **kwargs: Any) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return real(step, *args, **kwargs)

    cut.parts.learner.step = fails  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    tiny_trainer(tmp_path, tmp_path / "cut", **changes).run(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    one, two = (read_summary(tmp_path / name) for name in ("whole", "cut"))
    assert one["selection"] == two["selection"] and one["verdict"] == two["verdict"]


def test_a_run_in_progress_shows_the_step_that_was_accepted(tmp_path: Path) -> None:
    run = tiny_trainer(tmp_path, tmp_path / "run", **scripted(0.1, 0.3, 0.2))
    run.run()
    (tmp_path / "run" / "summary.json").unlink()
    assert load_run(tmp_path / "run").best_step == 1


@pytest.mark.parametrize("against", ["start", "kept"])
def test_members_share_one_error_rate(tmp_path: Path, against: str) -> None:
    changes = scripted(*[0.1] * 3)
    changes["data"] = {"rows": ROWS, "heldout": 20}
    changes["rewards"] = [{"path": "rewards.py:letters", "name": "s"}]
    evidence = {"alpha": 0.4, "against": against}
    changes["evaluation"] = {"every": 5, "keep": "accepted", "evidence": evidence}
    members = [
        {"name": name, "changes": {"prompt": {"num_virtual_tokens": 4, "init_text": text}}}
        for name, text in (("a", "the sun"), ("b", "the sun and the rain"))
    ]
    changes |= {"population": members, "training": {"steps": 2}}
    recipe = tiny_recipe(tmp_path, **changes)
    evidence_of_b = recipe.members()["b"].evaluation.evidence
    assert evidence_of_b is not None
    own = 0.1 if against == "kept" else 0.2
    assert evidence_of_b.alpha == pytest.approx(own)
    built = build_run(recipe, tmp_path, tmp_path / "run")
    assert isinstance(built, Population)
    summary = built.run()
    sentence = summary["verdict"]["sentence"]
    assert f"{100 * own:.3g}% over the run" in sentence
    assert "at 40% over the population" in sentence
    if against == "start":
        assert f"Member {summary['best_member']} was chosen by its mean" in sentence
        assert "member_selection" not in summary
        return
    assert summary["best_member"] == "a"
    (test,) = summary["member_selection"]
    assert (test["member"], test["against"], test["accepted"]) == ("b", "a", False)
    assert "No later member was shown to be better than the first, a" in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"evaluation": {"evidence": {"alpha": 0.1}}}, "evidence has no effect with keep: highest"),
        (
            {"evaluation": {"keep": "accepted"}, "data": {"heldout": 0}},
            "evaluation.keep: accepted has no effect with data.heldout: 0",
        ),
        ({"evaluation": {"keep": "accepted", "evidence": {"alpha": 1.0}}}, "less than 1"),
    ],
)
def test_settings_without_effect_are_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        tiny_recipe(tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data": {"rows": ROWS, "heldout": 4}}, "4 validation queries can never show"),
        (
            {"rewards": [{"path": "rewards.py:nothing", "name": "s", "role": "metric"}],
             "evaluation": {"every": 1, "keep": "accepted", "select_by": "s"}},
            "no validation completion of the prompt that the run begins with could be scored",
        ),
        (
            {"evaluation": {"every": 1, "completions_per_query": 1, "keep": "accepted",
                            "evidence": {"spread": 0.05}}},
            "evaluation.evidence.spread does not hold: a difference is 0.2",
        ),
    ],
    ids=["few", "unscored", "spread"],
)  # fmt: skip
def test_what_no_test_can_be_made_of_is_an_error(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    plain = {**scripted(0.1, 0.3), **changes}
    if "rewards" in changes:
        plain["rewards"] = [{"path": "rewards.py:letters", "name": "l"}, *changes["rewards"]]
    with pytest.raises(InputError, match=sentence):
        tiny_trainer(tmp_path, tmp_path / "run", **plain).run()
