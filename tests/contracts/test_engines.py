"""What holds for every engine of a recipe, found in the one list of them, and for the example's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from examples.extend.engine import TimedEngine
from rlprompt.engines.base import Engine
from rlprompt.engines.make import ENGINES, make_engine, require_support
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.vllm_server import fake_vllm
from tests.invariants.oracle import scores

REMOTE: dict[str, dict[str, Any]] = {
    "endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m"},
    "vllm": {"urls": ("http://127.0.0.1:9/v1",)},
}
"""Settings of engines that draw elsewhere; test_endpoint.py and test_vllm.py are about those."""
KINDS: dict[str, type[Engine]] = {
    **{name: each for name, each in ENGINES.items() if name not in REMOTE},
    "of one's own": TimedEngine,
}
SAMPLING = SamplingSettings(max_tokens=9, temperature=0.8, stop_token_ids=tuple(range(10, 40)))


def engine_of(name: str, policy: Policy, prompt: Prompt | None = None) -> Engine:
    """An engine, synced with a prompt if one is given."""
    kind = KINDS[name]
    engine = kind.make(kind.Settings(), policy)
    if prompt is not None:
        engine.sync(prompt)
    return engine


@pytest.mark.parametrize("name", KINDS)
def test_equal_seeds_give_equal_completions(name: str) -> None:
    policy = tiny_policy()
    engine, again = (engine_of(name, policy, policy.prompt) for _ in range(2))
    drawn = engine.generate(queries(3), 4, SAMPLING, seed=1).groups
    assert [len(group.completions) for group in drawn] == [4, 4, 4]
    assert [group.query for group in drawn] == queries(3)
    assert engine.generate(queries(3), 4, SAMPLING, seed=1).groups == drawn
    assert again.generate(queries(3), 4, SAMPLING, seed=1).groups == drawn
    assert engine.generate(queries(3), 4, SAMPLING, seed=2).groups != drawn


@pytest.mark.parametrize("name", KINDS)
def test_the_draws_of_a_query_are_its_own(name: str) -> None:
    """Ranks that divide a list draw the tokens that one would."""
    policy = tiny_policy()
    engine = engine_of(name, policy, policy.prompt)
    whole = engine.generate(queries(4), 2, SAMPLING, seed=3).groups
    first = engine.generate(queries(4)[:1], 2, SAMPLING, seed=3).groups
    rest = engine.generate(queries(4)[1:], 2, SAMPLING, seed=3, first=1).groups
    drawn, alone = (
        [[each.token_ids for each in group.completions] for group in groups]
        for groups in (whole, (*first, *rest))
    )
    assert alone == drawn


@pytest.mark.parametrize("name", KINDS)
def test_completions_end_where_they_should(name: str) -> None:
    policy = tiny_policy()
    engine = engine_of(name, policy, policy.prompt)
    told: list[int] = []
    sampling = SAMPLING.model_copy(update={"min_tokens": 3})
    drawn = engine.generate(
        queries(3), 8, sampling, seed=4, progress=lambda done, _: told.append(done)
    )
    stop = policy.stop_ids | set(SAMPLING.stop_token_ids)
    completions = [each for group in drawn.groups for each in group.completions]
    for each in completions:
        assert 3 <= len(each.token_ids) <= 9
        assert each.terminated == (each.token_ids[-1] in stop)
        assert not stop & set(each.token_ids[:-1])
        assert each.terminated or len(each.token_ids) == 9
    assert {each.terminated for each in completions} == {True, False}
    assert told[-1] == max(len(each.token_ids) for each in completions)


@pytest.mark.parametrize(
    "prompt", [None, TextPrompt("the rain"), NonePrompt()], ids=["soft", "text", "none"]
)
@pytest.mark.parametrize("name", KINDS)
def test_sampling_logprobs_are_those_of_the_training_forward(
    name: str, prompt: Prompt | None
) -> None:
    policy = tiny_policy()
    engine = engine_of(name, policy)
    under = prompt or policy.prompt
    assert engine.supports(under)
    engine.sync(under)
    groups = engine.generate(queries(3), 3, SAMPLING, seed=5).groups
    got = scores(policy, under, queries(3), [g.completions for g in groups], SAMPLING.temperature)
    sampled = [torch.tensor(c.sampling_logprobs) for g in groups for c in g.completions]
    for ours, row in zip(got.logprobs, sampled, strict=True):
        torch.testing.assert_close(ours[: len(row)], row, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_it_draws_under_the_prompt_it_was_synced_with_last(name: str) -> None:
    policy = tiny_policy()
    engine = engine_of(name, policy)
    with pytest.raises(InputError, match="no prompt"):
        engine.generate(queries(1), 1, SAMPLING, seed=0)
    engine.sync(TextPrompt("the rain and the sun"))
    one = engine.generate(queries(3), 4, SAMPLING, seed=6).groups
    engine.sync(NonePrompt())
    assert engine.generate(queries(3), 4, SAMPLING, seed=6).groups != one
    engine.sync(TextPrompt("the rain and the sun"))
    assert engine.generate(queries(3), 4, SAMPLING, seed=6).groups == one


@pytest.mark.parametrize("name", KINDS)
def test_several_prompts_are_drawn_under_as_one_after_the_other(name: str) -> None:
    policy = tiny_policy("llama", torch.float64)
    engine, again = (engine_of(name, policy) for _ in range(2))
    prompts = [TextPrompt("the rain and the sun"), policy.prompt, NonePrompt()]
    drawn = engine.generate_each(prompts, queries(3), 4, SAMPLING, seed=6)
    drawn.append(engine.generate(queries(3), 4, SAMPLING, seed=6))  # the last one stays synced
    for prompt, generation in zip([*prompts, prompts[-1]], drawn, strict=True):
        again.sync(prompt)
        alone = again.generate(queries(3), 4, SAMPLING, seed=6).groups
        assert [group.query for group in generation.groups] == queries(3)
        for group, expected in zip(generation.groups, alone, strict=True):
            for one, other in zip(group.completions, expected.completions, strict=True):
                assert one.token_ids == other.token_ids
                assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-9)
    with pytest.raises(InputError, match="no prompt to draw under; give one"):
        engine.generate_each([], queries(3), 4, SAMPLING, seed=6)


@pytest.mark.parametrize("name", KINDS)
def test_queries_under_prompts_of_their_own_get_what_each_prompt_gives(name: str) -> None:
    policy = tiny_policy("llama", torch.float64)
    engine, again = (engine_of(name, policy) for _ in range(2))
    text = TextPrompt("the rain and the sun")
    prompts = [text, policy.prompt, text, text, NonePrompt()]
    drawn = engine.generate_under(prompts, queries(5), 4, SAMPLING, seed=6, first=2)
    assert [group.query for group in drawn.groups] == queries(5)
    for place, (prompt, group) in enumerate(zip(prompts, drawn.groups, strict=True)):
        again.sync(prompt)
        alone = again.generate([group.query], 4, SAMPLING, 6, first=2 + place)
        for one, other in zip(group.completions, alone.groups[0].completions, strict=True):
            assert one.token_ids == other.token_ids
            assert one.sampling_logprobs == pytest.approx(other.sampling_logprobs, abs=1e-9)
    with pytest.raises(InputError, match="no prompt to draw under; give one"):
        engine.generate_under([], queries(3), 4, SAMPLING, seed=6)


@pytest.mark.parametrize("name", ENGINES)
def test_settings_choose_it_and_survive_being_written(name: str) -> None:
    with fake_vllm() as server:
        given = {"urls": (server.url,)} if name == "vllm" else REMOTE.get(name, {})
        settings: Any = ENGINES[name].Settings(type=name, **given)
        assert type(settings).model_validate(settings.model_dump(mode="json")) == settings
        assert type(make_engine(tiny_policy(), settings)) is ENGINES[name]


def test_a_prompt_that_is_not_supported_is_refused() -> None:
    class Choosy(TimedEngine):
        def supports(self, prompt: Prompt) -> bool:
            return prompt.kind == "text"

    engine = Choosy.make(TimedEngine.Settings(), tiny_policy())
    require_support(engine, [TextPrompt("the rain")])
    with pytest.raises(InputError, match="cannot apply a prompt of the kind none; choose another"):
        require_support(engine, [TextPrompt("the rain"), NonePrompt()])
