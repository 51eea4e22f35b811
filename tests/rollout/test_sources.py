"""Sources: what is drawn again, what is given, and where they go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.data.sampler import QuerySampler
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.rewards.base import LoadedReward, RewardSettings
from rlprompt.rewards.runner import RewardRunner
from rlprompt.rollout.sources import ColumnSource, RolloutSource, given_completion
from rlprompt.types import Query
from tests.fixtures.products import needs_products
from tests.fixtures.runs import queries, tiny_policy


class Picky(GRPO):
    """GRPO that keeps groups whose query is not the first."""

    draws = 3

    @property
    def max_draws(self) -> int:
        return self.draws

    def keeps(self, rewards: torch.Tensor) -> bool:
        return bool(rewards.max() > 0)


def by_query(prompts: list[str], **_: Any) -> list[float]:
    """0 for the first query, a number of its own for every other."""
    texts = [query.messages[-1]["content"] for query in queries(3)]
    return [float(texts.index(p if isinstance(p, str) else p[-1]["content"])) for p in prompts]


def rollouts(policy: Policy, algorithm: GRPO, seed: int = 0, size: int = 2) -> RolloutSource:
    return RolloutSource(
        queries(3),
        QuerySampler(3, size, seed),
        NativeEngine(policy),
        policy.prompt,
        RewardRunner([LoadedReward(RewardSettings(path="here:by_query"), by_query)]),
        algorithm,
        SamplingSettings(max_tokens=3, temperature=0.7),
    )


def test_groups_that_teach_nothing_are_drawn_again() -> None:
    policy = tiny_policy()
    source = rollouts(policy, Picky(GRPOSettings(group_size=2), 3), size=3)
    batch = source.collect(0, seed=1)
    assert len(batch.groups) == 3 and len(batch.completions) == 6
    assert bool((batch.rewards.total > 0).all())
    assert torch.equal(batch.rewards.total, batch.rewards.values["by_query"])
    for group, total in zip(batch.groups, batch.rewards.total.view(3, 2), strict=True):
        assert total.tolist() == by_query([group.query.text] * 2)
    assert batch.rewards.metrics["dynamic_sampling/draws"] == 2.0
    assert batch.rewards.metrics["dynamic_sampling/kept_share"] == pytest.approx(4 / 6)
    assert source.epoch == 2.0


@needs_products
def test_a_joined_batch_has_the_products_of_its_last_draw() -> None:
    policy = tiny_policy("llama", torch.bfloat16)
    batch = rollouts(policy, Picky(GRPOSettings(group_size=2), 3), size=3).collect(0, seed=1)
    assert batch.rewards.metrics["dynamic_sampling/draws"] == 2.0
    assert batch.products is not None
    prefix = policy.prefix()
    known = [batch.products.rows(group.completions, prefix, 1) for group in batch.groups]
    assert [rows is not None for rows in known] == [False, False, True]


def test_after_the_last_draw_the_batch_is_filled_up_with_what_there_is() -> None:
    algorithm = Picky(GRPOSettings(group_size=2), 3)
    algorithm.draws = 1
    batch = rollouts(tiny_policy(), algorithm, size=3).collect(0, seed=1)
    assert sorted(set(batch.rewards.total.tolist())) == [0.0, 1.0, 2.0]
    assert "dynamic_sampling/draws" not in batch.rewards.metrics


def test_a_source_goes_on_where_its_state_was_taken() -> None:
    policy = tiny_policy()
    grpo = GRPO(GRPOSettings(group_size=2), 3)
    source = rollouts(policy, grpo)
    source.collect(0, seed=1)
    state = source.state_dict()
    second = source.collect(1, seed=2)
    again = rollouts(policy, grpo)
    again.load_state_dict(state)
    assert again.collect(1, seed=2).groups == second.groups
    assert source.temperature == 0.7


def with_answers(**columns: Any) -> list[Query]:
    return [replace(query, columns=columns) for query in queries(3)]


def test_given_answers_become_completions_that_end_their_turn() -> None:
    policy = tiny_policy()
    rows = with_answers(chosen="the sun <|im_end|>", rejected=[{"content": " rain \n"}])
    source = ColumnSource(rows, QuerySampler(3, 2, 0), policy, ["chosen", "rejected"])
    batch = source.collect(0, seed=0)
    assert source.temperature == 1.0
    assert [c.text for c in batch.completions] == ["the sun <|im_end|>", "rain"] * 2
    assert bool(batch.rewards.total.isnan().all()) and batch.rewards.total.shape == (4,)
    for completion in batch.completions:
        *body, last = completion.token_ids
        assert last in policy.stop_ids and not policy.stop_ids & set(body)
        assert completion.sampling_logprobs == () and completion.terminated


def test_a_given_answer_has_the_tokens_of_the_rendered_conversation() -> None:
    policy = tiny_policy()
    query = replace(queries(1)[0], columns={"completion": "the rain"})
    completion = given_completion(policy, query, "completion")
    whole = policy.base.tokenizer.apply_chat_template(
        [*query.messages, {"role": "assistant", "content": "the rain"}],
        tokenize=True, return_dict=False,
    )  # fmt: skip
    ours = [*policy.none_head_ids, *policy.none_tail_ids(query.messages), *completion.token_ids]
    assert whole[: len(ours)] == ours


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"answer": "x"}, r"row 0 .* no column 'completion' \(columns: answer\)"),
        ({"completion": "  "}, "column 'completion', holds no answer"),
        ({"completion": 3}, "column 'completion', holds no answer"),
        ({"completion": [{"content": "a"}, {"content": "b"}]}, "holds no answer"),
    ],
)
def test_a_missing_answer_is_named(value: dict[str, Any], sentence: str) -> None:
    query = replace(queries(1)[0], columns=value)
    with pytest.raises(InputError, match=sentence):
        given_completion(tiny_policy(), query, "completion")


def test_queries_are_changed_before_they_are_asked() -> None:
    def louder(query: Query, seed: int) -> Query:
        text = f"{query.text} {seed}"
        return replace(query, messages=({"role": "user", "content": text},))

    policy = tiny_policy()
    rows = with_answers(completion="the sun")
    source = ColumnSource(rows, QuerySampler(3, 2, 0), policy, ["completion"], louder)
    asked = [group.query.text for group in source.collect(0, seed=7).groups]
    assert asked[0].endswith(" 7") and asked[1].endswith(" 8")
