"""A path that names a file alone: its reward, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import NAMED, RewardSettings, load_reward

PLAIN = (
    "def reward(completions, **kwargs):\n    return [float(len(text)) for text in completions]\n"
)
CLASS = """
class Long:
    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def __call__(self, completions, **kwargs):
        return [len(text) + self.bonus for text in completions]
"""
HELPERS = """
import math
from pathlib import Path

def clean(text):
    return text.strip()

LIMIT = 3
"""


def load(folder: Path, source: str, **settings: Any) -> Any:
    (folder / "my_reward.py").write_text(source)
    return load_reward(RewardSettings(path="my_reward.py", **settings), folder, NAMED)


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,
        HELPERS + PLAIN,
        HELPERS + PLAIN.replace("reward", "brevity"),
        PLAIN + PLAIN.replace("reward", "other"),
        HELPERS + CLASS,
        CLASS + "reward = Long()\n",
        PLAIN.replace("completions, **kwargs", "**kwargs").replace("in comp", "in kwargs['comp")
        .replace("completions]", "completions']]"),
        PLAIN.replace("def ", "async def "),
    ],
    ids=["reward", "helpers", "only", "first", "class", "instance", "kwargs", "async"],
)  # fmt: skip
def test_the_reward_of_a_file(source: str, tmp_path: Path) -> None:
    reward = load(tmp_path, source)
    if "async def" not in source:
        assert reward(completions=["abc"]) == [3.0]
    assert callable(reward)


def test_options_and_the_name() -> None:
    assert RewardSettings(path="my_reward.py").name == "my_reward"
    assert RewardSettings(path="../some.dir/my_reward.py").name == "my_reward"
    assert RewardSettings(path="/a/b/concise.py", name="mine").name == "mine"


def test_options_reach_the_only_class(tmp_path: Path) -> None:
    assert load(tmp_path, HELPERS + CLASS, options={"bonus": 2.0})(completions=["abc"]) == [5.0]


@pytest.mark.parametrize(
    ("adapter", "source"),
    [
        (
            "verl",
            HELPERS + "def compute_score(data_source, solution_str): return 1\n",
        ),
        ("verl", HELPERS + "def mine(data_source, solution_str): return 1\n"),
        ("openrlhf", HELPERS + "def reward_func(queries, prompts, labels): return [1.0]\n"),
        ("verifiers", HELPERS + "def exact(completion, answer): return 1.0\n"),
    ],
    ids=["verl", "verl_only", "openrlhf", "verifiers"],
)
def test_rewards_of_other_frameworks(adapter: str, source: str, tmp_path: Path) -> None:
    assert callable(load(tmp_path, source, adapter=adapter))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (HELPERS, "holds no 'reward' and nothing else that can be a reward, only clean"),
        ("", "holds no 'reward' and nothing else that can be a reward; define it"),
        (
            PLAIN.replace("reward", "one") + PLAIN.replace("reward", "two"),
            r"holds several rewards \(one, two\).*write my_reward.py:NAME",
        ),
        ("reward = 3\n", "is of type int, which cannot be called"),
        ("import absent_package\n", "importing .* raised ModuleNotFoundError"),
    ],
    ids=["helpers", "empty", "two", "number", "import"],
)
def test_what_is_no_reward_is_one_sentence(source: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        load(tmp_path, source)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_reward(RewardSettings(path="absent.py"), tmp_path, NAMED)
