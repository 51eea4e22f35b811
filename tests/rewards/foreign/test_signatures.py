"""Rewards of other frameworks give through a recipe what their own framework would compute."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.rewards import RewardBatch, RewardSettings, build_rewards
from rlprompt.rewards.check.inputs import make_group
from rlprompt.rewards.foreign.signatures import ADAPTERS

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, method="strict"):
    right = float(ground_truth in solution_str)
    if method == "strict":
        return right
    return {"score": right + extra_info["index"], "acc": right, "source": data_source}

async def async_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)
"""
OPENRLHF = """
import torch

def reward_func(queries, prompts, labels):
    assert queries[0].startswith(prompts[0])
    length = len(queries[0]) - len(prompts[0]) - 1
    hit = float(labels[0] in queries[0])
    return {"rewards": torch.tensor([hit]), "scores": 0.5, "extra_logs": {"length": [length]}}
"""
VERIFIERS = """
class Rubric:
    def __init__(self, funcs, weights):
        self.funcs, self.weights = funcs, weights
        self.class_objects = {"parser": len}

def exact(completion, answer, **kwargs):
    return float(completion[-1]["content"] == answer)

async def parsed(parser, completion):
    return parser(completion[-1]["content"])

def best_of(completions, answers):
    lengths = [len(each[-1]["content"]) for each in completions]
    return [float(each == max(lengths)) for each in lengths]

rubric = Rubric([exact, parsed, best_of], [1.0, 0.0, 0.5])
plain = Rubric([exact], [2.0])
"""
ROWS = {
    "data_source": "maths",
    "reward_model": {"ground_truth": "4"},
    "extra_info": {"index": 10},
    "label": "4",
    "answer": "4",
}


def score(tmp_path: Path, source: str, name: str, adapter: Any, **options: Any) -> RewardBatch:
    columns = options.pop("columns", ROWS)
    (tmp_path / "reward.py").write_text(source)
    settings = RewardSettings(path=f"reward.py:{name}", name="r", adapter=adapter, options=options)
    runner = build_rewards([settings], tmp_path)
    groups = [make_group("2 + 2?", columns, ["4", "5"]), make_group("x", columns, ["no 4"])]
    batch = runner.score(groups, step=0)
    runner.close()
    return batch


def test_verl(tmp_path: Path) -> None:
    batch = score(tmp_path, VERL, "compute_score", "verl")
    assert batch.values["r"].tolist() == [1.0, 0.0, 1.0]


def test_verl_with_options_and_a_mapping(tmp_path: Path) -> None:
    batch = score(tmp_path, VERL, "compute_score", "verl", method="loose")
    assert batch.values["r"].tolist() == [11.0, 10.0, 11.0]
    assert batch.extras == {"acc": [1.0, 0.0, 1.0], "source": ["maths"] * 3}


def test_verl_coroutines(tmp_path: Path) -> None:
    batch = score(tmp_path, VERL, "async_score", "verl")
    assert batch.values["r"].tolist() == [1.0, 0.0, 0.0]


def test_verl_without_ground_truth(tmp_path: Path) -> None:
    columns = {"data_source": "x", "ground_truth": None}
    batch = score(tmp_path, VERL, "compute_score", "verl", columns=columns)
    assert batch.values["r"].isnan().all()
    with pytest.raises(InputError, match="neither a column 'ground_truth' nor 'reward_model'"):
        score(tmp_path, VERL, "compute_score", "verl", columns={"data_source": "x"})
    with pytest.raises(InputError, match="no column 'data_source'"):
        score(tmp_path, VERL, "compute_score", "verl", columns={"ground_truth": "4"})


def test_openrlhf(tmp_path: Path) -> None:
    batch = score(tmp_path, OPENRLHF, "reward_func", "openrlhf")
    assert batch.values["r"].tolist() == [1.0, 0.0, 1.0]
    assert batch.extras == {"length": [1, 1, 4]}


def test_openrlhf_results_may_be_bare_tensors() -> None:
    reward = ADAPTERS["openrlhf"](lambda queries, prompts, labels: torch.tensor([0.25]), {})
    assert reward(prompts=["q"], completions=["c"], log_extra=print) == [0.25]


def test_verifiers_rubric(tmp_path: Path) -> None:
    batch = score(tmp_path, VERIFIERS, "rubric", "verifiers")
    # In the first group both answers are equally long; the second has one.
    assert batch.values["r"].tolist() == [1.5, 0.5, 0.5]
    assert batch.extras["exact"] == [1.0, 0.0, 0.0]
    assert batch.extras["parsed"] == [1.0, 1.0, 4.0]


def test_verifiers_function_and_plain_rubric(tmp_path: Path) -> None:
    assert score(tmp_path, VERIFIERS, "exact", "verifiers").values["r"].tolist() == [1.0, 0.0, 0.0]
    assert score(tmp_path, VERIFIERS, "plain", "verifiers").values["r"].tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(InputError, match="a rubric takes no options"):
        score(tmp_path, VERIFIERS, "plain", "verifiers", parser=3)


def test_a_rubric_of_the_library_itself() -> None:
    """Not in the `dev` extra: see docs/log.md for the versions that this ran on."""
    verifiers = pytest.importorskip("verifiers")
    if not hasattr(verifiers, "Rubric"):
        pytest.skip("this version of verifiers has no Rubric")

    def exact(completion: Any, answer: str) -> float:
        return float(completion[-1]["content"] == answer)

    async def long(completion: Any, **kwargs: Any) -> float:
        return float(len(completion[-1]["content"]))

    def longest(completions: Any) -> list[float]:
        lengths = [len(each[-1]["content"]) for each in completions]
        return [float(length == max(lengths)) for length in lengths]

    rubric = verifiers.Rubric([exact, long, longest], [0.5, 0.0, 2.0])
    chat = [[{"role": "user", "content": "q"}]] * 3
    texts = [[{"role": "assistant", "content": text}] for text in ("4", "5", "44")]
    logged: dict[str, list[float]] = {}
    ours = asyncio.run(
        ADAPTERS["verifiers"](rubric, {})(
            prompts=chat,
            completions=texts,
            answer=["4"] * 3,
            group_index=[0, 0, 0],
            log_extra=logged.__setitem__,
        )
    )
    kept: dict[str, Any] = {"answer": "4", "info": {}, "task": "", "trajectory": [], "timing": {}}
    states = [
        {"prompt": q, "completion": text, **kept} for q, text in zip(chat, texts, strict=True)
    ]
    asyncio.run(rubric.score_group(states))
    assert ours == [state["reward"] for state in states] == [0.5, 0.0, 2.0]
    for name, values in logged.items():
        assert values == [state["metrics"][name] for state in states]


@pytest.mark.parametrize(
    ("source", "name", "adapter"),
    [
        (VERL.replace("right = float", "right = 1 / 0 or float"), "compute_score", "verl"),
        (OPENRLHF.replace("hit = float", "hit = 1 / 0 or float"), "reward_func", "openrlhf"),
        (VERIFIERS.replace("return float(", "return 1 / 0 or float("), "plain", "verifiers"),
    ],
)
def test_an_exception_is_no_silent_zero(
    tmp_path: Path, source: str, name: str, adapter: str
) -> None:
    with pytest.raises(InputError, match="raised ZeroDivisionError"):
        score(tmp_path, source, name, adapter)


def test_trl_rewards_by_name() -> None:
    trl = pytest.importorskip("trl.rewards")
    build = functools.partial(build_rewards, base_dir=Path())
    (settings,) = build([RewardSettings(path="trl:think_format_reward")]).settings
    assert settings.name == "think_format_reward"
    options = {"ngram_size": 2, "max_penalty": -0.5}
    runner = build(
        [RewardSettings(path="trl:get_repetition_penalty_reward", name="r", options=options)]
    )
    ids = [list(c.token_ids) for c in make_group("q", {}, ["a a a a"]).completions]
    direct = trl.get_repetition_penalty_reward(**options)(completion_ids=ids)
    value = runner.score([make_group("q", {}, ["a a a a"])], step=0).values["r"].tolist()
    assert value == pytest.approx(direct)
    with pytest.raises(InputError, match="TRL ships no reward 'think_format'; did you mean 'think"):
        build([RewardSettings(path="trl:think_format")])
