"""Sentences: the true one is ranked first, and has the numbers of a true one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlprompt.errors import InputError
from rlprompt.interpret.derived import random_like
from rlprompt.interpret.inspection import Plan, inspect
from rlprompt.interpret.page import write_inspection_page
from rlprompt.interpret.sentences import (
    Candidate,
    behaviour,
    distinct,
    extended,
    faithfulness,
    nearer,
    ranked,
)
from rlprompt.interpret.similar import (
    added,
    between,
    compared,
    cosine,
    moved_at_random,
    sums,
)
from rlprompt.interpret.subject import divided
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.rewards.runner import RewardRunner
from rlprompt.types import Query
from tests.fixtures.prompts import KINDS, TEXT, make
from tests.interpret.subjects import ended, forever, queries, subject, tiny_policy

OTHERS = ("she is in here", "answer in one line", "is there land", "he is out there", "the men")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def rewards() -> RewardRunner:
    settings = RewardSettings(path="builtin:length", options={"min": 1, "max": 3, "unit": "words"})
    return build_rewards([settings], Path())


def candidates(*texts: str) -> list[Candidate]:
    return [Candidate(text, "given") for text in texts]


def test_the_text_that_was_planted_is_first(policy: Policy) -> None:
    found = subject(policy, make("soft", policy, noise=0.05))
    rows = ranked(found.yardstick("selection"), candidates(*OTHERS, TEXT), forever())
    assert rows[0].candidate.text == TEXT and rows[0].num_queries == 3
    assert rows[0].kl < 0.2 * rows[1].kl
    assert extended(found.yardstick("selection"), rows, forever()) is None


def test_two_halves_are_joined_to_the_whole(policy: Policy) -> None:
    found = subject(policy, TextPrompt("the rain and the sun is there"))
    rows = ranked(
        found.yardstick("selection"), candidates("the rain and", "the sun is there"), forever()
    )
    joined = extended(found.yardstick("selection"), rows, forever())
    if rows[0].candidate.text == "the rain and":
        assert joined is not None and joined.kl < 1e-5
        assert joined.candidate.text == "the rain and the sun is there"
    else:
        assert joined is None or joined.kl < rows[0].kl


def test_time_that_ends_leaves_what_was_not_measured_out(policy: Policy) -> None:
    found = subject(policy, make("soft", policy))
    rows = ranked(found.yardstick("selection"), candidates(*OTHERS), ended())
    assert len(rows) == 2


def test_the_true_text_recovers_all_and_a_random_prompt_does_not(
    policy: Policy, rewards: RewardRunner
) -> None:
    found = subject(policy, make("soft", policy, noise=0.01), rewards)
    true = faithfulness(found, TextPrompt(TEXT))
    assert true["kl_share"]["value"] > 0.99 and true["kl_share"]["low"] > 0.95
    none = faithfulness(found, NonePrompt())
    assert none["kl_share"]["value"] == pytest.approx(0.0, abs=1e-6)
    control = random_like(policy, found.prompt, 0)
    assert control is not None
    assert faithfulness(found, control)["kl_share"]["value"] < 0.9
    said = nearer(found, TextPrompt(TEXT), control, 2)
    assert said["difference"] > 0
    told = behaviour(found)
    assert told["base_kl"]["value"] > 0 and "outcome" in told["gain"]


def test_no_share_is_said_of_a_prompt_that_does_nothing(policy: Policy) -> None:
    found = subject(policy, NonePrompt())
    row = faithfulness(found, TextPrompt(TEXT))
    assert row["kl_share"] is None and row["gain_share"] is None and row["reward"] is None


def test_queries_are_divided_the_same_way_whatever_their_order() -> None:
    one, other = divided(queries(), 9), divided([*queries()[::-1], queries()[0]], 9)
    assert [q.text for q in one.test] == [q.text for q in other.test]
    assert len(one.selection) == 3 and len(one.test) == 6
    assert not {q.text for q in one.selection} & {q.text for q in one.test}
    with pytest.raises(InputError, match="5 different queries are too few"):
        divided([*queries()[:5], *queries()[:5]], 9)
    assert len(divided(queries(), 7).test) == 5


def test_equal_candidates_count_once() -> None:
    found = distinct([*candidates("Be brief.", " be BRIEF. ", "", "  "), Candidate("x", "y")])
    assert [each.text for each in found] == ["Be brief.", "x"]


def test_prompts_are_compared_and_what_lies_between_them(
    policy: Policy, rewards: RewardRunner
) -> None:
    one, other = make("soft", policy, noise=0.3), make("soft", policy, noise=0.3, seed=5)
    found = subject(policy, one, rewards, {"other": other, "text": TextPrompt(TEXT)})
    rows = {row["name"]: row for row in compared(found, forever())}
    assert [at["weight"] for at in rows["other"]["path"]] == [0.25, 0.5, 0.75]
    assert rows["other"]["path"][0]["kl"] < rows["other"]["kl"]
    assert rows["text"]["path"] == [] and rows["text"]["cosine"] is None
    assert cosine(one, one) == pytest.approx(1.0)
    middle = between(one, other, 0.5)
    assert middle is not None
    expected = (one.parameters()[0] + other.parameters()[0]) / 2
    assert np.allclose(middle.parameters()[0].detach(), expected.detach(), atol=1e-6)
    assert between(make("prefix", policy), make("prefix", policy), 0.5) is not None
    assert between(one, make("prefix", policy), 0.5) is None


def test_a_difference_of_two_prompts_is_added_to_a_third(
    policy: Policy, rewards: RewardRunner
) -> None:
    p, q, r = (make("soft", policy, noise=0.3, seed=seed) for seed in (0, 5, 6))
    found = subject(policy, p, rewards, {"q": q, "r": r, "text": TextPrompt(TEXT)})
    rows = sums(found, forever())
    assert [(row["plus"], row["minus"]) for row in rows] == [("q", "r"), ("r", "q")]
    for row in rows:
        assert row["kl"] > 0 and row["control_kl"] > 0
        for name in ("change", "control_change", "difference"):
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]
    one, two = rows[0]["difference"]["value"], rows[1]["difference"]["value"]
    assert one == pytest.approx(-two)
    assert sums(found, ended()) == [] == sums(subject(policy, p, rewards, {"q": q}), forever())

    same = added(p, q, q)
    assert same is not None
    assert np.allclose(same.parameters()[0].detach(), p.parameters()[0].detach())
    back = added(p, q, p)
    assert back is not None
    assert np.allclose(back.parameters()[0].detach(), q.parameters()[0].detach(), atol=1e-6)
    step, control = added(p, q, r), moved_at_random(p, q, r, 0)
    assert step is not None and control is not None
    lengths = [
        (each.parameters()[0] - p.parameters()[0]).detach().norm(dim=1) for each in (step, control)
    ]
    assert np.allclose(lengths[0], lengths[1], rtol=1e-4)
    assert added(make("prefix", policy), make("prefix", policy), make("prefix", policy)) is not None
    assert added(p, make("prefix", policy), q) is None
    unrewarded = sums(subject(policy, p, None, {"q": q, "r": r}), forever())
    assert unrewarded[0]["change"] is None


def test_the_page_shows_rewards_sums_and_lines(
    policy: Policy, rewards: RewardRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlprompt.interpret.readouts.FEWEST", 6)
    p, q, r = (make("soft", policy, noise=0.5, seed=seed) for seed in (0, 5, 6))
    found = subject(policy, p, rewards, {"q": q, "<b>r</b>": r})
    plan = Plan(minutes=0.2, readings=1, sentences=OTHERS[:1], triggers=False)
    report = inspect(found, plan)
    assert report["reward_importance"] and report["sums"] and report["readouts"]
    whole = {"name": "x", "kind": "soft", "positions": 3, "base": "tiny", "num_selection": 3}
    whole |= {"num_test": 6, "notes": [], **report}
    page = write_inspection_page(whole, tmp_path / "page.html").read_text()
    for title in ("Which positions the reward rests on", "What a line reads", "Arithmetic"):
        assert title in page
    assert "<b>r</b>" not in page
    told = " ".join(report["summary"])
    assert "in reward between the prompt and an empty slot" in told
    assert "Adding q minus" in told and "a random step of the same length" in told
    assert "A line tells the states" in told or "No line was found" in told
    none = inspect(found, Plan(minutes=0.01, readings=1, triggers=False, reward_sets=0))
    assert none["reward_importance"] is None


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_is_inspected_and_has_a_page(policy: Policy, kind: str, tmp_path: Path) -> None:
    prompt = make(kind, policy, noise=0.3)
    found = subject(policy, prompt)
    said: list[str] = []
    plan = Plan(minutes=0.002, readings=1, sentences=OTHERS[:2], triggers=False)
    report = inspect(found, plan, said.append)
    assert said[0].startswith("drawing") and report["sentences"]
    assert (report["nearest"] is None) == (kind != "soft")
    assert len(report["summary"]) >= 3
    whole = {
        **report,
        "name": "<i>kind</i>",
        "kind": kind,
        "positions": 3,
        "base": "tiny",
        "num_selection": 3,
        "num_test": 6,
        "notes": ["<b>note</b>"],
    }
    page = write_inspection_page(whole, tmp_path / "page.html").read_text()
    assert "<b>note</b>" not in page and "<i>kind</i>" not in page
    assert "&lt;b&gt;note&lt;/b&gt;" in page and page.count("<svg") >= 2


def test_positions_that_matter_are_left_out_of_whole_answers(
    policy: Policy, rewards: RewardRunner
) -> None:
    found = subject(policy, make("soft", policy, noise=0.5), rewards)
    plan = Plan(minutes=0.002, readings=1, sentences=OTHERS[:1], triggers=False)
    rows = inspect(found, plan)["importance"]["spans"]
    told = [row for row in rows if "reward_change" in row]
    assert told and told[0]["alone"] == max(row["alone"] for row in rows)
    ends = told[0]["reward_change"]
    assert ends["low"] <= ends["value"] <= ends["high"]


def test_a_query_whose_text_is_twice_there_counts_once() -> None:
    twice = [Query(({"role": "user", "content": text},)) for text in "aabbccddeeff"]
    assert len(divided(twice, 36).test) == 4
