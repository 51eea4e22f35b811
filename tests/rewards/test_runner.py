from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings, build_rewards
from rlprompt.types import Completion, Group, Query


def make_group(
    query: str, texts: Sequence[str], columns: Mapping[str, Any] | None = None, chat: bool = True
) -> Group:
    completions = tuple(Completion((7, 8, 2), (-0.1, -0.2, -0.3), text, True) for text in texts)
    return Group(Query(({"role": "user", "content": query},), columns or {}, 0, chat), completions)


GROUPS = [
    make_group("one?", ["a", "bb"], {"gold": 1, "tag": "x"}),
    make_group("two?", ["ccc", "dddd"], {"gold": 2, "tag": "y"}),
]


def runner_of(*functions: Callable[..., Any], **fields: Any) -> RewardRunner:
    settings = [
        RewardSettings(path="x:y", name=f"r{index}", **fields) for index in range(len(functions))
    ]
    return RewardRunner(list(map(LoadedReward, settings, functions)))


def returns(output: Any) -> Callable[..., Any]:
    return lambda **kwargs: output


def test_arguments_are_those_of_trl() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0] * 4

    runner_of(spy).score(GROUPS, step=5)
    assert seen["prompts"] == [
        [{"role": "user", "content": text}] for text in ("one?", "one?", "two?", "two?")
    ]
    assert seen["completions"] == [
        [{"role": "assistant", "content": text}] for text in ("a", "bb", "ccc", "dddd")
    ]
    assert seen["completion_ids"] == [[7, 8, 2]] * 4
    assert seen["gold"] == [1, 1, 2, 2]
    assert seen["tag"] == ["x", "x", "y", "y"]
    assert seen["trainer_state"].global_step == 5
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "gold", "tag"),
        *("trainer_state", "log_extra", "log_metric"),
    }


def test_plain_queries_give_strings() -> None:
    def same(prompts: list[str], completions: list[str]) -> list[float]:
        return [
            float(prompt == completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    batch = runner_of(same).score([make_group("one?", ["one?", "b"], chat=False)], step=0)
    assert batch.total.tolist() == [1.0, 0.0]


def test_function_without_kwargs_gets_only_what_it_names() -> None:
    def short(completions: list[Any], gold: list[int]) -> list[float]:
        return [float(value) for value in gold]

    assert runner_of(short).score(GROUPS, step=0).total.tolist() == [1.0, 1.0, 2.0, 2.0]


def test_one_reward_cannot_change_the_arguments_of_another() -> None:
    def vandal(
        prompts: list[Any], completions: list[Any], gold: list[int], **_: Any
    ) -> list[float]:
        completions[0][0]["content"] = "changed"
        prompts[0][0]["content"] = "changed"
        gold.clear()
        completions.clear()
        return [0.0] * 4

    def reader(completions: list[Any], gold: list[int], **_: Any) -> list[float]:
        return [float(len(each[0]["content"])) for each in completions]

    batch = runner_of(vandal, reader).score(GROUPS, step=0)
    assert batch.values["r1"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert GROUPS[0].query.messages[0]["content"] == "one?"


def test_total_is_trls_weighted_nansum() -> None:
    first = [1.0, None, None, 4.0]
    second = [10.0, 20.0, None, None]
    settings = [
        RewardSettings(path="x:y", name="a", weight=2.0),
        RewardSettings(path="x:y", name="b", weight=-0.5),
    ]
    runner = RewardRunner(list(map(LoadedReward, settings, [returns(first), returns(second)])))
    batch = runner.score(GROUPS, step=0)
    table = torch.tensor([[1.0, 10.0], [math.nan, 20.0], [math.nan, math.nan], [4.0, math.nan]])
    expected = (table * torch.tensor([2.0, -0.5])).nansum(dim=1)  # what GRPOTrainer computes
    expected[table.isnan().all(dim=1)] = math.nan
    torch.testing.assert_close(batch.total, expected, equal_nan=True, rtol=0, atol=0)
    assert batch.total.dtype == torch.float32
    torch.testing.assert_close(batch.values["a"], table[:, 0], equal_nan=True)
    assert batch.weights == {"a": 2.0, "b": -0.5}
    assert batch.roles == {"a": "score", "b": "score"}


def gated(scores: list[Any], gate: list[Any], floor: float = -1.0) -> list[float]:
    settings = [
        RewardSettings(path="x:y", name="score"),
        RewardSettings(path="x:y", name="gate", role="gate", gate_floor=floor),
        RewardSettings(path="x:y", name="watch", role="metric"),
    ]
    functions = [returns(scores), returns(gate), returns([100.0] * 4)]
    batch = RewardRunner(list(map(LoadedReward, settings, functions))).score(GROUPS, step=0)
    assert batch.values["watch"].tolist() == [100.0] * 4
    return [round(value, 4) for value in batch.total.tolist()]


def test_gate_lowers_to_its_floor_and_never_raises() -> None:
    assert gated([0.9, 0.9, 0.9, -5.0], [1.0, 0.49, 0.5, 0.0]) == [0.9, -1.0, 0.9, -5.0]
    assert gated([0.9, 0.9, 0.9, -5.0], [True, False, True, False], -9.0)[1::2] == [-9.0, -9.0]


def test_gate_that_returns_none_abstains_and_a_veto_needs_no_score() -> None:
    total = gated([0.9, None, None, None], [None, None, 1.0, 0.0])
    assert total[0] == 0.9
    assert math.isnan(total[1])
    assert math.isnan(total[2])
    assert total[3] == -1.0


def test_veto_rate_is_logged() -> None:
    settings = [
        RewardSettings(path="x:y", name="score"),
        RewardSettings(path="x:y", name="gate", role="gate"),
    ]
    functions = [returns([1.0] * 4), returns([0.0, 1.0, None, 1.0])]
    batch = RewardRunner(list(map(LoadedReward, settings, functions))).score(GROUPS, step=0)
    assert batch.metrics["rewards/gate/veto_rate"] == pytest.approx(1 / 3)


def test_metrics_hold_mean_std_seconds_and_failures() -> None:
    batch = runner_of(returns([1.0, 2.0, None, 6.0]), returns([None] * 4)).score(GROUPS, step=0)
    assert batch.metrics["rewards/r0/mean"] == pytest.approx(3.0)
    assert batch.metrics["rewards/r0/std"] == pytest.approx(torch.tensor([1.0, 2, 6]).std().item())
    assert batch.metrics["rewards/r0/seconds"] >= 0.0
    assert batch.metrics["rewards/r0/failures"] == 0.0
    assert "rewards/r1/mean" not in batch.metrics
    assert all(math.isfinite(value) for value in batch.metrics.values())
    assert batch.errors == []


def test_log_extra_and_log_metric() -> None:
    def logging_reward(log_extra: Any, log_metric: Any, completions: list[Any], **_: Any) -> Any:
        log_extra("half", ["a", "b"])
        log_extra("half", ["c", "d"])
        log_metric("seen", 1)
        log_metric("seen", 3)
        return [1.0] * len(completions)

    batch = runner_of(logging_reward, logging_reward).score(GROUPS, step=0)
    assert batch.extras == {"half": ["a", "b", "c", "d"], "r1.half": ["a", "b", "c", "d"]}
    assert batch.metrics["seen"] == 2.0


@pytest.mark.parametrize(
    "output",
    [
        (1, 0, True, None),
        [torch.tensor(1.0), torch.tensor(0, dtype=torch.int64), torch.tensor(True), None],
        torch.tensor([1.0, 0.0, 1.0, 0.5]),
    ],
)
def test_numbers_of_other_kinds_become_floats(output: Any) -> None:
    batch = runner_of(returns(output)).score(GROUPS, step=0)
    assert batch.total.tolist()[:3] == [1.0, 0.0, 1.0]


def test_numpy_values_become_floats() -> None:
    numpy = pytest.importorskip("numpy")
    batch = runner_of(returns(numpy.array([0.25] * 4)), returns([numpy.float32(0.5)] * 4)).score(
        GROUPS, step=0
    )
    assert batch.total.tolist() == [0.75] * 4


def broken(**_: Any) -> list[float]:
    table: dict[str, float] = {}
    return [table["missing"]]


def bad_extra(log_extra: Any, **_: Any) -> list[float]:
    log_extra("note", ["only one"])
    return [0.0] * 4


def bad_metric(log_metric: Any, **_: Any) -> list[float]:
    log_metric("speed", "fast")
    return [0.0] * 4


def taken_metric(log_metric: Any, **_: Any) -> list[float]:
    log_metric("rewards/r0/mean", 1.0)
    return [0.0] * 4


def wordy(**_: Any) -> list[float]:
    raise RuntimeError("first line\nsecond line\n" + "x" * 5000)


def leaves(**_: Any) -> list[float]:
    raise SystemExit(3)


async def coroutine() -> list[float]:
    return [0.0] * 4


FAILURES: list[tuple[Callable[..., Any], str, list[str]]] = [
    (
        returns([0.0] * 3),
        "values",
        ["reward 'r0' returned 3 values for 4 completions (first query: 'one?')", "None per"],
    ),
    (
        returns([0.0, math.nan, 0.0, 0.0]),
        "values",
        ["returned nan for completion 2 of 4 (query 'one?' with completion 'bb')", "or None"],
    ),
    (returns([0.0, 0.0, math.inf, 0.0]), "values", ["returned inf for completion 3 of 4"]),
    (returns([0.0, 0.0, 1e300, 0.0]), "values", ["returned 1e+300 for completion 3"]),
    (returns([0.0, "1.0", 0.0, 0.0]), "values", ["returned '1.0' for completion 2 of 4"]),
    (returns([[0.0], 0.0, 0.0, 0.0]), "values", ["returned [0.0] for completion 1 of 4"]),
    (returns({"a": 1.0}), "values", ["returned a value of type dict, not a list"]),
    (returns(None), "values", ["returned a value of type NoneType, not a list"]),
    (returns(0.5), "values", ["returned a value of type float, not a list"]),
    (returns("0000"), "values", ["returned a value of type str, not a list"]),
    (
        lambda **_: (0.0 for _ in range(4)),
        "values",
        ["returned a value of type generator, not a list"],
    ),
    (
        lambda **_: coroutine(),
        "values",
        ["returned a value of type coroutine", "define it with async def"],
    ),
    (returns(torch.zeros(4, 1)), "values", ["returned a value of type Tensor, not a list"]),
    (
        broken,
        "exception",
        ["raised KeyError: 'missing' at", "test_runner.py:", '(return [table["missing"]])', "'a'"],
    ),
    (wordy, "exception", ["raised RuntimeError: first line second line xxx"]),
    (leaves, "exception", ["raised SystemExit: 3"]),
    (bad_extra, "values", ["logged 1 values in column 'note' for 4 completions"]),
    (bad_metric, "values", ["logged 'fast' as metric 'speed'"]),
    (taken_metric, "values", ["names under rewards/ are taken"]),
]


@pytest.mark.parametrize(("function", "kind", "parts"), FAILURES)
def test_failure_raises_one_sentence(
    function: Callable[..., Any], kind: str, parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        runner_of(function).score(GROUPS, step=0)
    message = str(caught.value)
    assert message.startswith("reward 'r0' ")
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(("function", "kind", "parts"), FAILURES)
def test_failure_is_skipped_counted_and_logged(
    function: Callable[..., Any], kind: str, parts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    runner = runner_of(function, returns([1.0, 2.0, 3.0, 4.0]), on_error="skip")
    with caplog.at_level(logging.WARNING):
        batch = runner.score(GROUPS, step=0)
    assert batch.values["r0"].isnan().all()
    assert batch.total.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert batch.metrics["rewards/r0/failures"] == 1.0
    assert batch.metrics["rewards/r1/failures"] == 0.0
    assert batch.extras == {}
    (failure,) = batch.errors
    assert (failure.name, failure.kind) == ("r0", kind)
    assert all(part in failure.message for part in parts), failure.message
    assert failure.message in caplog.text


def test_long_texts_are_shortened_in_messages() -> None:
    groups = [make_group("q" * 5000, ["line\n" * 5000])]
    with pytest.raises(InputError) as caught:
        runner_of(broken).score(groups, step=0)
    assert len(str(caught.value)) < 700
    assert "line line" in str(caught.value)


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra"])
def test_column_with_a_reserved_name(column: str) -> None:
    groups = [make_group("one?", ["a"], {column: 1})]
    with pytest.raises(InputError, match=f"column '{column}' has the name of a keyword"):
        runner_of(returns([0.0])).score(groups, step=0)


def test_columns_that_trl_drops_are_dropped_and_missing_cells_are_none() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [0.0, 0.0]

    groups = [
        make_group("one?", ["a"], {"completion": "gold", "prompt": "p", "left": 1}),
        make_group("two?", ["b"], {"right": 2}),
    ]
    runner_of(spy).score(groups, step=0)
    assert "completion" not in seen
    assert "prompt" not in seen
    assert seen["left"] == [1, None]
    assert seen["right"] == [None, 2]


def test_missing_column_is_named_even_under_skip() -> None:
    def needs(completions: list[Any], solution: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(InputError, match=r"needs the dataset column 'solution', .* gold, tag"):
        runner_of(needs, on_error="skip").score(GROUPS, step=0)


def test_positional_only_parameter_is_refused() -> None:
    def old(completions: list[Any], /) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(InputError, match="takes 'completions' by position only"):
        runner_of(old).score(GROUPS, step=0)


def test_option_and_column_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("def reward(completions, gold): return [1.0] * 4\n")
    settings = RewardSettings(path="r.py:reward", options={"gold": 3})
    with pytest.raises(InputError, match="'gold' is both an option and a dataset column"):
        build_rewards([settings], tmp_path).score(GROUPS, step=0)


def test_input_error_of_a_reward_is_raised_even_under_skip() -> None:
    def picky(**_: Any) -> list[float]:
        raise InputError("column 'tag' holds 'x'; write 'refuse' or 'answer'")

    with pytest.raises(InputError, match=r"^reward 'r0': column 'tag' holds 'x'"):
        runner_of(picky, on_error="skip").score(GROUPS, step=0)


def test_two_rewards_of_one_name_and_no_score_are_refused() -> None:
    same = RewardSettings(path="builtin:length")
    with pytest.raises(InputError, match="2 rewards are named 'length'"):
        RewardRunner([LoadedReward(same, returns([]))] * 2)
    with pytest.raises(InputError, match="no reward has role: score"):
        RewardRunner([LoadedReward(RewardSettings(path="x:y", role="metric"), returns([]))])
    with pytest.raises(InputError, match="no reward has role: score"):
        build_rewards([], Path())


def test_empty_batch_calls_nothing() -> None:
    batch = runner_of(broken).score([], step=0)
    assert batch.total.shape == (0,)
    assert batch.metrics == {}


def test_groups_of_different_sizes_keep_their_order() -> None:
    def length(completions: list[Any], **_: Any) -> list[float]:
        return [float(len(each[0]["content"])) for each in completions]

    groups = [make_group("a", ["1", "22", "333"]), make_group("b", ["4444"]), make_group("c", [])]
    assert runner_of(length).score(groups, step=0).total.tolist() == [1.0, 2.0, 3.0, 4.0]
