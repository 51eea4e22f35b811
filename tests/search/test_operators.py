"""The choice of an operator: by shares exactly, by what helped in the long run."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from rlprompt.search.operators import OperatorChoice


def test_shares_are_kept() -> None:
    choice = OperatorChoice(["a", "b"], {"a": 3.0, "b": 1.0, "c": 9.0})
    draw = random.Random(0)
    drawn = Counter(choice.draw(draw) for _ in range(4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03) and set(drawn) == {"a", "b"}


def test_what_helps_is_taken_more_often() -> None:
    chances = {"a": 0.1, "b": 0.6, "c": 0.1}
    choice, draw = OperatorChoice(list(chances)), random.Random(0)
    drawn = []
    for _ in range(400):
        drawn.append(choice.draw(draw))
        choice.credit(drawn[-1], helped=draw.random() < chances[drawn[-1]])
    assert Counter(drawn[-200:])["b"] > 150
    assert set(drawn[:50]) == set(chances)


def test_what_is_no_operator_has_no_credit_and_states_must_fit() -> None:
    choice = OperatorChoice(["a", "b"])
    choice.credit("given", helped=True)
    choice.credit("a", helped=True)
    again = OperatorChoice(["a", "b"])
    again.load_state_dict(choice.state_dict())
    assert again.state_dict() == {"won": {"a": 1, "b": 0}, "lost": {"a": 0, "b": 0}}
    with pytest.raises(ValueError, match="other operators"):
        OperatorChoice(["a"]).load_state_dict(choice.state_dict())
