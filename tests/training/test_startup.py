"""A run that cannot learn refuses to start, and the check itself leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import Conditioner
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.training.startup import check_trainable
from rlprompt.types import PrefixKV
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.tiny import FAMILIES


def optimizer_over(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral"])
def test_a_soft_prompt_passes_and_is_left_as_it_was(family: str) -> None:
    policy = tiny_policy(family, prompt=SoftSettings(num_virtual_tokens=1))
    (parameter,) = policy.parameters()
    before = parameter.detach().clone()
    check_trainable(policy, optimizer_over(parameter), queries()[0])
    assert torch.equal(parameter, before)
    assert parameter.grad is None


def test_a_prompt_beyond_every_sliding_window_is_refused() -> None:
    """All layers of tiny-mistral look 8 positions back; the slot is further away than that."""
    policy = tiny_policy("mistral", prompt=SoftSettings(num_virtual_tokens=1))
    with pytest.raises(InputError, match="no usable gradient"):
        check_trainable(policy, optimizer_over(*policy.parameters()), queries()[0])


def test_it_passes_with_recomputed_activations() -> None:
    policy = tiny_policy()
    policy.gradient_checkpointing = True
    check_trainable(policy, optimizer_over(*policy.parameters()), queries()[0])


def test_an_optimizer_over_something_else_is_a_defect() -> None:
    policy = tiny_policy()
    (parameter,) = policy.parameters()
    for wrong in ((nn.Parameter(torch.ones(1)),), (parameter, nn.Parameter(torch.ones(1)))):
        with pytest.raises(RuntimeError, match="exactly the prompt's parameters"):
            check_trainable(policy, optimizer_over(*wrong), queries()[0])


def test_a_base_that_would_be_trained_is_a_defect() -> None:
    policy = tiny_policy()
    next(policy.base.model.parameters()).requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen base"):
        check_trainable(policy, optimizer_over(*policy.parameters()), queries()[0])


class Detached(SoftPrompt):
    """Its prefix forgets where it came from."""

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        made = super().prefix(conditioner)
        return PrefixKV([k.detach() for k in made.keys], [v.detach() for v in made.values])


class WithoutGradient(SoftPrompt):
    """Its parameter reaches the prefix with a factor of zero."""

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        made = TextPrompt("the sun").prefix(conditioner)
        return PrefixKV(
            [k + 0 * self.embeddings.sum() for k in made.keys],
            [v + 0 * self.embeddings.sum() for v in made.values],
        )


class Ignored(SoftPrompt):
    """It has a gradient, but its value changes nothing."""

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        made = TextPrompt("the sun").prefix(conditioner)
        shift = (self.embeddings - self.embeddings.detach()).sum()
        return PrefixKV([k + shift for k in made.keys], [v + shift for v in made.values])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Detached, "no usable gradient"),
        (WithoutGradient, "no usable gradient"),
        (Ignored, "does not change what tiny-llama says"),
    ],
)
def test_a_prompt_that_cannot_be_learned_is_refused(kind: type[SoftPrompt], sentence: str) -> None:
    policy = tiny_policy()
    policy.prompt = kind(torch.ones(2, policy.base.hidden_size))
    with pytest.raises(InputError, match=sentence):
        check_trainable(policy, optimizer_over(*policy.parameters()), queries()[0])


def test_a_prompt_that_is_not_finite_is_refused() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.parameters()[0][0, 0] = torch.nan
    with pytest.raises(InputError, match="no usable gradient"):
        check_trainable(policy, optimizer_over(*policy.parameters()), queries()[0])
