"""docs/reward_options.md: every option of the rewards that ask a model, and of `reward train`."""

from __future__ import annotations

from typing import Any

from rlprompt.reward_training.settings import RewardRecipe
from rlprompt.rewards import MODELS
from rlprompt.rewards.models.api_judge import JudgeSettings as OpenAIJudgeSettings
from rlprompt.rewards.models.http_reward import ServerSettings
from rlprompt.rewards.models.judge import JudgeSettings
from rlprompt.rewards.models.pairwise import PairwiseSettings
from rlprompt.rewards.models.preference import EnsembleSettings, PreferenceSettings
from rlprompt.settings import Settings
from tests.docs.pages import check_page, code
from tests.docs.test_recipe_reference import rows

HEAD = """# Options of rewards that ask a model, and of `rlprompt reward train`

Written by `tests/docs/test_reward_options.py` from the settings classes. How these rewards work is
told in [rewards.md](rewards.md).
"""
REWARDS: dict[str, tuple[type[Settings], str]] = {
    "preference": (PreferenceSettings, "A preference model: any sequence classifier."),
    "preference_ensemble": (EnsembleSettings, "Several preference models as one."),
    "pairwise": (PairwiseSettings, "A model that compares two answers."),
    "judge": (JudgeSettings, "A language model that is asked, by default the run's own base."),
    "openai_judge": (OpenAIJudgeSettings, "A judge behind an OpenAI-compatible server."),
    "http": (ServerSettings, "A reward server."),
}


def table(settings: type[Settings]) -> str:
    schema: dict[str, Any] = settings.model_json_schema()
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for path, kind, default, description in rows(schema, schema, ""):
        lines.append(
            f"| {code(path)} | {kind} | {default} | {description.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    parts = [HEAD]
    for name, (settings, about) in REWARDS.items():
        parts.append(f"## `builtin:{name}`\n\n{about}\n\n{table(settings)}")
    about = "The recipe of a preference model."
    parts.append(f"## `rlprompt reward train RECIPE`\n\n{about}\n\n{table(RewardRecipe)}")
    return "\n".join(parts)


def test_every_reward_that_asks_a_model_is_on_the_page() -> None:
    assert set(REWARDS) == set(MODELS)


def test_the_reference_of_options_is_current() -> None:
    text = page()
    assert code("batch_tokens") in text
    assert code("members.N.path") in text
    check_page("reward_options.md", text)
