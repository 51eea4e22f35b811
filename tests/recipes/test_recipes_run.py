"""Every recipe in `recipes/` is parsed, built and stepped twice.

On a tiny model, with few queries and short completions; everything else is as the recipe has it.
Two things cannot be had here and are replaced: preference models, which are trained first, and a
base in shards, which has tests of its own.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlprompt.algorithms.make import ALGORITHMS
from rlprompt.files import read_jsonl
from rlprompt.model.base import verify_unchanged
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.layer_adapters import METHODS
from rlprompt.prompts.make import PROMPTS
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.runs.run import Run
from rlprompt.search.make import SEARCHERS
from tests.fixtures.endpoint import serving
from tests.fixtures.tiny import tiny_model, tiny_tokenizer
from tests.fixtures.vllm_server import fake_vllm

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.y*ml") if p.parent.name != "reward_models")
MAX_TOKENS = 16
SHORT = (
    "training.queries_per_step=2",
    "training.save_every=2",
    "evaluation.every=2",
    "evaluation.max_queries=2",
    "evaluation.completions_per_query=1",
    f"sampling.max_tokens={MAX_TOKENS}",
    "data.max_queries=24",
    "tracking.trackers=[jsonl]",
    "model.device=cpu",
)


def write_empty_report(folder: Path) -> None:
    (folder / "report.html").touch()  # a population copies it


def name_of(path: Path) -> str:
    return str(path.relative_to(FOLDER))


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for long texts, which its tokenizer cuts into many tokens."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama")
    model.config.max_position_embeddings = 8192
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def replaced(recipe: Recipe) -> list[str]:
    """Overrides for what a recipe needs and the repository does not hold."""
    changes = [
        "distributed={}",
        f"training.steps={2 * max(1, len(recipe.population))}",
        f"sampling.min_tokens={min(recipe.sampling.min_tokens, MAX_TOKENS)}",
    ]
    for place, reward in enumerate(recipe.rewards):
        if reward.path == "builtin:preference":
            changes += [
                f"rewards.{place}.path=builtin:length",
                f"rewards.{place}.options={{max: 4}}",
            ]
    return changes


def step_twice(path: Path, output: Path, *overrides: str) -> list[Run]:
    """Gives the trainer, or those of a population's members."""
    recipe = load_recipe(path)
    recipe = load_recipe(path, [*SHORT, *replaced(recipe), *overrides])
    run = build_run(recipe, path.parent, output)
    summary = run.run()
    assert run.metrics.learned is not None and math.isfinite(run.metrics.learned)
    trainers = [run] if isinstance(run, Run) else list(run.members.values())
    assert summary["steps"] == 2 * len(trainers)
    for trainer in trainers:
        assert verify_unchanged(trainer.parts.policy.base) == summary["base_fingerprint_before"]
        rows = read_jsonl(trainer.folder / "metrics.jsonl")
        learned = "loss" if recipe.search is None else "search/best_reward"
        assert all(math.isfinite(row[learned]) for row in rows) and len(rows) == 2
    return trainers


def test_every_algorithm_representation_and_searcher_has_a_recipe() -> None:
    recipes = [load_recipe(path) for path in RECIPES]
    assert {recipe.algorithm.type for recipe in recipes} == set(ALGORITHMS)
    assert {recipe.search.type for recipe in recipes if recipe.search} == set(SEARCHERS)
    trained = {recipe.prompt.type for recipe in recipes if recipe.search is None}
    assert trained == set(PROMPTS) - {"text"}  # it has nothing to train
    adapters = [r.prompt for r in recipes if isinstance(r.prompt, AdapterSettings)]
    methods = {settings.method.type for settings in adapters}
    assert methods == {name.lower() for name in METHODS}


REMOTE = [path for path in RECIPES if load_recipe(path).engine.type == "endpoint"]
"""Recipes for a model that is elsewhere."""


@pytest.mark.slow
@pytest.mark.parametrize("path", REMOTE, ids=name_of)
def test_a_recipe_for_an_endpoint_is_built_and_stepped_twice(path: Path, tmp_path: Path) -> None:
    changes = [change for change in SHORT if not change.startswith("model.")]
    with serving() as provider:
        changes += [f"engine.base_url={provider.url}", "engine.api_key=null", "training.steps=2"]
        recipe = load_recipe(path, changes)
        tmp_path.joinpath("out").mkdir()
        summary = build_run(recipe, path.parent, tmp_path / "out").run()
    assert summary["steps"] == 2 and summary["stopped_because"] == "finished"
    assert summary["endpoint"]["tokens"] == provider.tokens
    assert summary["endpoint"]["cost"] > 0.0


SERVED = [path for path in RECIPES if load_recipe(path).engine.type == "vllm"]
"""Recipes whose completions a vLLM server draws."""


@pytest.mark.slow
@pytest.mark.parametrize("path", SERVED, ids=name_of)
def test_a_recipe_for_vllm_is_built_and_stepped_twice(
    path: Path, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", write_empty_report)
    with fake_vllm() as server:
        own = (f"model.path={tiny_dir}", "model.dtype=float32", f"engine.urls={server.url}")
        step_twice(path, tmp_path, *own)
        assert server.completions


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if p not in (*REMOTE, *SERVED)], ids=name_of)
def test_a_recipe_is_built_and_stepped_twice(
    path: Path, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing the report's charts takes longer than everything else together.
    monkeypatch.setattr("rlprompt.recipe.build.write_report", write_empty_report)
    step_twice(path, tmp_path, f"model.path={tiny_dir}", "model.dtype=float32")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("name", ["concise/smollm2_ppo", "topics/smollm2_ipo"])
def test_a_recipe_runs_on_its_own_model(name: str, tmp_path: Path, smollm2_dir: Path) -> None:
    (run,) = step_twice(FOLDER / f"{name}.yaml", tmp_path)
    assert run.parts.policy.base.id == "smollm2-135m"
