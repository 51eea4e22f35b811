"""benchmarks/simulate_cluster.py against cases computed by hand, and against the plan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulate_cluster
from benchmarks.cluster_model import costs
from benchmarks.cluster_model.events import Stage, goodput, play
from benchmarks.cluster_model.job import Conditions, Job, draw_lengths, draw_slowness
from benchmarks.cluster_model.step import KINDS, owners, stages_of_step, steps_of
from benchmarks.simulate_cluster import ASSUMED, Cell, conditions_after, limits, plan_cell
from rlprompt.planning.tables import Device, Shape

SHAPE = Shape(2, 10, 20, 2, 1, 5, 100, True)
DEVICE = Device(1e9, 1e6, 1e9, 1e6, network=5e5, host=1e6, per_node=2)


def job_of(ranks: int = 1, queries: int = 4, **changes: object) -> Job:
    usual = Job(
        shape=SHAPE,
        device=DEVICE,
        ranks=ranks,
        queries=queries,
        group_size=2,
        query_tokens=3,
        prompt_tokens=1,
        max_tokens=5,
        max_rows=4,
        token_budget=64,
        trained=10,
        save_every=2,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def alone(kind: str, *seconds: float) -> Stage:
    return Stage(kind, np.array(seconds))


def meeting(*seconds: float) -> Stage:
    return Stage("meetings", np.array(seconds), is_meeting=True)


def test_one_rank_takes_the_sum_of_its_phases() -> None:
    played = play([alone("decode", 3.0), alone("update", 2.0), meeting(0.5)], 1)
    assert played.seconds == 5.5
    assert played.spent == {"decode": 3.0, "update": 2.0, "meetings": 0.5, "waiting": 0.0}


def test_two_ranks_and_one_straggler_take_as_long_as_the_straggler() -> None:
    played = play([alone("decode", 1.0, 4.0), meeting(0.5, 0.5), alone("update", 2.0, 1.0)], 2)
    assert played.seconds == 4.0 + 0.5 + 2.0
    assert played.spent["waiting"] == (3.0 + 1.0) / 2  # before the meeting, and at the end


def test_without_a_meeting_a_rank_that_is_late_here_and_early_there_costs_nothing() -> None:
    first, second = alone("decode", 1.0, 4.0), alone("update", 4.0, 1.0)
    assert play([first, second], 2).seconds == 5.0
    assert play([first, meeting(0.0, 0.0), second], 2).seconds == 8.0


def test_a_checkpoint_holds_up_the_others_only_at_the_next_meeting() -> None:
    stages = [alone("checkpoint", 2.0, 0.0), alone("decode", 1.0, 3.0), meeting(0.0, 0.0)]
    assert play(stages, 2).seconds == 3.0


def test_what_ranks_spend_adds_up_to_the_time() -> None:
    job = job_of(4, 8)
    conditions = replace(ASSUMED, slow_chance=0.5)
    played = steps_of(job, conditions, seed=3)
    assert math.isclose(sum(played.spent.values()), played.seconds, rel_tol=1e-12)


def test_decoding_is_the_sum_over_tokens_of_what_is_read() -> None:
    made = costs.rollout(job_of(), np.array([[1, 3]]))
    cache = 2 * 2 * 1 * 5  # elements of a column: keys and values, layers, heads, head dim
    # Columns 4, 5, 6 and half of the token itself; two rows, then one, one.
    elements = 3 * SHAPE.parameters + cache * (2 * 4.5 + 5.5 + 6.5)
    assert made.device_s == pytest.approx(elements * 2 / 1e6)
    assert (made.tokens, made.launch_s) == (3, 0.0)


def test_rows_beyond_max_rows_are_decoded_in_turns_of_whole_groups() -> None:
    lengths = np.array([[5, 2], [1, 1], [2, 3]])
    assert costs.rollout(job_of(), lengths).tokens == 5 + 3  # two groups of two, then one
    assert costs.rollout(job_of(max_rows=6), lengths).tokens == 5


def test_gathers_cross_the_link_and_the_adapters_of_a_node() -> None:
    job = job_of(4, is_sharded=True)
    free = Conditions()
    # 3/4 over the own link takes 0.75 s; half comes from the other node, over two adapters: 0.5 s.
    assert costs.gather_seconds(job, 1e6, 1, free) == pytest.approx(0.75)
    slow = replace(job, device=replace(DEVICE, network=1e5))
    assert costs.gather_seconds(slow, 1e6, 1, free) == pytest.approx(0.5e6 / 2e5)
    late = Conditions(gather_s=1.0, far_gather_s=10.0)
    assert costs.gather_seconds(job, 0.0, 3, late) == pytest.approx(3 * (2 * 1.0 + 2 * 10.0))


@pytest.mark.parametrize(
    "cell", [("1b", 1, "strong"), ("8b", 8, "weak"), ("8b", 64, "strong"), ("70b", 16, "strong")]
)
def test_without_variance_a_step_is_that_of_the_plan(cell: tuple[str, int, str]) -> None:
    job, planned = plan_cell(*cell)
    found = steps_of(job, Conditions(), seed=0).seconds / job.save_every
    assert found == pytest.approx(planned, rel=2e-3)
    if job.ranks == 1:
        assert found == pytest.approx(planned, rel=1e-9)


def test_a_base_that_is_gathered_whole_for_a_rollout_takes_what_the_plan_says() -> None:
    """32b on GPUs with the memory of an H200, of which a base may take half."""
    from rlprompt.planning.plan import plan
    from rlprompt.planning.tables import DEVICES
    from rlprompt.recipe.schema import load_recipe

    job, _ = plan_cell("32b", 16, "weak")
    roomy = replace(job, device=replace(DEVICES["h100"], memory=200e9), rolls_out_whole=True)
    changes = [
        f"training.queries_per_step={job.queries}",
        f"training.token_budget={job.token_budget}",
        f"sampling.max_tokens={job.max_tokens}",
        f"engine.max_rows={job.max_rows}",
        "distributed.secondary_shards=null",
        "distributed.gather=whole",
    ]
    recipe = load_recipe(simulate_cluster.RECIPE, changes)
    made = plan(recipe, job.shape, 16, roomy.device, query_tokens=job.query_tokens)
    found = steps_of(roomy, Conditions(), seed=0).seconds / job.save_every
    assert found == pytest.approx(made.step_seconds, rel=2e-3)


def test_every_effect_but_that_of_lengths_makes_a_step_longer() -> None:
    job, _ = plan_cell("1b", 16, "weak")
    seconds, spent = simulate_cluster.simulate(job, ASSUMED, seed=1)
    names = ["lengths", *list(seconds)[2:]]
    assert names[-1] == "failures"
    assert all(seconds[a] <= seconds[b] for a, b in pairwise(names))
    assert seconds["lengths"] < seconds["ideal"]  # completions end before their limit
    assert sum(spent.values()) == pytest.approx(seconds["failures"])


def test_one_slow_rank_of_two_is_what_the_step_waits_for() -> None:
    job = job_of(2)
    lengths = np.full((4, 2), 5)
    usual = play(stages_of_step(job, Conditions(), lengths, np.array([1.0, 1.0])), 2)
    late = play(stages_of_step(job, Conditions(), lengths, np.array([1.0, 3.0])), 2)
    own = usual.spent["decode"] + usual.spent["update"]
    assert late.seconds - usual.seconds == pytest.approx(2 * own)


def test_lengths_are_those_of_the_stated_distribution() -> None:
    job = job_of(queries=20_000, max_tokens=1000)
    lengths = draw_lengths(job, 0.5, np.random.default_rng(0))
    assert (lengths.min() >= 1) and (lengths.max() == 1000)
    assert np.median(lengths) == pytest.approx(500, rel=0.03)
    inner = lengths[(lengths < 1000).all(axis=1)]
    assert np.corrcoef(np.log(inner).T)[0, 1] > 0.2  # a query's completions are alike
    assert (draw_lengths(job, 0.0, np.random.default_rng(0)) == 1000).all()


def test_slow_ranks_are_as_frequent_and_as_slow_as_asked() -> None:
    conditions = Conditions(slow_chance=0.25, slow_factor=2.0)
    found = draw_slowness(job_of(20_000), conditions, np.random.default_rng(0))
    assert set(found) == {1.0, 2.0}
    assert found.mean() == pytest.approx(1.25, rel=0.02)


def test_failures_cost_what_the_closed_form_says() -> None:
    block, rate, restart = 100.0, 1 / 1000, 50.0
    found = goodput(block, rate, restart, np.random.default_rng(0))
    kept = block / (math.exp(rate * block) - 1)  # whole blocks before an exponential failure
    assert found == pytest.approx(kept / (1 / rate + restart), rel=0.05)
    assert goodput(block, 0.0, restart, np.random.default_rng(0)) == 1.0
    with pytest.raises(ValueError, match="block above 0"):
        goodput(0.0, rate, restart, np.random.default_rng(0))


def test_groups_go_to_ranks_by_number_or_by_tokens() -> None:
    tokens = [9, 1, 8, 2]
    assert owners(job_of(2, balances=False), tokens).tolist() == [0, 1, 0, 1]  # 17 and 3
    even = owners(job_of(2), tokens)
    assert np.bincount(even, weights=tokens).tolist() == [10.0, 10.0]


def test_each_rank_scores_its_own_groups() -> None:
    """Three groups of two on two ranks: one rank scores two completions, the other four."""
    job, lengths = job_of(2, queries=3), np.full((3, 2), 5)
    slow = replace(Conditions(), reward_s=10.0)
    plain, scored = (
        play(stages_of_step(job, each, lengths, np.ones(2)), 2) for each in (Conditions(), slow)
    )
    assert scored.spent["rewards"] == pytest.approx(10.0 * (2 + 4) / 2)
    assert scored.seconds == pytest.approx(plain.seconds + 10.0 * 4)


def test_where_scaling_stops_and_why() -> None:
    def cell(gpus: int, step: float, reward: float) -> Cell:
        kinds = dict.fromkeys(KINDS, 0.0)
        spent = {**kinds, "decode": step - reward, "rewards": reward}
        return Cell("8b", gpus, "weak", "replicated", 8, 1.0, {"failures": step}, spent, 100 * gpus)

    (row,) = limits([cell(8, 10, 1), cell(16, 15, 6), cell(32, 40, 31)])
    assert row["efficiency"] == {"8": 1.0, "16": pytest.approx(2 / 3), "32": 0.25}
    assert (row["below_half_at"], row["grows_most"]) == (32, "rewards")
    assert limits([cell(8, 10, 1)])[0]["below_half_at"] is None


def test_effects_come_on_one_after_the_other() -> None:
    assert conditions_after("ideal", ASSUMED) == Conditions()
    assert conditions_after("lengths", ASSUMED) == Conditions(length_spread=ASSUMED.length_spread)
    last = conditions_after("rewards and checkpoints", ASSUMED)
    assert last.reward_s > 0 and last.device_mtbf_s == math.inf


def test_the_command_writes_the_same_file_for_the_same_seed(tmp_path: Path) -> None:
    def written(name: str, seed: str) -> str:
        path = tmp_path / name
        asked = ["--gpus", "2,4", "--sizes", "1b", "--seed", seed, "--json", str(path)]
        simulate_cluster.main([*asked, "--plot", str(path.with_suffix(".svg"))])
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
        return path.read_text()

    first = written("a.json", "0")
    assert first == written("b.json", "0") != written("c.json", "1")
    found = json.loads(first)
    assert [cell["gpus"] for cell in found["cells"]] == [2, 4, 2, 4]
    assert {row["scaling"] for row in found["limits"]} == {"weak", "strong"}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--gpus", "8,many"], "whole numbers"),
        (["--gpus", "0"], "from 1 to 512"),
        (["--gpus", "1024"], "from 1 to 512"),
        (["--sizes", "9b"], "names '9b'"),
        (["--reward-ms", "-1"], "milliseconds"),
        (["--reward-ms", "nan"], "milliseconds"),
        (["--seed", "-1"], "0 or more"),
        (["--plot", "a.txt"], "ends in .svg or .png"),
        (["--json", "no/such/folder/a.json"], "does not exist"),
        (["--gpus", "1", "--sizes", "70b"], "does not fit"),
    ],
    ids=lambda each: "_".join(each) if isinstance(each, list) else "",
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(
    asked: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        simulate_cluster.main(asked)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
