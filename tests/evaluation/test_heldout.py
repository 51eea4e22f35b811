"""Held-out evaluation: the same draws for everyone, and what the base thinks of the texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.evaluation.heldout import EvaluationSettings, HeldoutEvaluator
from rlprompt.evaluation.measures import BaseKL, BaseLogprob
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rewards.base import LoadedReward, RewardSettings
from rlprompt.rewards.runner import RewardRunner
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.tiny import tiny_model

Reward = Callable[..., list[float | None]]


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [float(len(ids)) for ids in completion_ids]


def evaluator(
    policy: Policy, *, seed: int = 5, reward: Reward = lengths, token_budget: int = 2048
) -> HeldoutEvaluator:
    runner = RewardRunner([LoadedReward(RewardSettings(path="here:lengths"), reward)])
    sampling = SamplingSettings(max_tokens=6, stop_token_ids=tuple(range(10, 60)))
    return HeldoutEvaluator(
        NativeEngine(policy),
        runner,
        queries(3),
        sampling,
        completions_per_query=4,
        seed=seed,
        measures={"base_logprob": BaseLogprob(policy, token_budget)},
    )


def test_the_same_prompt_meets_the_same_draws() -> None:
    policy = tiny_policy()
    judge = evaluator(policy)
    first = judge.evaluate(policy.prompt, 1)
    judge.evaluate(NonePrompt(), 1)
    torch.manual_seed(99)
    again = judge.evaluate(policy.prompt, 2)
    assert first.batch.groups == again.batch.groups
    assert first.metrics == again.metrics
    other = evaluator(policy, seed=6).evaluate(policy.prompt, 1)
    assert other.batch.groups != first.batch.groups
    text = judge.evaluate(TextPrompt("the rain"), 1)
    assert text.batch.groups != first.batch.groups


def test_metrics_are_those_of_the_completions() -> None:
    policy = tiny_policy()
    result = evaluator(policy).evaluate(policy.prompt, 1)
    values = [float(len(c.token_ids)) for c in result.batch.completions]
    tensor = torch.tensor(values)
    assert result.reward == pytest.approx(sum(values) / 12)
    assert result.metrics["num_completions"] == 12
    assert result.metrics["reward_std"] == pytest.approx(float(tensor.std()))
    by_query = tensor.view(3, 4).mean(dim=1)  # completions of one query are not independent
    assert result.metrics["reward_sem"] == pytest.approx(float(by_query.std()) / 3**0.5)
    assert result.scores["reward"].tolist() == tensor.view(3, 4).tolist()
    assert result.metrics["rewards"] == {"lengths": pytest.approx(result.reward)}
    assert result.metrics["mean_length"] == pytest.approx(result.reward)
    share = sum(c.terminated for c in result.batch.completions) / 12
    assert result.metrics["terminated_share"] == pytest.approx(share)


def test_completions_without_a_score_make_the_reward_unknown() -> None:
    policy = tiny_policy()
    result = evaluator(policy, reward=lambda **kw: [None] * 12).evaluate(policy.prompt, 1)
    assert math.isnan(result.reward)
    assert result.metrics["rewards"] == {"lengths": None}


@pytest.mark.parametrize("token_budget", [64, 2048])
def test_base_logprob_is_that_of_the_model_alone(token_budget: int) -> None:
    """Against transformers' own forward over whole conversations, one by one."""
    policy = tiny_policy()
    judge = evaluator(policy, token_budget=token_budget)
    result = judge.evaluate(policy.prompt, 1)
    model, tokenizer = tiny_model("llama"), policy.base.tokenizer
    total, count = 0.0, 0
    for group in result.batch.groups:
        rendered = tokenizer.apply_chat_template(
            list(group.query.messages), add_generation_prompt=True, tokenize=False
        )
        asked = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        for completion in group.completions:
            ids = torch.tensor([[*asked, *completion.token_ids]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            steps = logprobs[len(asked) - 1 : -1].gather(1, ids[0, len(asked) :, None])
            total += float(steps.sum())
            count += len(completion.token_ids)
    assert result.metrics["base_logprob"] == pytest.approx(total / count, abs=1e-4)


@pytest.mark.parametrize("token_budget", [64, 2048])
def test_base_kl_is_that_of_two_whole_conversations(token_budget: int) -> None:
    """KL(text || base) over the vocabulary, against transformers' own forwards."""
    policy, text = tiny_policy(), "the rain"
    groups = evaluator(policy).evaluate(TextPrompt(text), 1).batch.groups
    model, tokenizer = tiny_model("llama"), policy.base.tokenizer

    def logprobs(messages: list[Any], completion: tuple[int, ...]) -> torch.Tensor:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        asked = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([[*asked, *completion]])).logits[0]
        return logits[len(asked) - 1 : -1].log_softmax(-1)

    system = {"role": "system", "content": text}
    divergences = []
    for group in groups:
        for completion in group.completions:
            ours = logprobs([system, *group.query.messages], completion.token_ids)
            base = logprobs(list(group.query.messages), completion.token_ids)
            divergences += (ours.exp() * (ours - base)).sum(1).tolist()
    measure = BaseKL(policy, token_budget)
    expected = sum(divergences) / len(divergences)
    assert expected > 0.01
    assert measure(TextPrompt(text), groups).mean == pytest.approx(expected, abs=1e-4)
    assert measure(NonePrompt(), groups).mean == pytest.approx(0.0, abs=1e-6)


def test_evaluating_leaves_the_trained_prompt_alone() -> None:
    policy = tiny_policy()
    (parameter,) = policy.parameters()
    before = parameter.detach().clone()
    evaluator(policy).evaluate(TextPrompt("the rain"), 1)
    assert torch.equal(parameter, before) and parameter.grad is None


@pytest.mark.parametrize(
    "wrong", [{"every": 0}, {"completions_per_query": 0}, {"handwritten": "  "}, {"max_queries": 0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        EvaluationSettings.model_validate(wrong)
