"""The experiment at equal calls, end to end on a tiny model, and its arithmetic."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import equal_calls as experiment
from experiments.equal_calls import KEYS, Cell, Places
from rlprompt.files import read_jsonl
from rlprompt.recipe.schema import load_recipe
from tests.fixtures.runs import merged, tiny_recipe

TEXTS = [f"be {word}" for word in ("a", "b", "c", "d", "e", "f", "g", "h")]


@pytest.mark.parametrize("calls", experiment.CALLS)
def test_a_gradient_method_draws_exactly_as_many(calls: int) -> None:
    steps, queries, group = experiment.shape(calls)
    assert steps * queries * group == calls
    assert steps >= 5 and group >= 4 and 24 <= queries * group <= 96


def test_calls_that_cannot_be_shared_out_are_skipped() -> None:
    with pytest.raises(experiment.Skipped, match="7 calls are no product"):
        experiment.shape(7)


@pytest.mark.parametrize("target", experiment.TARGETS)
def test_cells_are_recipes_of_their_method_at_one_budget(target: str) -> None:
    places = Places()
    for method, kind in (("gepa-base", "gepa"), ("gepa-hand", "gepa")):
        cell = Cell(target, "smollm2", method, 500, 2)
        recipe = load_recipe(*experiment.overrides_of(cell, places, 'say "no"'))
        search: Any = recipe.search
        assert (search.type, search.max_calls, recipe.seed) == (kind, 500, 2)
        assert (search.proposals is None) == (method == "gepa-base")
        assert recipe.evaluation.handwritten == 'say "no"'
    for method in ("grpo-soft", "grpo-prefix"):
        cell = Cell(target, "smollm2", method, 500, 2)
        recipe = load_recipe(*experiment.overrides_of(cell, places, "x"))
        training, algorithm = recipe.training, recipe.algorithm
        group = int(algorithm.model_dump()["group_size"])
        assert training.steps * training.queries_per_step * group == 500
        assert f"grpo-{recipe.prompt.type}" == method
        assert (training.clock, recipe.model.threads) == ("cpu", 1)
    written = json.loads((places.recipes / "data" / "proposals.json").read_text("utf-8"))[target]
    assert len(set(written)) == len(written) >= 12
    assert not set(written) & set(experiment.texts_of(target, "smollm2", places))


def test_a_recipe_of_the_first_model_serves_the_other_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "concise").mkdir()
    (tmp_path / "concise" / "smollm2_gepa.yaml").touch()
    places = Places(recipes=tmp_path)
    path, changes = experiment.recipe_of(Cell("concise", "qwen", "gepa-base", 150, 0), places)
    assert (path.name, changes) == ("smollm2_gepa.yaml", ["model.path=qwen2.5-coder-0.5b"])
    with pytest.raises(experiment.Skipped, match=r"no recipe qwen_es\.yaml"):
        experiment.recipe_of(Cell("concise", "qwen", "es", 150, 0), places)


@pytest.mark.parametrize("target", experiment.TARGETS)
@pytest.mark.parametrize("model", experiment.MODELS)
def test_all_methods_begin_with_the_same_text(target: str, model: str) -> None:
    starts = set()
    for method in experiment.METHODS:
        path, changes = experiment.recipe_of(Cell(target, model, method, 500, 0), Places())
        prompt: Any = load_recipe(path, changes).prompt
        starts.add(prompt.text if prompt.type == "text" else prompt.init_text)
        if prompt.type == "prefix" or model == "qwen":  # else a soft prompt has a length of its own
            assert getattr(prompt, "num_virtual_tokens", None) is None
    assert len(starts) == 1, starts


def test_rows_are_shown_on_the_page_with_their_intervals(tmp_path: Path) -> None:
    places = Places(results=tmp_path)
    assert experiment.page_section(places) == []
    row = dict.fromkeys(KEYS, 0.5) | {"target": "concise", "model": "qwen", "method": "es"}
    experiment.put_row(row | {"calls": 150, "seed": 1, "gain_low": -0.25}, places)
    lines = experiment.page_section(places)
    assert lines[-2].startswith("| concise | qwen | 150 | es | 1 | 0.500 | 0.500 | 0.500 | +0.500")
    assert "(-0.250 to 0.500)" in lines[-2]
    (tmp_path / "equal_calls_concise.svg").touch()
    assert experiment.page_section(places)[-2].endswith("(results/equal_calls_concise.svg)")


def tiny_places(folder: Path) -> Places:
    """Recipes of one target over a tiny model, with texts and proposals."""
    recipes = folder / "recipes"
    own = recipes / "concise"
    own.mkdir(parents=True)
    changes = {"data": {"heldout": 2, "test": 2}, "evaluation": {"completions_per_query": 2}}
    tree = tiny_recipe(own, **changes).plain()
    for name, other in (
        ("grpo", {}),
        ("gepa", {"prompt": {"type": "text", "text": "Be nice."}, "search": {"type": "gepa"}}),
    ):
        plain = merged(tree, other)
        if other:
            plain["prompt"] = other["prompt"]
            del plain["algorithm"]
            del plain["training"]["optimizer"]
        (own / f"tiny_{name}.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    data = recipes / "data"
    data.mkdir()
    (data / "handwritten.json").write_text(json.dumps({"concise": TEXTS}))
    (data / "proposals.json").write_text(json.dumps({"concise": ["the rain", "the sun"]}))
    return Places(recipes, folder / "results", folder / "runs")


def arguments(places: Places, *more: str) -> list[str]:
    return [
        *("--recipes", str(places.recipes), "--results", str(places.results)),
        *("--runs", str(places.runs), "--models", "tiny", "--calls", "12", "--seeds", "3", *more),
    ]


def test_a_dry_run_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = tiny_places(tmp_path)
    assert experiment.main(arguments(places, "--dry-run", "--only", "target=concise")) == 0
    shown = capsys.readouterr().out
    commands = [shlex.split(line) for line in shown.splitlines() if line.startswith("rlprompt")]
    assert [Path(words[2]).name for words in commands] == [
        "tiny_gepa.yaml",
        "tiny_gepa.yaml",
        "tiny_grpo.yaml",
        "tiny_grpo.yaml",
    ]
    assert "# skipped concise-tiny-es-12-3: there is no recipe tiny_es.yaml" in shown
    assert not places.results.exists() and not places.runs.exists()


def test_a_wrong_filter_is_one_sentence() -> None:
    with pytest.raises(SystemExit, match=r"--only 'methd=es' is no filter; write KEY=VALUE"):
        experiment.main(["--only", "methd=es"])
    with pytest.raises(SystemExit, match="no cell is left"):
        experiment.main(["--only", "method=gapa"])


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs in processes of their own
def test_cells_are_run_once_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = tiny_places(tmp_path)
    only = ("--only", "target=concise", "method=gepa-hand,grpo-soft,es")
    assert experiment.main(arguments(places, *only)) == 0
    assert "skipped concise-tiny-es-12-3" in capsys.readouterr().out
    rows = list(read_jsonl(places.rows))
    assert [row["method"] for row in rows] == ["gepa-hand", "grpo-soft"]
    picked = json.loads(places.picked.read_text())["concise"]["tiny"]
    assert len(picked) == 8 and picked[0]["reward"] >= picked[-1]["reward"]
    for row in rows:
        assert tuple(row) == KEYS
        assert row["gain_low"] <= row["gain_over_best_text"] <= row["gain_high"]
        gain = row["test_reward"] - row["best_text_reward"]
        assert row["gain_over_best_text"] == pytest.approx(gain, abs=1e-6)
        assert row["cpu_seconds"] > 0 and "--output" not in row["command"]
        assert json.dumps(picked[0]["text"]) in row["command"]
        assert row["command"].startswith("rlprompt train ")
    assert rows[0]["base_reward"] == rows[1]["base_reward"]
    searched = json.loads((places.runs / "concise-tiny-gepa-hand-12-3/summary.json").read_text())
    assert sum(each["completions"] for each in searched["candidates"]) <= 12
    drawn = read_jsonl(places.runs / "concise-tiny-grpo-soft-12-3" / "completions.jsonl")
    assert sum(each["split"] == "train" for each in drawn) == 12
    assert experiment.main(arguments(places, *only)) == 0
    assert list(read_jsonl(places.rows)) == rows
    places.rows.unlink()  # as after a stop between a run and its row
    assert experiment.main(arguments(places, *only)) == 0
    assert list(read_jsonl(places.rows)) == rows
    assert experiment.main(arguments(places, "--plot")) == 0
    assert (places.results / "equal_calls_concise.svg").read_text().count("<svg") == 1


def row(method: str, calls: int, reward: float, seed: int = 0) -> dict[str, Any]:
    return {
        "target": "concise",
        "model": "m",
        "method": method,
        "calls": calls,
        "seed": seed,
        "test_reward": reward,
        "cpu_seconds": calls / 10,
        "base_reward": 0.1,
        "best_text_reward": 0.4,
    }


def test_who_passes_whom_is_told_by_means_over_seeds() -> None:
    rows = [
        row("es", 150, 0.2),
        row("es", 500, 0.9),
        row("es", 500, 0.5, 1),
        row("grpo-soft", 150, 0.3),
        row("grpo-soft", 500, 0.6),
        row("cmaes", 500, 0.1),
    ]
    said = ["concise, m: es passes grpo-soft between 150 and 500 calls"]
    assert experiment.crossings(rows) == said


def test_a_figure_has_both_axes_for_each_model() -> None:
    rows = [row("es", calls, 0.2 + calls / 1e4, seed) for calls in (150, 500) for seed in (0, 1)]
    figure = experiment.draw("concise", [*rows, {**rows[0], "model": "n"}])
    assert len(figure.axes) == 4
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert labels == ["scored completions", "CPU seconds of training"] * 2
    assert {"es", "base", "best text"} == set(figure.axes[1].get_legend_handles_labels()[1])
