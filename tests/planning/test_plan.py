"""The plan against what is counted: parameters, caches, and the traffic of a run in shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.model.base import FrozenBase
from rlprompt.planning.plan import plan
from rlprompt.planning.tables import DEVICES, SHAPES, Shape
from rlprompt.recipe.schema import Recipe, load_recipe
from tests.cli.runs import rlprompt, write_recipe
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny import CONFIGS, VOCAB_SIZE, save_tiny, tiny_base

ROOT = Path(__file__).parents[2]
TINY = Shape(2, 64, 96, 4, 2, 16, VOCAB_SIZE, True)
CLOSE = 0.15


def recipe_of(folder: Path, model: Path, **changes: object) -> Path:
    plain = {
        "algorithm": {"group_size": 2},
        "prompt": {"num_virtual_tokens": 4},
        "sampling": {"max_tokens": 6, "min_tokens": 6},
        "training": {"steps": 1, "queries_per_step": 4, "save_every": 9, "token_budget": 4096},
        "data__heldout": 0,
        "evaluation": {"every": 9},
        "tracking": {"trackers": ["jsonl"]},
        "distributed": {"base": "sharded"},
    }
    return write_recipe(folder, model, **{**plain, **changes})


def test_shapes_count_the_parameters_of_a_base() -> None:
    base = tiny_base()
    assert CONFIGS["llama"]().tie_word_embeddings
    assert sum(p.numel() for p in base.model.parameters()) == TINY.parameters
    assert SHAPES["8b"].parameters == 8_030_261_248  # as published for Llama 3.1 8B
    assert SHAPES["70b"].parameters == 70_553_706_496
    assert SHAPES["1b"].parameters == 1_235_814_400
    assert SHAPES["3b"].parameters == 3_212_749_824


@pytest.mark.model
def test_the_shape_of_smollm2_is_that_of_the_model(smollm2: FrozenBase) -> None:
    assert sum(p.numel() for p in smollm2.model.parameters()) == SHAPES["135m"].parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": {"group_size": 2, "kl_coef": 0.1}},
        {"distributed": {"base": "sharded", "gather": "layers"}},
        {"training__gradient_checkpointing": True},
    ],
    ids=["reference", "layers", "recomputed"],
)
def test_the_traffic_of_shards_is_the_one_that_is_counted(
    changes: dict[str, object], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    model = save_tiny(tmp_path / "model")
    recipe, logs = recipe_of(tmp_path, model, training__steps=2, **changes), tmp_path / "logs"
    output = tmp_path / "run"
    ended = run_ranks(2, logs, "train", recipe, "-o", output, RANK_MEASURE="traffic")
    assert ended.codes == [0, 0], ended.logs
    first, second = (row["weights"] for row in read_jsonl(logs / "rank_1.jsonl"))
    made = plan(load_recipe(recipe), TINY, 2, DEVICES["cpu"])
    predicted = sum(size for part, size in made.traffic.items() if part.startswith("base"))
    assert second - first == pytest.approx(predicted, rel=CLOSE)


def test_the_memory_of_a_cache_is_that_of_its_tensors(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_of(tmp_path, tmp_path))
    made = plan(recipe, TINY, 2, DEVICES["h100"], query_tokens=20).memory
    rows, columns = 2 * 2, 4 + 20 + 6
    assert made["cache of a rollout"] == rows * columns * 2 * 2 * 2 * 16 * 4
    assert made["cache, while it grows"] == 0
    assert made["base, at rest"] == TINY.parameters * 4 / 2


def test_a_base_that_does_not_fit_is_gathered_layer_by_layer_and_decoded_together() -> None:
    recipe = load_recipe(ROOT / "recipes" / "distributed" / "two_nodes.yaml")
    small, large = (plan(recipe, SHAPES[size], 16, DEVICES["h100"]) for size in ("8b", "70b"))
    gathered = [made.memory["base, gathered for a rollout"] for made in (small, large)]
    assert gathered[0] == SHAPES["8b"].parameters * 2
    assert gathered[1] < 0.1 * SHAPES["70b"].parameters * 2
    caches = [made.memory["cache of a rollout"] for made in (small, large)]
    assert caches[1] / caches[0] == 256 / 32 * SHAPES["70b"].kv_elements / SHAPES["8b"].kv_elements
    whole = plan(
        load_recipe(ROOT / "recipes" / "distributed" / "one_node.yaml"),
        SHAPES["8b"],
        8,
        DEVICES["h100"],
    )
    assert large.decode_tokens_per_second < whole.decode_tokens_per_second


def test_the_command_prints_every_part(tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "distributed" / "two_nodes.yaml"
    shown = rlprompt("plan", recipe, "--model-size", "70b", "--gpus", 16)
    assert shown.code == 0, shown.err
    for part in ("base, at rest", "activations", "rollout, at least", "tokens, at most", "fits"):
        assert part in shown.out, part
    whole = rlprompt(
        "plan", ROOT / "recipes" / "distributed" / "one_node.yaml", "--model-size", "70b"
    )
    assert "does not fit 80 GB" in whole.out


def test_more_ranks_than_completions_are_refused(tmp_path: Path) -> None:
    recipe: Recipe = load_recipe(recipe_of(tmp_path, tmp_path))
    with pytest.raises(InputError, match="nothing to do"):
        plan(recipe, TINY, 9, DEVICES["h100"])
    plan(recipe, TINY, 8, DEVICES["h100"])
    pairs = load_recipe(recipe_of(tmp_path, tmp_path, algorithm={"type": "dpo"}))
    with pytest.raises(InputError, match="queries_per_step is 4 and there are 5 ranks"):
        plan(pairs, TINY, 5, DEVICES["h100"])


def test_rollouts_during_updates_meet_them_in_memory_and_hide_behind_them() -> None:
    path = ROOT / "recipes" / "concise" / "smollm2_grpo.yaml"
    turns, both = (
        plan(load_recipe(path, [f"training.overlap_rollouts={on}"]), TINY, 1, DEVICES["h100"])
        for on in ("false", "true")
    )
    assert both.rollout_bytes == both.update_bytes > max(turns.rollout_bytes, turns.update_bytes)
    assert both.bounds == turns.bounds
    assert both.step_seconds == max(turns.bounds.values()) < turns.step_seconds
    with pytest.raises(InputError, match="works on one rank, and 2 are asked for"):
        recipe = load_recipe(path, ["training.overlap_rollouts=true"])
        plan(recipe, TINY, 2, DEVICES["h100"])
