"""Instructions that a program can check (IFEval). Copy this file, name yours in a recipe.

    rewards:
      - {path: ../reward_models/task/instructions.py:reward}

The dataset has IFEval's columns (Zhou et al., 2023, arXiv 2311.07911): `instruction_id_list`, such
as ["punctuation:no_comma"], and `kwargs`, one mapping per instruction. The checkers are those of
the package if-verifiable (`pip install 'rlprompt[rules]'`).

    value = share of the row's instructions that the answer follows                  in [0, 1]

`loose: true` also accepts an answer whose first or last line, or whose asterisks, are in the way.
An empty answer gets 0. Following the instruction is all that is checked: an answer about nothing
can follow it, so add a reward for the content.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from rlprompt.errors import InputError
from rlprompt.rewards import Example
from rlprompt.rewards.rules.text import message_texts

REQUIRES = "if_verifiable"
MAX_CHARACTERS = 8000


def reward(
    prompts: list[Any],
    completions: list[Any],
    instruction_id_list: list[Any],
    loose: bool = False,
    **columns: Any,
) -> list[float | None]:
    """One value in [0, 1] per completion, None where the row has no instructions."""
    details = columns.get("kwargs") or [None] * len(completions)
    rows = zip(
        message_texts(prompts),
        message_texts(completions),
        instruction_id_list,
        details,
        strict=True,
    )
    return [_score(query, text, ids, each, loose) for query, text, ids, each in rows]


def _score(query: str, text: str, ids: Any, details: Any, loose: bool) -> float | None:
    if ids is None or (isinstance(ids, Sequence) and not ids):
        return None
    evaluate, registry = _checkers()
    if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
        raise InputError(f"column 'instruction_id_list' holds {ids!r}; write a list of names")
    for each in ids:
        if each not in registry:
            raise InputError(f"there is no instruction {each!r}; choose from {', '.join(registry)}")
    given = details if details is not None else [{}] * len(ids)
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise InputError(f"column 'kwargs' holds {details!r}; write a list of mappings")
    if len(given) != len(ids):
        raise InputError(f"{len(ids)} instructions have {len(given)} kwargs; give one for each")
    try:
        _, scores = evaluate(text[:MAX_CHARACTERS], ids, given, query, registry)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"instructions {ids} do not take {given}: {error}") from error
    return float(scores.partial_loose if loose else scores.partial_strict)


@functools.cache
def _checkers() -> tuple[Any, Mapping[str, Any]]:
    try:
        import langdetect
        from if_verifiable.common import evaluate_instructions
        from if_verifiable.ifeval import INSTRUCTION_DICT
    except ImportError as error:
        raise InputError(
            "instructions needs the package if-verifiable; run `pip install 'rlprompt[rules]'`"
        ) from error
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return evaluate_instructions, INSTRUCTION_DICT


_QUERY = "Describe the sea in lower case, without commas, and mention salt."
_ROW = {
    "instruction_id_list": [
        "punctuation:no_comma",
        "keywords:existence",
        "change_case:english_lowercase",
    ],
    "kwargs": [{}, {"keywords": ["salt"]}, {}],
}
EXAMPLES = [
    Example(_QUERY, "the sea is wide and full of salt and fish.", True, 1.0, columns=_ROW),
    Example(_QUERY, "the sea is wide, full of salt and fish.", False, 0.6, 0.7, columns=_ROW),
    Example(_QUERY, "The Sea is wide, and cold.", False, high=0.0, columns=_ROW),
    Example(_QUERY, "", False, high=0.0, columns=_ROW),
]
