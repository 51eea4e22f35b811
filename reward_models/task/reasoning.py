"""Puzzles with answers that a program can verify. Copy this file, name yours in a recipe.

    rewards:
      - {path: ../reward_models/task/reasoning.py:reward}

Queries are made by the package reasoning-gym (`pip install 'rlprompt[rules]'`), for example

    python experiments/make_reasoning_data.py chain_sum --size 200 --output sums.jsonl

whose rows have the columns `task` (the generator's name), `answer` and `metadata`. The answer given
is what stands in <answer>...</answer>, else after the last "answer is" or "answer:", else the last
line; the generator's own rule scores it.

    value = score of the answer given, 0 when it is empty                            in [0, 1]
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts

REQUIRES = "reasoning_gym"
MAX_CHARACTERS = 4000
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_STATED = re.compile(r"answer(?: is|:)\s*([^\n]+)", re.IGNORECASE)


def reward(
    completions: list[Any], task: list[Any], answer: list[Any], metadata: list[Any], **kwargs: Any
) -> list[float | None]:
    """One value in [0, 1] per completion, None where the row has no task."""
    rows = zip(message_texts(completions), task, answer, metadata, strict=True)
    return [None if name is None else score(text, name, *rest) for text, name, *rest in rows]


def score(text: str, task: Any, answer: Any, metadata: Any) -> float:
    """The value of one completion."""
    if isinstance(metadata, str):
        metadata = _parse(metadata)
    if not isinstance(task, str) or not isinstance(answer, str) or not isinstance(metadata, dict):
        raise InputError(
            "columns 'task' and 'answer' must hold texts and 'metadata' a mapping; make the rows "
            "with experiments/make_reasoning_data.py"
        )
    given = given_answer(text)
    if not given:
        return 0.0
    try:
        value = _scorer(task)(given, {"answer": answer, "metadata": metadata})
    except (KeyError, TypeError) as error:
        raise InputError(f"the metadata of a row is not of task {task!r}: {error!r}") from error
    return min(1.0, max(0.0, float(value)))


def given_answer(text: str) -> str:
    """What a text gives as its answer; empty when it gives none."""
    tail = text[-MAX_CHARACTERS:].strip()
    for pattern in (_TAG, _STATED):
        found = pattern.findall(tail)
        if found:
            return str(found[-1]).strip().strip("*$").rstrip(".")
    return tail.rsplit("\n", 1)[-1].strip().rstrip(".")


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


@functools.cache
def _scorer(task: str) -> Callable[[str, Mapping[str, Any]], float]:
    try:
        import reasoning_gym
    except ImportError as error:
        raise InputError(
            "reasoning needs the package reasoning-gym; run `pip install 'rlprompt[rules]'`"
        ) from error
    try:
        found: Callable[[str, Mapping[str, Any]], float] = reasoning_gym.get_score_answer_fn(task)
    except ValueError as error:
        raise InputError(f"reasoning-gym has no task {task!r}; correct the row") from error
    return found


_QUERY = "State the final answer to the following arithmetic problem: 57 + 87 + 70 ="
_ROW = {"task": "chain_sum", "answer": "214", "metadata": {"expression": "57 + 87 + 70"}}
EXAMPLES = [
    Example(_QUERY, "214", True, 1.0, columns=_ROW),
    Example(_QUERY, "57 + 87 = 144, so\n<answer>214</answer>", True, 1.0, columns=_ROW),
    Example(_QUERY, "The answer is 214.", True, 1.0, columns=_ROW),
    Example(_QUERY, "The answer is 215.", False, high=0.1, columns=_ROW),
    Example(_QUERY, "214 or 215 or 216 or 217 or 218", False, high=0.2, columns=_ROW),
    Example(_QUERY, "", False, high=0.0, columns=_ROW),
]
