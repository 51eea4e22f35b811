"""Attention against the model's own, and effect sizes of states that were made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlprompt.interpret.inside import (
    attention,
    effect_sizes,
    layers_of,
    relative_shift,
    same_direction,
    states,
)
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Group
from tests.fixtures.tiny import tiny_base, tiny_model
from tests.interpret.subjects import answers, queries, tiny_policy

TEXT = "the rain and the sun"


def test_the_shares_are_those_of_the_models_own_attention() -> None:
    policy, prompt = tiny_policy(), TextPrompt(TEXT)
    groups = answers(policy, prompt, 2)
    found = attention(policy, prompt, groups)
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    head, slot = len(policy.head_ids), len(policy.slot_ids(TEXT))
    shares = []
    for group in groups:
        answer = list(group.completions[0].token_ids)
        ids = [
            *policy.head_ids,
            *policy.slot_ids(TEXT),
            *policy.query_ids(group.query, prompt),
            *answer[:-1],
        ]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_attentions=True)
        # [L, H, answer tokens, slot]
        whole = torch.stack(out.attentions)[:, 0, :, -len(answer) :, head : head + slot]
        shares.append(whole.mean(2).sum(2))
    expected = torch.stack(shares).mean(0).double().numpy()
    assert found.to_slot == pytest.approx(expected, abs=1e-5)
    assert found.by_position.sum() == pytest.approx(expected.mean(), abs=1e-5)
    assert (found.to_slot + found.to_head <= 1.0 + 1e-6).all()


@pytest.mark.parametrize("family", ["gemma2", "mistral"])
def test_windows_and_soft_caps_are_those_of_the_family(family: str) -> None:
    from rlprompt.model.chat.slot import ChatSlot

    base = tiny_base(family)
    policy, prompt = Policy(base, ChatSlot.from_tokenizer(base.tokenizer)), TextPrompt(TEXT)
    found = attention(policy, prompt, answers(policy, prompt, 1))
    # Behind a window of eight positions the answer sees nothing of the prompt.
    assert found.to_slot[0].max() < 1e-6
    assert ((found.to_slot >= 0) & (found.to_slot <= 1 + 1e-6)).all()


def test_states_are_those_of_the_models_own_layers() -> None:
    policy = tiny_policy()
    asked = queries()[:2]
    found = states(policy, TextPrompt(TEXT), asked)
    assert found is not None
    model = tiny_model("llama")
    for query, own in zip(asked, found, strict=True):
        ids = [
            *policy.head_ids,
            *policy.slot_ids(TEXT),
            *policy.query_ids(query, TextPrompt(TEXT)),
        ]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        # The last of them is behind the final norm.
        assert own[0] == pytest.approx(out.hidden_states[1][0, -1].numpy(), abs=1e-4)
    assert not [hook for layer in layers_of(policy) or () for hook in layer._forward_hooks]


def test_a_shift_of_three_deviations_has_that_effect_size() -> None:
    random = np.random.default_rng(0)
    base = random.normal(size=(400, 1, 8))
    other = random.normal(size=(400, 1, 8))
    direction = np.eye(8)[0]
    moved = other + 3.0 * direction
    assert effect_sizes(moved, base)[0] == pytest.approx(3.0, abs=0.3)
    assert abs(effect_sizes(other, base)[0]) < 0.3
    assert relative_shift(moved, base)[0] > relative_shift(other, base)[0]


def test_chance_has_no_effect_in_many_dimensions() -> None:
    """A direction found on the same few queries would separate noise by whole deviations."""
    random = np.random.default_rng(0)
    sizes = [
        effect_sizes(random.normal(size=(8, 1, 576)), random.normal(size=(8, 1, 576)))[0]
        for _ in range(40)
    ]
    assert abs(np.mean(sizes)) < 0.3


def test_directions_are_compared_from_where_the_base_stands() -> None:
    base = np.ones((3, 2, 4))
    one = base + np.asarray([1.0, 0.0, 0.0, 0.0])
    other = base + np.asarray([0.0, 2.0, 0.0, 0.0])
    assert same_direction(one, one, base) == pytest.approx(1.0)
    assert same_direction(one, other, base) == pytest.approx(0.0)
    assert same_direction(one, 2 * base - one, base) == pytest.approx(-1.0)


def test_nothing_is_drawn_under_no_prompt() -> None:
    policy = tiny_policy()
    found: list[Group] = answers(policy, NonePrompt(), 1)
    assert attention(policy, NonePrompt(), found).to_slot.shape == (2, 4)
