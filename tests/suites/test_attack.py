"""The gradient suffix attack, against the model of transformers run as a whole."""

from __future__ import annotations

import pytest
import torch

from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.suites.attack import Suffix, _gradient, _Place, _values, attack
from tests.fixtures.runs import tiny_policy
from tests.fixtures.tiny import tiny_model

SETTINGS = Suffix(tokens=4, steps=3, candidates=6, top_k=16, target="the rain")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


def test_value_and_gradient_are_those_of_the_whole_model(policy: Policy) -> None:
    prompt = TextPrompt("Be nice.")
    target = policy.slot.completion_ids("the rain")[:-1]
    place = _Place.find(policy, prompt, "the sun", 4)
    suffix = list(place.suffix)
    prefix = policy.prefix(prompt)
    before = [*policy.head_ids, *policy.slot_ids(prompt.init_text)]
    ids = torch.tensor([*before, *place.joined(suffix), *target])
    model = tiny_model("llama")  # the policy's own runs inside of a policy only
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings[None]).logits[0, -len(target) - 1 : -1].float()
    logprobs = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
    (whole,) = torch.autograd.grad(logprobs.mean(), embeddings)
    start = len(before) + len(place.before)
    with torch.no_grad():
        (value,) = _values(policy, prefix, [place.joined(suffix)], target)
    assert value == pytest.approx(float(logprobs.mean()), abs=1e-4)
    found = _gradient(policy, prefix, place, suffix, target)
    torch.testing.assert_close(found, whole[start : start + len(suffix)], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["base", "soft"])
def test_an_attack_gains_is_a_text_and_comes_out_the_same(policy: Policy, kind: str) -> None:
    prompt = NonePrompt() if kind == "base" else policy.prompt
    found = attack(policy, prompt, "the sun", SETTINGS, seed=1)
    assert found.logprob >= found.start
    assert found.forwards <= 1 + SETTINGS.steps * SETTINGS.candidates
    assert found.text == "the sun" + found.suffix
    assert attack(policy, prompt, "the sun", SETTINGS, seed=1) == found


def test_a_larger_budget_gains_at_least_as_much(policy: Policy) -> None:
    more = SETTINGS.model_copy(update={"steps": 12})
    small, large = (attack(policy, policy.prompt, "one line", s, seed=0) for s in (SETTINGS, more))
    assert large.logprob >= small.logprob
    assert large.logprob > large.start
