"""The judging LM: the base of a run under a rubric, checked against a plain forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.rewards.models.judge import JudgeReward
from rlprompt.rewards.models.judge_question import ask_text
from tests.fixtures.tiny import save_tiny, tiny_base

RUBRIC = "Is the answer good?"
TEXTS = ["water falls", "no", "water falls", "it is the sun " * 4]


def policy(base: FrozenBase | None = None) -> Policy:
    made = base or tiny_base()
    return Policy(made, ChatSlot.from_tokenizer(made.tokenizer))


def judge(verdicts: dict[str, float] | None = None, **options: Any) -> JudgeReward:
    return JudgeReward(rubric=RUBRIC, verdicts=verdicts or {"Yes": 1.0, "No": 0.0}, **options)


def values(reward: JudgeReward, **kwargs: Any) -> list[float]:
    return reward(prompts=["what is rain?"] * len(TEXTS), completions=TEXTS, **kwargs)


def by_hand(own: Policy, verdicts: dict[str, float], text: str) -> tuple[float, float]:
    """The same mean from the whole sequence, token by token, through transformers."""
    tokenizer = own.base.tokenizer
    messages = [
        {"role": "system", "content": RUBRIC},
        {"role": "user", "content": ask_text("what is rain?", text, list(verdicts))},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    total, mean, seen = 0.0, 0.0, set()
    for word, value in verdicts.items():
        for form in (word, f" {word}"):
            ids = tokenizer(form, add_special_tokens=False)["input_ids"]
            if tuple(ids) in seen:
                continue
            seen.add(tuple(ids))
            with torch.no_grad():
                logits = tiny_base().model(torch.tensor([start + ids])).logits[0].double()
            logprobs = logits.log_softmax(-1)
            chance = sum(logprobs[len(start) - 1 + i, t] for i, t in enumerate(ids))
            probability = float(torch.as_tensor(chance).exp())
            total, mean = total + probability, mean + probability * value
    return mean / total, total


@pytest.mark.parametrize("verdicts", [{"Yes": 1.0, "No": 0.0}, {"good": 1, "fair": 0.4, "bad": 0}])
def test_values_are_those_of_a_plain_forward(verdicts: dict[str, float]) -> None:
    own = policy()
    reward = judge(verdicts, batch_queries=2)
    reward.bind_policy(own)
    logged: dict[str, float] = {}
    found = values(reward, log_metric=logged.__setitem__)
    expected = [by_hand(own, verdicts, text) for text in TEXTS]
    assert found == pytest.approx([value for value, _ in expected], rel=1e-4)
    coverage = sum(total for _, total in expected) / len(expected)
    assert logged["judge/coverage"] == pytest.approx(coverage, rel=1e-4)


def test_the_base_is_shared_and_unchanged() -> None:
    own = policy()
    reward = judge()
    reward.bind_policy(own)
    before = {name: tensor.clone() for name, tensor in own.base.model.state_dict().items()}
    values(reward)
    assert reward._policy is own
    for name, tensor in own.base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad


def test_a_judge_of_its_own_gives_the_same_values(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    options = {"model": {"path": "model", "dtype": "float32", "device": "cpu"}}
    resolved = JudgeReward.resolve_paths({"rubric": RUBRIC, **options}, tmp_path)
    own = JudgeReward(**resolved)
    shared = judge()
    shared.bind_policy(policy())
    assert values(own) == pytest.approx(values(shared), rel=1e-4)
    own.bind_policy(policy(tiny_base("qwen2")))
    assert values(own) == pytest.approx(values(shared), rel=1e-4)


def test_without_a_model_the_sentence_says_what_to_do() -> None:
    with pytest.raises(InputError, match="no base to lend; set the option model"):
        values(judge())


def test_a_run_lends_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.cli.runs import rlprompt, write_recipe

    save_tiny(tmp_path / "model")
    rewards = [
        {"path": "builtin:judge", "options": {"rubric": RUBRIC}, "timeout": None},
        {"path": "builtin:repetition", "role": "metric"},
    ]
    write_recipe(tmp_path, Path("model"), rewards=rewards, training__steps=1)
    monkeypatch.chdir(tmp_path)
    shown = rlprompt("train", "recipe.yaml", "--output", "run")
    assert shown.code == 0, shown.err
    assert "judge/coverage" in (tmp_path / "run" / "metrics.jsonl").read_text()
