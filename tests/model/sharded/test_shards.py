"""A base in shards over two real processes: the same run, with half of the bytes on each rank."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.cli.runs import REWARD, rlprompt, write_recipe
from tests.distributed.test_ranks import (
    STOPS_FIRST_RANK,
    assert_close_runs,
    recipe_of,
    wait_for_steps,
    wait_for_text,
)
from tests.fixtures.ranks import outcome, run_ranks, start_ranks
from tests.fixtures.tiny import save_tiny

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_two_ranks_with_shards_are_one_rank_without(
    gather: str, tmp_path: Path, model_dir: Path
) -> None:
    recipe = recipe_of(tmp_path, model_dir)
    one, two = tmp_path / "one", tmp_path / "two"
    assert rlprompt("train", recipe, "-o", one).code == 0
    ended = run_ranks(
        2, tmp_path / "logs", "train", recipe, "-o", two,
        "distributed.base=sharded", f"distributed.gather={gather}",
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.logs
    assert_close_runs(one, two)
    whole, *_ = json.loads((one / "summary.json").read_text())["ranks"]
    parts = json.loads((two / "summary.json").read_text())["ranks"]
    assert len(parts) == 2
    for part in parts:
        assert part["base_bytes"] == pytest.approx(whole["base_bytes"] / 2, rel=0.02)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ({"type": "prefix"}, ["distributed.offload=cpu"]),
        ({"type": "adapter"}, ["distributed.secondary_shards=2"]),
    ],
    ids=["prefix_offloaded", "adapter_with_secondary_shards"],
)
def test_other_prompts_and_settings_give_the_same_run(
    prompt: dict[str, str], settings: list[str], tmp_path: Path, model_dir: Path
) -> None:
    recipe = recipe_of(tmp_path, model_dir, prompt=prompt, training__gradient_checkpointing=True)
    one, two = tmp_path / "one", tmp_path / "two"
    assert rlprompt("train", recipe, "-o", one).code == 0
    ended = run_ranks(
        2, tmp_path / "logs", "train", recipe, "-o", two, "distributed.base=sharded", *settings
    )
    assert ended.codes == [0, 0], ended.logs
    assert_close_runs(one, two)


def test_a_run_in_shards_goes_on_whole_on_one_rank(tmp_path: Path, model_dir: Path) -> None:
    recipe = recipe_of(tmp_path, model_dir)
    one, two = tmp_path / "one", tmp_path / "two"
    assert rlprompt("train", recipe, "-o", one).code == 0
    (tmp_path / "reward.py").write_text(REWARD + STOPS_FIRST_RANK)
    ended = run_ranks(2, tmp_path / "logs", "train", recipe, "-o", two, "distributed.base=sharded")
    assert ended.codes == [0, 0] and "stopped by SIGTERM" in ended.logs[0], ended.logs
    (tmp_path / "reward.py").write_text(REWARD)
    assert rlprompt("train", recipe, "-o", two, "--resume").code == 0
    assert_close_runs(one, two)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_between_shards_ends_the_others_in_time(
    number: signal.Signals, tmp_path: Path, model_dir: Path
) -> None:
    limit = 15
    recipe = recipe_of(
        tmp_path, model_dir, training__steps=1000,
        distributed={"base": "sharded", "gather": "layers", "timeout_s": limit},
    )  # fmt: skip
    output, logs = tmp_path / "run", tmp_path / "logs"
    process = start_ranks(2, logs, "train", recipe, "-o", output)
    wait_for_steps(output, 1)
    victim = int((logs / "rank_1.pid").read_text())
    os.kill(victim, number)
    start = time.monotonic()
    wait_for_text(logs / "rank_0.log", "error: ")
    assert time.monotonic() - start < limit + 15
    os.kill(victim, signal.SIGKILL)
    ended = outcome(process, logs)
    assert ended.codes == [1, -signal.SIGKILL]
    (line,) = [line for line in ended.logs[0].splitlines() if line.startswith("error: ")]
    assert "rank 0 of 2 waited" in line and "--resume" in line
    assert "Traceback" not in ended.logs[0]


@pytest.mark.model
def test_smollm2_on_two_ranks_with_and_without_shards_is_one_rank(
    tmp_path: Path, smollm2_dir: Path
) -> None:
    """In float32, so that the order of sums is all that differs; metrics agree to 2e-4."""
    recipe = write_recipe(
        tmp_path,
        smollm2_dir,
        sampling={"max_tokens": 6},
        training={"steps": 2, "queries_per_step": 2, "save_every": 5},
        evaluation={"every": 5, "completions_per_query": 1},
        tracking={"trackers": ["jsonl"]},
    )
    outputs = {}
    for name, size, base in (
        ("one", 1, "replicated"),
        ("two", 2, "replicated"),
        ("parts", 2, "sharded"),
    ):
        outputs[name] = tmp_path / name
        ended = run_ranks(
            size, tmp_path / f"logs_{name}", "train", recipe, "-o", outputs[name],
            f"distributed.base={base}",
        )  # fmt: skip
        assert ended.codes == [0] * size, ended.logs
    assert_close_runs(outputs["one"], outputs["two"], tolerance=2e-4)
    assert_close_runs(outputs["one"], outputs["parts"], tolerance=2e-4)
    whole, *_ = json.loads((outputs["one"] / "summary.json").read_text())["ranks"]
    for part in json.loads((outputs["parts"] / "summary.json").read_text())["ranks"]:
        assert part["base_bytes"] == pytest.approx(whole["base_bytes"] / 2, rel=0.001)
        # What is gathered in passing outweighs the half that is saved of so small a model, on top
        # of what DeepSpeed itself takes; docs/log.md has the figures.
        assert part["peak_rss_mb"] < 1.3 * whole["peak_rss_mb"]
