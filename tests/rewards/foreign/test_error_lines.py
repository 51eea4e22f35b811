"""An error of a reward names the user's line, whatever stands between us and the user's code."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import RewardSettings
from rlprompt.rewards.check.inputs import make_group

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info):
    return 1 / 0  # HERE
"""
ASYNC_VERL = VERL.replace("def ", "async def ")
WRONG_VERL = """
def compute_score(solution, truth):  # HERE
    return 1.0
"""
OPENRLHF = """
def helper(text):
    return len(None)  # HERE

def reward_func(queries, prompts, labels):
    return [helper(text) for text in queries]
"""
WRONG_OPENRLHF = """
def reward_func(queries):  # HERE
    return [1.0]
"""
VERIFIERS = """
def fine(completion, **kwargs):
    return 1.0

def wrong(completion, answer):
    raise ValueError("no")  # HERE

class Rubric:
    funcs = [fine, wrong]
    weights = [1.0, 1.0]

rubric = Rubric()
"""
NO_NUMBER = VERIFIERS.replace('raise ValueError("no")  # HERE', 'return "many"').replace(
    "def wrong(completion, answer):", "def wrong(completion, answer):  # HERE"
)
NEEDS_MORE = VERIFIERS.replace(
    'def wrong(completion, answer):\n    raise ValueError("no")  # HERE',
    "def wrong(completion, environment):  # HERE\n    return 1.0",
)
DECORATED = """
import functools

def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

@logged
def reward(completions, **kwargs):
    return [text.missing for text in completions]  # HERE
"""
IN_A_LIBRARY = """
import json

class Reward:
    def __call__(self, completions, **kwargs):
        return [json.loads(text) for text in completions]  # HERE

reward = Reward()
"""
CASES = {
    "verl": (VERL, "verl"),
    "async_verl": (ASYNC_VERL, "verl"),
    "wrong_verl": (WRONG_VERL, "verl"),
    "openrlhf": (OPENRLHF, "openrlhf"),
    "wrong_openrlhf": (WRONG_OPENRLHF, "openrlhf"),
    "verifiers": (VERIFIERS, "verifiers"),
    "no_number": (NO_NUMBER, "verifiers"),
    "needs_more": (NEEDS_MORE, "verifiers"),
    "decorated": (DECORATED, "trl"),
    "in_a_library": (IN_A_LIBRARY, "trl"),
}


ISOLATED = ["verl", "wrong_openrlhf"]  # a process each


@pytest.mark.parametrize(
    ("case", "isolated"),
    [(case, False) for case in CASES] + [(case, True) for case in ISOLATED],
    ids=[*CASES, *(f"{case}_isolated" for case in ISOLATED)],
)
def test_the_line_is_the_users(case: str, isolated: bool, tmp_path: Path) -> None:
    source, adapter = CASES[case]
    file = tmp_path / "mine.py"
    file.write_text(source)
    line = 1 + [("# HERE" in each) for each in source.split("\n")].index(True)
    settings = RewardSettings.model_validate(
        {"path": "mine.py", "adapter": adapter, "name": "r", "isolation": {} if isolated else None}
    )
    runner = build_rewards([settings], tmp_path)
    columns = {"data_source": "d", "ground_truth": "1", "answer": "1"}
    try:
        with pytest.raises(InputError) as caught:
            runner.score([make_group("q", columns, ["a", "b"])], step=0)
    finally:
        runner.close()
    told = str(caught.value)
    assert f"{file}:{line} (" in told, told
    assert "rlprompt/rewards" not in told
