from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.rewards import RewardSettings


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("builtin:length", "length"),
        ("reward_models/concise.py:reward", "concise"),
        ("a\\b\\my voice.py:reward", "my_voice"),
        ("rewards.py:politeness", "politeness"),
        ("package.module:Polite", "Polite"),
        ("trl.rewards.think_format_reward", "think_format_reward"),
        ("package.module.reward", "module"),
        ("package.module:Scores.polite", "polite"),
        ("concise.py", "concise"),
    ],
)
def test_name_is_derived_from_the_path(path: str, name: str) -> None:
    assert RewardSettings(path=path).name == name


def test_given_name_wins_and_settings_survive_a_round_trip() -> None:
    settings = RewardSettings(path="builtin:length", name="short", options={"max": 5})
    assert settings.name == "short"
    assert RewardSettings(**settings.model_dump()) == settings
    assert pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 0.0}, "has weight 0 and so no effect; set role: metric"),
        ({"weight": float("nan")}, "finite number"),
        ({"role": "metric", "weight": 2.0}, "a weight has no effect"),
        ({"role": "gate", "weight": 2.0}, "a weight has no effect"),
        ({"gate_floor": -3.0}, "gate_floor has no effect"),
        ({"name": "a/b"}, "must consist of letters"),
        ({"role": "penalty"}, "'score', 'gate', 'constraint' or 'metric'"),
        ({"timeout": 0}, "greater than 0"),
        ({"on_error": "ignore"}, "'raise' or 'skip'"),
        ({"wieght": 1.0}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardSettings(path="builtin:length", **fields)
