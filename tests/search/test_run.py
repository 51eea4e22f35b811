"""A search is a run like any other: it ends, resumes, is guarded, and leaves its best prompt."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.model.base import verify_unchanged
from rlprompt.planning.plan import plan
from rlprompt.planning.tables import DEVICES, SHAPES
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.build import build_run
from rlprompt.reports.report import write_report
from rlprompt.runs.checkpoint import checkpoint_steps, load_checkpoint
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.search.base import Trial
from tests.fixtures.runs import comparable_rows, tiny_trainer
from tests.fixtures.searches import (
    TEXTS,
    heldout,
    search_recipe,
    search_run,
    search_step,
    stops,
    wandering_run,
)


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "report" not in request.node.name:
        monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def trained_rows(output: Path) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(output / "completions.jsonl") if row["split"] == "train"]


def text_of(output: Path) -> str:
    return read_artifact_info(output / "artifact").init_text


def test_a_race_ends_when_one_text_is_left(tmp_path: Path) -> None:
    """Which texts each step tried, and which one won, told anew from the logged completions."""
    output = tmp_path / "run"
    run = search_run(tmp_path, output, training={"steps": 30}, evaluation={"every": 30})
    summary = run.run()
    rows = trained_rows(output)
    rewards: dict[int, list[float]] = {number: [] for number in range(5)}
    left, step = list(range(5)), 0
    while len(left) > 1:
        drawn = 0
        while drawn < 2 * 5 / len(left):
            step += 1
            now = [row for row in rows if row["step"] == step]
            assert [row["candidate"] for row in now] == left
            for row in now:
                rewards[row["candidate"]].append(row["reward"])
            drawn += 1
        order = sorted(left, key=lambda i: -sum(rewards[i]) / len(rewards[i]))
        left = sorted(order[: len(left) // 2])
    assert summary["steps"] == step < 30 and summary["stopped_because"] == "finished"
    assert checkpoint_steps(output / "checkpoints")[-1] == step
    texts = ["Be nice.", *TEXTS]
    assert run.parts.learner.prompt.init_text == texts[left[0]]
    assert [row["text"] for row in summary["candidates"]] == texts
    for row in summary["candidates"]:
        assert row["reward"] == pytest.approx(sum(rewards[row["id"]]) / len(rewards[row["id"]]))
    # The last step is evaluated although nobody knew before that it would be the last.
    evaluated = [(row["step"], row["who"]) for row in read_jsonl(output / "evaluation.jsonl")]
    assert evaluated == [(0, "base"), (0, "learned"), (step, "learned")]
    assert verify_unchanged(run.parts.policy.base) == summary["base_fingerprint_before"]
    metrics = read_jsonl(output / "metrics.jsonl")
    assert [row["search/calls"] for row in metrics][-1] == len(rows)
    times = [sum(v for name, v in row.items() if name.startswith("time/")) for row in metrics]
    assert times == pytest.approx([row["step_time"] for row in metrics])


def test_by_evidence_a_search_ends_when_it_has_met_all_queries(tmp_path: Path) -> None:
    """A few queries show nothing at 5%: the text it began with stays, and no more is drawn."""
    output = tmp_path / "run"
    changes: dict[str, Any] = {"search": {"completions": None}, "training": {"steps": 60}}
    summary = search_run(tmp_path, output, **changes).run()
    rows = trained_rows(output)
    met = {(row["query"], row["candidate"]) for row in rows}
    # All but those of the last step, which brought no new query and so ended it.
    assert len(rows) == len(met) + len(TEXTS) + 1
    assert summary["steps"] < 60 and summary["stopped_because"] == "finished"
    assert text_of(output) == "Be nice."


def test_a_finished_search_is_resumed_without_change(tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes = {"training": {"steps": 30}}
    first = search_run(tmp_path, output, **changes).run()
    before = {kind: comparable_rows(output, kind) for kind in ("metrics", "evaluation")}
    text = text_of(output)
    again = search_run(tmp_path, output, **changes).run(resume=True)
    assert (again["steps"], again["stopped_because"]) == (first["steps"], "finished")
    assert again["candidates"] == first["candidates"]
    assert before == {kind: comparable_rows(output, kind) for kind in before}
    assert text_of(output) == text


def assert_same_search(one: Path, two: Path) -> None:
    """Two finished searches are equal bit for bit but for what clocks wrote."""
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(one, kind) == comparable_rows(two, kind), kind
    first, second = (load_checkpoint(output / "checkpoints") for output in (one, two))
    assert set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    for checkpoint in (first, second):
        for name in ("seconds", "rollout_seconds", "step_seconds", "budget_seconds"):
            checkpoint.state["progress"].pop(name)
    assert (first.step, first.state) == (second.step, second.state)
    summaries = [json.loads((output / "summary.json").read_text()) for output in (one, two)]
    for key in ("heldout", "candidates", "best_step", "stopped_because"):
        assert summaries[0][key] == summaries[1][key], key
    for name in ("prompt.safetensors", "prompt.json"):
        bytes_ = [(output / "artifact" / name).read_text("latin-1") for output in (one, two)]
        created = [
            json.loads(text).pop("created") if name.endswith("json") else "" for text in bytes_
        ]
        assert bytes_[0].replace(created[0], "") == bytes_[1].replace(created[1], "")


SIX: dict[str, Any] = {"training": {"steps": 6, "save_every": 2}}


@pytest.mark.parametrize("kind", ["texts", "evidence", "mixed"])
@pytest.mark.parametrize(
    ("how", "at"), [("crash", 0), ("crash", 3), ("SIGTERM", 0), ("SIGTERM", 2), ("SIGINT", 4)]
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, kind: str, how: str, at: int) -> None:
    made = wandering_run if kind == "mixed" else search_run
    changes = {**SIX, "search": {"completions": None if kind == "evidence" else 4}}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    made(tmp_path, straight, **changes, **stops(99, how)).run()
    first = made(tmp_path, resumed, **changes, **stops(at, how))
    if how == "crash":
        with pytest.raises(InputError, match="fell over"):
            first.run()
    else:
        summary = first.run()
        assert (summary["stopped_because"], summary["steps"]) == (how, at + 1)
        assert (resumed / "artifact" / "prompt.json").is_file()
    random.seed(123)
    torch.manual_seed(123)
    summary = made(tmp_path, resumed, **changes, **stops(99, how)).run(resume=True)
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 6)
    assert_same_search(straight, resumed)


def test_a_signal_in_the_last_step_of_a_race_leaves_it_finished(tmp_path: Path) -> None:
    long: dict[str, Any] = {"training": {"steps": 30}}
    steps = search_run(tmp_path, tmp_path / "a", **long, **stops(99, "SIGTERM")).run()["steps"]
    assert steps < 30
    summary = search_run(tmp_path, tmp_path / "b", **long, **stops(steps - 1, "SIGTERM")).run()
    assert (summary["stopped_because"], summary["steps"]) == ("finished", steps)


def test_the_artifact_holds_the_best_text_although_another_is_believed_in_later(
    tmp_path: Path,
) -> None:
    """The best one by held-out reward is the start; it outlives the race in the checkpoint."""
    output = tmp_path / "run"
    changes = {
        **heldout(0.1, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2),
        "evaluation": {"every": 1},
        "search": {"completions": 2},
        "training": {"steps": 6, "save_every": 1, "keep_checkpoints": 9},
    }
    summary = search_run(tmp_path, output, **changes).run()
    believed = [int(row["search/incumbent"]) for row in read_jsonl(output / "metrics.jsonl")]
    texts = ["Be nice.", *TEXTS]
    assert summary["best_step"] == 1
    assert text_of(output) == texts[believed[0]] != texts[believed[-1]]
    for path in (output / "checkpoints").iterdir():
        assert json.loads((path / "state.json").read_text())["best"]["init_text"] in texts
    run = search_run(tmp_path, output, **changes)
    run.run(resume=True)
    assert run.prompt.text == text_of(output) == texts[believed[0]]
    policy = run.parts.policy
    assert load_artifact(output / "artifact", policy).init_text == texts[believed[0]]


def listen(run: Run) -> list[Prompt]:
    """What the run believes best after each of its steps, as it goes on."""
    believed: list[Prompt] = []
    searcher = search_step(run).parts.searcher
    tell = searcher.tell

    def listened(trials: Sequence[Trial]) -> None:
        tell(trials)
        believed.append(searcher.incumbent.prompt)

    searcher.tell = listened  # type: ignore[method-assign]
    return believed


def test_the_best_of_several_kinds_is_kept_with_its_tensors(tmp_path: Path) -> None:
    """Whichever step is best, the artifact is what was believed in then, text or soft prompt."""
    found = set()
    for best in range(1, 7):
        output = tmp_path / str(best)
        values = [0.9 if step == best else 0.1 for step in range(7)]
        run = wandering_run(tmp_path, output, **SIX, **heldout(*values), evaluation={"every": 1})
        believed = listen(run)
        assert run.run()["best_step"] == best
        expected = believed[best - 1]
        kept = load_artifact(output / "artifact", run.parts.policy)
        assert (kept.kind, kept.init_text) == (expected.kind, expected.init_text)
        assert kept.state_dict().keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert torch.equal(kept.state_dict()[name], tensor)
        found.add(kept.kind)
    assert found == {"text", "soft"}


def test_early_stopping_and_time_limits_end_a_search(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"search": {"completions": 50}, "evaluation": {"every": 1}}
    stale = search_run(
        tmp_path,
        tmp_path / "a",
        **changes,
        **heldout(*[0.5] * 7),
        training={"steps": 6, "early_stopping": 2},
    ).run()
    assert (stale["stopped_because"], stale["steps"]) == ("early_stopping", 2)
    late = search_run(tmp_path, tmp_path / "b", **changes, training={"max_seconds": 1e-9}).run()
    assert (late["stopped_because"], late["steps"]) == ("max_seconds", 1)


def test_the_calls_that_a_search_may_make_end_it_exactly(tmp_path: Path) -> None:
    """5 texts, 1 query a step: 3 steps of 15 calls; given more, a run that ended goes on."""
    output = tmp_path / "run"
    changes: dict[str, Any] = {"search": {"completions": 50, "max_calls": 19}}
    summary = search_run(tmp_path, output, **SIX, **changes).run()
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 3)
    assert sum(row["completions"] for row in summary["candidates"]) == 15
    calls = [row["search/calls"] for row in read_jsonl(output / "metrics.jsonl")]
    assert calls == [5, 10, 15]
    assert read_jsonl(output / "evaluation.jsonl")[-1]["step"] == 3
    changes["search"]["max_calls"] = 24
    summary = search_run(tmp_path, output, **SIX, **changes).run(resume=True)
    assert summary["steps"] == 4
    straight = search_run(tmp_path, tmp_path / "straight", **SIX, **changes).run()
    assert straight["candidates"] == summary["candidates"]


def test_a_population_shares_the_calls(tmp_path: Path) -> None:
    members = [{"name": name, "changes": {"seed": seed}} for seed, name in enumerate("abc")]
    changes: dict[str, Any] = {"population": members, "training": {"steps": 18}}
    recipe = search_recipe(tmp_path, search={"max_calls": 30}, **changes)
    searches = [member.search for member in recipe.members().values()]
    assert [each.max_calls for each in searches if each is not None] == [10, 10, 10]
    with pytest.raises(ValidationError, match="max_calls is 31, which 3 members of population"):
        search_recipe(tmp_path, search={"max_calls": 31}, **changes)


def test_a_guard_ends_a_search(tmp_path: Path) -> None:
    guard = {"type": "limit", "name": "long", "metric": "completions/mean_length", "above": 0.0}
    changes: dict[str, Any] = {
        "guards": [guard | {"window": 2, "patience": 1, "action": "stop"}],
        "search": {"completions": 50},
    }
    summary = search_run(tmp_path, tmp_path / "run", **changes).run()
    assert (summary["stopped_because"], summary["steps"]) == ("guard:long", 2)


def test_without_held_out_queries_the_winner_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = search_run(tmp_path, output, data={"heldout": 0}, training={"steps": 30})
    summary = run.run()
    assert summary["heldout_reward_after"] is None and summary["best_step"] == summary["steps"]
    assert text_of(output) == run.parts.learner.prompt.init_text


def test_a_population_of_searches_keeps_the_best(tmp_path: Path) -> None:
    members = [
        {"name": "few", "changes": {"search.completions": 1}},
        {"name": "other", "changes": {"search.texts": ["there", "rain"], "prompt.text": "in"}},
        {"name": "seed", "changes": {"seed": 3}},
    ]
    recipe = search_recipe(
        tmp_path, population=members, training={"steps": 18}, evaluation={"every": 1}
    )
    population = build_run(recipe, tmp_path, tmp_path / "run")
    assert isinstance(population, Population)
    for (
        run
    ) in population.members.values():  # no report is drawn here, and the population copies one
        run.folder.mkdir(parents=True)
        (run.folder / "report.html").touch()
    summary = population.run()
    rewards = {name: row["heldout_reward_after"] for name, row in summary["members"].items()}
    best = max(rewards, key=rewards.__getitem__)
    assert summary["best_member"] == best
    assert text_of(tmp_path / "run") == text_of(tmp_path / "run" / "members" / best)
    alone = tmp_path / "alone"
    search_run(
        tmp_path, alone, search={"completions": 1}, evaluation={"every": 1}, name="tiny-few"
    ).run()
    for kind in ("metrics", "completions", "evaluation"):
        ours = comparable_rows(tmp_path / "run" / "members" / "few", kind)
        assert ours == comparable_rows(alone, kind), kind


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"search": {"texts": ["a", "b"]}}, "another prompt, algorithm or search .*other texts"),
        ({"seed": 7}, "seed 0 but the recipe gives 7"),
    ],
)
def test_resuming_another_search_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    output = tmp_path / "run"
    search_run(tmp_path, output).run()
    with pytest.raises(InputError, match=sentence):
        search_run(tmp_path, output, **change).run(resume=True)


def test_a_search_does_not_go_on_from_gradients(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    with pytest.raises(InputError, match="another prompt, algorithm or search"):
        search_run(tmp_path, output).run(resume=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": {"type": "text"}}, "texts"),
        ({"algorithm": {"kl_coef": 0.1}}, "algorithm has no effect with search"),
        ({"algorithm": {"type": "ppo"}}, "algorithm has no effect with search"),
        ({"reference": {"type": "initial"}}, "reference has no effect with search"),
        ({"robust": {"type": "cvar"}}, "robust has no effect with search"),
        ({"training": {"optimizer": {"lr": 1.0}}}, "training.optimizer has no effect with search"),
        ({"training": {"overlap_rollouts": True}}, "training.overlap_rollouts has no effect"),
        ({"training": {"gradient_checkpointing": True}}, "training.gradient_checkpointing has no"),
        ({"rewards": [{"path": "r.py", "normalise": "batch"}]}, "compares candidates by rewards"),
        ({"rewards": [{"path": "r.py", "role": "metric"}]}, "no reward has role: score"),
        (
            {"rewards": [{"path": "r.py"}, {"path": "c.py", "role": "constraint", "limit": 1.0}]},
            "role: constraint, which a search cannot hold",
        ),
        (
            {"sampling": {"temperature": 0.0}, "search": {"completions_per_query": 2}},
            "all completions of a query would be the same",
        ),
    ],
)
def test_what_has_no_effect_with_search_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValidationError, match=sentence):
        search_recipe(tmp_path, **changes)


def test_a_start_of_another_kind_is_refused(tmp_path: Path) -> None:
    plain = search_recipe(tmp_path).plain() | {"prompt": {"type": "soft"}}
    with pytest.raises(
        ValidationError, match=r"starts from a prompt of type text, prompt\.type is"
    ):
        search_recipe(tmp_path).model_validate(plain)


def test_one_greedy_completion_per_query_can_be_compared(tmp_path: Path) -> None:
    summary = search_run(tmp_path, tmp_path / "run", sampling={"temperature": 0.0}).run()
    assert summary["stopped_because"] == "finished"


def test_a_plan_of_a_search_is_refused(tmp_path: Path) -> None:
    recipe = search_recipe(tmp_path)
    with pytest.raises(InputError, match="a search makes none"):
        plan(recipe, next(iter(SHAPES.values())), 1, next(iter(DEVICES.values())))


def test_the_report_has_the_candidates(tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes: dict[str, Any] = {
        "training": {"steps": 30},
        "search": {"texts": ["<b>the rain</b>", *TEXTS]},
    }
    search_run(tmp_path, output, **changes).run()
    recipe = search_recipe(tmp_path, **changes).plain()
    (output / "recipe.resolved.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    html = write_report(output).read_text(encoding="utf-8")
    assert "<h2>Candidates</h2>" in html
    assert "&lt;b&gt;the rain&lt;/b&gt;" in html and "<b>the rain</b>" not in html
    assert "Reward of the step&#39;s best candidate" in html
    assert "search 0." in html  # in the key of the seconds per step
