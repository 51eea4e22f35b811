"""Rewards spread over ranks give what one rank gives; ranks are threads that meet."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.rewards import LoadedReward, RewardBatch, RewardRunner, RewardSettings, build_rewards
from rlprompt.rewards.base import RewardFailure
from rlprompt.rewards.sharing import Part, group_rows, joined
from rlprompt.types import Completion, Group, Query
from tests.fixtures.thread_ranks import ThreadRanks, on_ranks, outcomes

SIZES = (2, 3, 5)


def groups_of(*counts: int) -> list[Group]:
    """Groups whose completions have different lengths; only the second query has a column."""
    made = []
    for place, count in enumerate(counts):
        texts = ["ab" * (1 + place + i * i) for i in range(count)]
        columns = {"gold": place} if place == 1 else {}
        query = Query(({"role": "user", "content": f"query {place}?"},), columns, place)
        made.append(Group(query, tuple(Completion((5, 2), (0.0, 0.0), t, True) for t in texts)))
    return made


def length(completions: Sequence[Any], log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
    values = [float(len(each[0]["content"])) for each in completions]
    log_extra("text", [each[0]["content"] for each in completions])
    if max(values) > 20:
        log_extra("long", [value > 20 for value in values])
    log_metric("mean_length", sum(values) / len(values))
    for value in values:
        if value > 4:
            log_metric("above_four", value)
    return values


def place_in_group(completions: Sequence[Any], group_index: list[int]) -> list[float | None]:
    lengths = [len(each[0]["content"]) for each in completions]
    longest: dict[int, int] = {}
    for group, value in zip(group_index, lengths, strict=True):
        longest[group] = max(value, longest.get(group, 0))
    values = zip(lengths, group_index, strict=True)
    return [None if group == 2 else value / longest[group] + group for value, group in values]


async def golden(gold: list[int | None], **_: Any) -> list[float | None]:
    await asyncio.sleep(0)
    return [None if each is None else each + 0.5 for each in gold]


class WholeBatch:
    """Compares across the batch, so it needs all of it."""

    on_first_rank = True

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
        self.seen.append(len(completions))
        lengths = [len(each[0]["content"]) for each in completions]
        return [value - sum(lengths) / len(lengths) for value in lengths]


def runner_of(*rewards: tuple[Callable[..., Any], dict[str, Any]]) -> RewardRunner:
    settings = [
        RewardSettings(**{"path": "x:y", "name": f"r{place}", **fields})
        for place, (_, fields) in enumerate(rewards)
    ]
    functions = [function for function, _ in rewards]
    return RewardRunner(list(map(LoadedReward, settings, functions)))


def all_kinds() -> RewardRunner:
    return runner_of(
        (length, {"weight": 0.5, "normalise": "batch"}),
        (place_in_group, {"normalise": "group"}),
        (golden, {"role": "metric"}),
        (WholeBatch(), {"normalise": "running"}),
        (lambda completions, **_: [0.0] * 3 + [1.0] * (len(completions) - 3),
         {"role": "gate", "ranks": "first"}),
        (length, {"role": "constraint", "limit": 3.0, "name": "limited"}),
    )  # fmt: skip


def score_on(ranks: ThreadRanks | None, groups: list[Group]) -> tuple[RewardBatch, torch.Tensor]:
    runner = all_kinds()
    if ranks is not None:
        runner.spread(ranks)
    batch = runner.score(groups, step=3)
    trained = runner.training_rewards(batch)
    runner.close()
    return batch, trained


@pytest.mark.parametrize("counts", [(4, 4, 4, 4), (3, 1, 5, 2)], ids=["even", "uneven"])
@pytest.mark.parametrize("size", SIZES)
def test_ranks_give_the_batch_of_one_rank(size: int, counts: tuple[int, ...]) -> None:
    groups = groups_of(*counts)
    alone, trained = score_on(None, groups)
    assert alone.metrics["mean_length"] > 0 and alone.metrics["above_four"] > 4
    for batch, rewards in on_ranks(size, lambda ranks: score_on(ranks, groups)):
        torch.testing.assert_close(rewards, trained, rtol=0, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(batch.total, alone.total, rtol=0, atol=0, equal_nan=True)
        for own, expected in ((batch.values, alone.values), (batch.costs, alone.costs)):
            assert own.keys() == expected.keys()
            for name in own:
                torch.testing.assert_close(
                    own[name], expected[name], rtol=0, atol=0, equal_nan=True
                )
        assert list(batch.metrics) == list(alone.metrics)
        for name, value in alone.metrics.items():
            if not name.endswith("/seconds"):
                assert batch.metrics[name] == pytest.approx(value, rel=1e-12), name
        assert (batch.group_index, batch.logged) == (alone.group_index, alone.logged)
        assert batch.extras["text"] == alone.extras["text"]
        known = [value or False for value in batch.extras["long"]]  # a rank without one logs none
        assert known == alone.extras["long"]


def test_a_reward_for_the_first_rank_is_called_once_with_everything() -> None:
    calls: list[tuple[int, int, bool, bool]] = []
    lock = threading.Lock()

    def run(ranks: ThreadRanks) -> list[int]:
        whole = WholeBatch()

        def spread(completions: Sequence[Any], trainer_state: Any, **_: Any) -> list[float]:
            state = trainer_state
            with lock:
                flags = (state.is_world_process_zero, state.is_local_process_zero)
                calls.append((ranks.rank, len(completions), *flags))
            return [1.0] * len(completions)

        runner = runner_of((whole, {}), (spread, {}))
        runner.spread(ranks)
        runner.score(groups_of(2, 2, 2, 2), step=0)
        runner.close()
        return whole.seen

    assert on_ranks(3, run) == [[8], [], []]
    assert sorted(calls) == [(0, 2, True, True), (1, 2, False, False), (2, 4, False, False)]


def failing_on_last(ranks: ThreadRanks, how: Callable[[], Any], **fields: Any) -> RewardBatch:
    def fails(completions: Sequence[Any], **_: Any) -> list[float]:
        if ranks.rank == ranks.size - 1:
            how()
        return [1.0] * len(completions)

    if ranks.rank < ranks.size - 1:
        fields = {**fields, "timeout": 60}  # a loaded machine is no failure
    runner = runner_of((fails, fields), (length, {}))
    runner.spread(ranks)
    try:
        return runner.score(groups_of(2, 2, 2), step=0)
    finally:
        runner.close()


def broken() -> None:
    raise ZeroDivisionError("no luck")


def test_a_failure_on_one_rank_ends_all_with_its_sentence() -> None:
    found = outcomes(3, lambda ranks: failing_on_last(ranks, broken))
    assert len({str(each) for each in found}) == 1
    for each in found:
        assert isinstance(each, InputError)
        assert "ZeroDivisionError: no luck" in str(each) and "(on rank 2 of 3)" in str(each)


@pytest.mark.parametrize("how", ["exception", "timeout"])
def test_a_failure_that_is_skipped_leaves_the_reward_out_of_the_whole_batch(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    released = threading.Event()
    hang = broken if how == "exception" else lambda: released.wait(60)
    fields: dict[str, Any] = {"on_error": "skip", "timeout": 60 if how == "exception" else 2.0}
    with caplog.at_level(logging.WARNING):
        found = on_ranks(3, lambda ranks: failing_on_last(ranks, hang, **fields))
    released.set()
    for batch in found:
        assert batch.values["r0"].isnan().all() and not batch.values["r1"].isnan().any()
        assert batch.metrics["rewards/r0/failures"] == 1.0
        assert batch.metrics["rewards/r1/failures"] == 0.0
        (failure,) = batch.errors
        assert failure.kind == how and failure.message.endswith("(on rank 2 of 3)")
    assert "skipped for this batch" in caplog.text


def test_an_error_of_one_rank_comes_before_what_all_ranks_do_together() -> None:
    called: list[int] = []

    class Sharded:
        needs_all_ranks = True

        def __call__(self, completions: Sequence[Any], **_: Any) -> list[float]:
            called.append(len(completions))
            return [1.0] * len(completions)

    def run(ranks: ThreadRanks, works: bool) -> RewardBatch:
        def fails(completions: Sequence[Any], **_: Any) -> list[float]:
            return [1.0 if works or ranks.rank else 1 / 0] * len(completions)

        runner = runner_of((Sharded(), {"timeout": None}), (fails, {}))
        runner.spread(ranks)
        return runner.score(groups_of(2, 2), step=0)

    assert all(isinstance(each, InputError) for each in outcomes(2, lambda r: run(r, False)))
    assert called == []
    on_ranks(2, lambda ranks: run(ranks, True))
    assert called == [4, 4]


@pytest.mark.parametrize("asked", ["first", "all"])
def test_a_model_in_shards_cannot_be_asked_by_some_ranks(asked: str) -> None:
    class Sharded:
        needs_all_ranks = True

    class Judge:
        needs_base = True

    for reward, shared in ((Sharded(), False), (Judge(), True)):
        runner = runner_of((reward, {"ranks": asked}))  # type: ignore[arg-type]  # never called
        with pytest.raises(InputError, match=f"has ranks: {asked}, but its model is in shards"):
            runner.spread(ThreadRanks(), base_is_shared=shared)


def test_only_the_first_rank_loads_a_reward_that_is_for_it(tmp_path: Path) -> None:
    (tmp_path / "licence.py").write_text(
        "from pathlib import Path\n"
        "with open(Path(__file__).parent / 'taken', 'a') as note:\n    note.write('x')\n"
        "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"
    )
    settings = RewardSettings(path="licence.py", ranks="first")

    def run(ranks: ThreadRanks) -> list[float]:
        runner = build_rewards([settings], tmp_path, ranks=ranks)
        scored = runner.score(groups_of(2, 1), step=0).total.tolist()
        runner.close()
        return scored

    assert on_ranks(3, run) == [[1.0] * 3] * 3
    assert (tmp_path / "taken").read_text() == "x"
    missing = RewardSettings(path="nowhere.py", ranks="first")
    found = outcomes(2, lambda ranks: build_rewards([missing], tmp_path, ranks=ranks))
    assert all(isinstance(each, InputError) and "nowhere.py" in str(each) for each in found)


def test_a_reward_that_draws_at_random_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def noisy(completions: Sequence[Any], **_: Any) -> list[float]:
        return [random.random() for _ in completions]

    def run(ranks: ThreadRanks) -> None:
        runner = runner_of((noisy, {}))
        runner.spread(ranks)
        for _ in range(2):
            runner.score(groups_of(1, 1), step=0)
        runner.close()

    with caplog.at_level(logging.WARNING):
        on_ranks(2, run)
    told = [line for line in caplog.messages if "draws from a generator" in line]
    assert 1 <= len(told) <= 2 and "ranks: first" in told[0]
    caplog.clear()
    alone = runner_of((noisy, {}))
    alone.score(groups_of(1), step=0)
    alone.close()
    assert not caplog.messages


def test_parts_become_one_call() -> None:
    one = Part(1, [1.0], 2.0, {"a": ["x"]}, {"m": [4.0], "n": [1.0, 2.0]})
    two = Part(3, [2.0, math.nan, 3.0], 1.0, {}, {"m": [8.0], "n": [6.0]})
    whole = joined([one, two])
    assert (whole.count, whole.seconds) == (4, 2.0)
    assert str(whole.values) == "[1.0, 2.0, nan, 3.0]"
    assert whole.extras == {"a": ["x", None, None, None]}
    assert whole.numbers == {"m": [7.0], "n": [1.0, 2.0, 6.0]}
    failure = RewardFailure("r", "values", "no")
    assert joined([one, Part(3, failure, 1.0)]) == Part(4, failure, 2.0)


def test_completions_of_groups_are_found() -> None:
    index = [0, 0, 2, 2, 2, 3]
    assert group_rows(index, slice(0, 1)) == slice(0, 2)
    assert group_rows(index, slice(1, 3)) == slice(2, 5)
    assert group_rows(index, slice(4, 9)) == slice(6, 6)
