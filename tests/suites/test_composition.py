"""Prompts among other text, on rounded weights, and in dialogues."""

from __future__ import annotations

import pytest
import torch

from rlprompt.data.situations import Dialogue, System
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import freeze
from rlprompt.policy import Policy
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.surroundings import NotApplicableError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.suites.composition import (
    among,
    dialogue,
    quantised,
    rebuilt,
    rounded,
)
from tests.fixtures.runs import queries, tiny_policy

AROUND = System(before="Today is Monday.", after="Be kind.")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def test_texts_are_joined_and_the_base_has_the_other_text_alone() -> None:
    for prompt, text in (
        (NonePrompt(), "Today is Monday.\n\nBe kind."),
        (TextPrompt("Rhyme."), "Today is Monday.\n\nRhyme.\n\nBe kind."),
    ):
        assert among(prompt, AROUND).init_text == text


def test_learned_vectors_stand_between_the_texts(policy: Policy) -> None:
    joined = among(policy.prompt, AROUND)
    assert isinstance(joined, SequencePrompt)
    texts = [policy.slot_ids("Today is Monday."), policy.slot_ids("Be kind.")]
    own = policy.positions(policy.prompt)
    assert own is not None
    assert policy.positions(joined) == own + sum(map(len, texts))
    nested = among(joined, System(before="First."))
    assert isinstance(nested, SequencePrompt)
    assert [part.kind for part in nested.parts] == ["text", "text", "soft", "text"]


def test_a_prefix_takes_text_behind_it_only(policy: Policy) -> None:
    prompt = PrefixPrompt.create(PrefixSettings(num_virtual_tokens=3), policy, 0)
    assert isinstance(among(prompt, System(after="Be kind.")), SequencePrompt)
    with pytest.raises(NotApplicableError, match="use after"):
        among(prompt, AROUND)


def test_rounding_is_to_the_nearest_level_of_each_group() -> None:
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    for bits, group in ((8, 4), (4, 3)):
        near, most = rounded(weight, bits, group), 2 ** (bits - 1) - 1
        for row in range(3):
            for start in range(0, 10, group):
                own = weight[row, start : start + group]
                scale = own.abs().max() / most
                levels = [float(scale) * k for k in range(-most, most + 1)]
                for value, got in zip(own, near[row, start : start + group], strict=True):
                    nearest = min(levels, key=lambda level: abs(level - float(value)))
                    assert float(got) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_base_that_runs_is_built_again_with_the_same_weights(family: str) -> None:
    policy = tiny_policy(family, torch.bfloat16)  # whose layers are packed where they can be
    again = Policy(freeze(rebuilt(policy.base), policy.base.tokenizer, "again"), policy.slot)
    assert again.base.fingerprint == policy.base.fingerprint
    texts = []
    for each in (policy, again):
        engine = NativeEngine(each)
        engine.sync(TextPrompt("Be nice."))
        drawn = engine.generate(queries(3), 1, SamplingSettings(max_tokens=8), 0)
        texts.append([group.completions[0].token_ids for group in drawn.groups])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_base_is_not_touched_and_the_copy_answers_otherwise(dtype: torch.dtype) -> None:
    policy = tiny_policy(dtype=dtype)
    before = policy.base.fingerprint
    coarse = quantised(policy, 4, 16)
    assert policy.verify() == before != coarse.base.fingerprint
    texts = []
    for each in (policy, coarse):
        engine = NativeEngine(each)
        engine.sync(policy.prompt)
        drawn = engine.generate(queries(3), 2, SamplingSettings(max_tokens=12), 0)
        texts.append([c.token_ids for g in drawn.groups for c in g.completions])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("user", ["base", "rules"])
def test_dialogues_grow_by_two_turns(policy: Policy, user: str) -> None:
    engine = NativeEngine(policy)
    settings = Dialogue.model_validate({"turns": (1, 3), "user": user})
    sampling = SamplingSettings(max_tokens=5)
    kept = dialogue(engine, policy.prompt, queries(2), settings, sampling, 0)
    assert {turn: [len(g.query.messages) for g in kept[turn]] for turn in kept} == {
        1: [1, 1],
        3: [5, 5],
    }
    again = dialogue(engine, policy.prompt, queries(2), settings, sampling, 0)
    assert again == kept
    roles = [m["role"] for m in kept[3][0].query.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert all(m["content"].strip() for g in kept[3] for m in g.query.messages[2::2])
