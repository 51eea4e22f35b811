"""Weights of queries: CVaR against brute force, group DRO on problems with a known answer; then
what they make of the rows of a batch, and of a whole run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlprompt.algorithms.base import BatchView
from rlprompt.algorithms.robust import (
    CVaRSettings,
    QueryWeights,
    WorstGroup,
    WorstGroupSettings,
    cvar_weights,
)
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.types import Query
from tests.fixtures.runs import tiny_trainer


@pytest.mark.parametrize("share", [0.05, 0.25, 0.4, 0.5, 0.99, 1.0])
def test_cvar_is_the_mean_over_the_worst_share(share: float) -> None:
    losses = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = cvar_weights(losses, share)
    assert float(weights.mean()) == pytest.approx(1.0)
    assert bool((weights >= 0).all()) and float(weights.max()) <= 1 / share + 1e-9
    # Rockafellar and Uryasev: CVaR = min over c of c + mean(relu(loss - c)) / share
    candidates = [float(c + (losses - c).relu().mean() / share) for c in losses]
    assert float((weights * losses).mean()) == pytest.approx(min(candidates))


def test_cvar_of_everything_is_the_mean() -> None:
    assert cvar_weights(torch.tensor([3.0, 1.0, 2.0]), 1.0).tolist() == [1.0, 1.0, 1.0]


def test_unknown_losses_get_no_weight_and_do_not_count() -> None:
    losses = torch.tensor([math.nan, 1.0, 2.0])
    assert cvar_weights(losses, 0.5).tolist() == [0.0, 0.0, 2.0]
    assert cvar_weights(torch.tensor([math.nan]), 0.5).tolist() == [0.0]


def test_group_dro_starts_from_the_plain_mean() -> None:
    groups = WorstGroup({"a": 0.75, "b": 0.25}, step_size=0.1)
    assert groups.weights(["a", "b", "a"]).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert groups.distribution == pytest.approx({"a": 0.75, "b": 0.25})


def test_group_dro_moves_to_the_worst_group_only() -> None:
    groups = WorstGroup({"a": 0.5, "b": 0.3, "c": 0.2}, step_size=0.5)
    drawn = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
    losses = torch.tensor([1.0] * 5 + [1.1] * 3 + [2.0] * 2)
    for _ in range(100):
        groups.update(losses, drawn)
    assert groups.distribution["c"] > 0.999
    assert groups.weights(["c", "a"]).tolist() == pytest.approx([5.0, 0.0], abs=1e-3)


def test_equal_losses_and_a_shift_of_all_losses_change_nothing() -> None:
    drawn = ["a", "b", "b", "b"]
    losses = torch.tensor([1.0, 2.0, 0.5, 0.1])
    first, second = (WorstGroup({"a": 0.25, "b": 0.75}, step_size=0.5) for _ in range(2))
    first.update(losses, drawn)
    second.update(losses + 100.0, drawn)
    assert first.distribution == pytest.approx(second.distribution)
    before = first.distribution
    first.update(torch.full((4,), 7.0), drawn)
    assert first.distribution == pytest.approx(before)


def test_group_dro_equalises_losses_that_fall_when_they_are_learned_from() -> None:
    """Two groups share one resource; the worst loss is least where 0.1 + 0.9 e = 1.5 - e."""
    groups = WorstGroup({"easy": 0.8, "hard": 0.2}, step_size=0.05)
    effort, mean_effort = 0.5, 0.0  # the share of the effort that "hard" gets
    for step in range(4000):
        losses = torch.tensor([0.1 + 0.9 * effort, 1.5 - effort])
        groups.update(torch.cat([losses[:1]] * 4 + [losses[1:]]), ["easy"] * 4 + ["hard"])
        gain = groups.distribution["hard"] * 1.0 - groups.distribution["easy"] * 0.9
        effort = min(1.0, max(0.0, effort + 0.02 * gain))
        mean_effort += effort / 2000 if step >= 2000 else 0.0
    assert mean_effort == pytest.approx(1.4 / 1.9, abs=0.02)


def test_group_weights_are_unbiased_over_draws_of_queries() -> None:
    groups = WorstGroup({"a": 0.7, "b": 0.3}, step_size=1.0)
    groups.update(torch.tensor([0.0, 1.0]), ["a", "b"])
    weights = groups.weights(["a", "b"])
    assert 0.7 * float(weights[0]) + 0.3 * float(weights[1]) == pytest.approx(1.0)


def test_its_state_restores_it_and_a_group_from_nowhere_is_refused() -> None:
    first = WorstGroup({"a": 0.5, "b": 0.5}, step_size=1.0)
    first.update(torch.tensor([0.0, 1.0]), ["a", "b"])
    second = WorstGroup({"a": 0.5, "b": 0.5}, step_size=1.0)
    second.load_state_dict(first.state_dict())
    assert second.distribution == first.distribution
    with pytest.raises(KeyError, match="c"):
        first.weights(["c"])
    with pytest.raises(ValueError, match="2 groups, there are 3"):
        WorstGroup({"a": 0.5, "b": 0.3, "c": 0.2}, step_size=1.0).load_state_dict(
            first.state_dict()
        )


GROUPS = [
    Query(({"role": "user", "content": f"{i}"},), {"kind": k}, i) for i, k in enumerate("aab")
]


def view(rewards: list[float]) -> BatchView:
    lengths = torch.full((len(rewards),), 2)
    logprobs = -torch.tensor(rewards)[:, None].expand(-1, 2)
    return BatchView(torch.tensor(rewards), lengths, lengths > 0, 2, old_logprobs=logprobs)


def test_the_worst_queries_count_and_the_others_do_not() -> None:
    weights = QueryWeights(CVaRSettings(share=1 / 3), GROUPS, uses_rewards=True)
    assert not weights.needs_logprobs
    rows = weights.row_weights(view([0.9, 0.7, 0.1, 0.2, 0.5, 0.5]), GROUPS)
    assert rows.tolist() == pytest.approx([0, 0, 3, 3, 0, 0], abs=1e-5)


def test_without_rewards_the_loss_is_that_of_the_answers() -> None:
    weights = QueryWeights(CVaRSettings(share=1 / 3), GROUPS, uses_rewards=False)
    assert weights.needs_logprobs
    rows = weights.row_weights(view([0.9, 0.7, 0.1, 0.2, 0.5, 0.5]), GROUPS)
    assert rows.tolist() == pytest.approx([3, 3, 0, 0, 0, 0], abs=1e-5)


def test_weights_move_to_the_worst_group_and_are_restored() -> None:
    settings = WorstGroupSettings(column="kind", step_size=0.5)
    weights = QueryWeights(settings, GROUPS, uses_rewards=True)
    for _ in range(5):
        rows = weights.row_weights(view([0.9, 0.9, 0.9, 0.9, 0.1, 0.1]), GROUPS)
    assert rows[4] > 1 > rows[0]
    assert weights.metrics()["robust/weight/b"] > 0.5
    again = QueryWeights(settings, GROUPS, uses_rewards=True)
    again.load_state_dict(weights.state_dict())
    assert again.metrics() == weights.metrics()


@pytest.mark.parametrize(
    ("column", "sentence"),
    [("none", "row 0 of the dataset lacks"), ("same", "has one value in all training")],
)
def test_a_group_column_must_tell_groups_apart(column: str, sentence: str) -> None:
    rows = [Query(({"role": "user", "content": "x"},), {"same": 1}, i) for i in range(3)]
    with pytest.raises(InputError, match=f"robust.column is '{column}'.*{sentence}"):
        QueryWeights(WorstGroupSettings(column=column), rows, uses_rewards=True)


def test_a_robust_run_logs_what_each_group_counts_for(tmp_path: Path) -> None:
    rows = [{"query": f"the sun {i}", "kind": "ab"[i % 2]} for i in range(8)]
    changes = {
        "data": {"rows": rows, "heldout": 2},
        "robust": {"type": "worst_group", "column": "kind"},
        "augment": [{"situation": {"type": "frame", "frames": "application"}, "share": 1.0}],
        "training": {"queries_per_step": 2},
    }
    output = tmp_path / "out"
    tiny_trainer(tmp_path, output, **changes).run()
    logged = read_jsonl(output / "metrics.jsonl")
    assert all({"robust/weight/a", "robust/weight/b"} <= row.keys() for row in logged)
    drawn = read_jsonl(output / "completions.jsonl")
    asked = {row["split"]: row["query"] for row in drawn}
    assert "\n\nthe sun" in asked["train"] and "\n\n" not in asked["heldout"]
