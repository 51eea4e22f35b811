"""The soft prompt: where it starts, its trust region, what it saves."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from rlprompt.errors import InputError
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from tests.invariants.oracle import QUERIES, TEXT, policy_of


def _create(seed: int = 0, **settings: object) -> SoftPrompt:
    return SoftPrompt.create(SoftSettings.model_validate(settings), policy_of("llama"), seed)


def test_a_text_of_its_own_length() -> None:
    policy = policy_of("llama")
    prompt = _create(num_virtual_tokens=None, init_text=TEXT)
    ids = policy.slot_ids(TEXT)
    assert prompt.num_virtual_tokens == len(ids)
    assert torch.equal(prompt.embeddings, policy.embed(ids))
    assert prompt.init_text == TEXT


@pytest.mark.parametrize("length", [1, 3, 50])
def test_a_text_is_repeated_or_cut_to_the_length(length: int) -> None:
    policy = policy_of("llama")
    prompt = _create(num_virtual_tokens=length, init_text=TEXT)
    ids = policy.slot_ids(TEXT)
    expected = (ids * 20)[:length]
    assert torch.equal(prompt.embeddings, policy.embed(expected))


def test_a_random_start_is_of_vocabulary_embeddings_and_seeded() -> None:
    policy = policy_of("llama")
    prompt = _create(num_virtual_tokens=5, init_text=None)
    rows = policy.embed(range(policy.vocab_size))
    assert all(bool((rows == token).all(1).any()) for token in prompt.embeddings)
    same = _create(num_virtual_tokens=5, init_text=None)
    other = _create(seed=1, num_virtual_tokens=5, init_text=None)
    assert torch.equal(prompt.embeddings, same.embeddings)
    assert not torch.equal(prompt.embeddings, other.embeddings)
    assert prompt.init_text == ""


def test_the_prefix_is_head_and_slot() -> None:
    policy = policy_of("llama")
    prompt = _create(num_virtual_tokens=4)
    assert prompt.prefix(policy).num_tokens == len(policy.head_ids) + 4
    tail = prompt.query_ids(policy, QUERIES[0].messages)
    assert tail == policy.tail_ids(QUERIES[0].messages)


def test_parameters_are_float32_whatever_the_base() -> None:
    policy = policy_of("llama", torch.bfloat16)
    prompt = SoftPrompt.create(SoftSettings(), policy, 0)
    (parameter,) = prompt.parameters()
    assert parameter.dtype == torch.float32
    assert parameter.requires_grad
    prefix = prompt.prefix(policy)
    assert prefix.keys[0].dtype == torch.bfloat16
    assert prefix.keys[0].requires_grad


def test_tokens_that_outgrow_the_trust_region_return_to_its_border() -> None:
    limit = 1.5 * policy_of("llama").embedding_norm()
    prompt = _create(num_virtual_tokens=4)
    with torch.no_grad():
        prompt.embeddings[0] *= 100
        prompt.embeddings[1] *= 0.01
    before = prompt.embeddings.detach().clone()
    prompt.constrain()
    after = prompt.embeddings.detach()
    start = _create(num_virtual_tokens=4).embeddings.detach().norm(dim=1)
    assert after[0].norm().item() == pytest.approx(max(limit, start[0].item()), rel=1e-5)
    cosine = torch.cosine_similarity(after[0], before[0], dim=0)
    assert cosine.item() == pytest.approx(1.0)
    assert torch.equal(after[1:], before[1:])


def test_a_fresh_prompt_lies_inside_its_trust_region() -> None:
    """Even tokens that are longer than the limit: training must not start with a jump."""
    prompt = _create(num_virtual_tokens=8, max_norm_ratio=0.01)
    before = prompt.embeddings.detach().clone()
    prompt.constrain()
    torch.testing.assert_close(prompt.embeddings.detach(), before, rtol=1e-6, atol=0)


def test_without_a_trust_region_nothing_is_scaled() -> None:
    prompt = _create(num_virtual_tokens=2, max_norm_ratio=None)
    with torch.no_grad():
        prompt.embeddings.mul_(1000)
    before = prompt.embeddings.detach().clone()
    prompt.constrain()
    assert torch.equal(prompt.embeddings.detach(), before)


def test_metrics_measure_norm_and_drift() -> None:
    prompt = _create(num_virtual_tokens=3)
    assert prompt.metrics()["drift_from_init"] == 0.0
    with torch.no_grad():
        prompt.embeddings.mul_(1.5)
    metrics = prompt.metrics()
    assert metrics["drift_from_init"] == pytest.approx(0.5)
    mean = prompt.embeddings.detach().norm(dim=1).mean().item()
    assert metrics["norm"] == pytest.approx(mean)


def test_state_is_a_snapshot_that_restores() -> None:
    prompt, other = _create(num_virtual_tokens=4), _create(num_virtual_tokens=4)
    state = prompt.state_dict()
    with torch.no_grad():
        prompt.embeddings.add_(1.0)
    assert not torch.equal(state["embeddings"], prompt.embeddings)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(other.embeddings, prompt.embeddings)
    prompt.load_state_dict(state)
    assert torch.equal(prompt.embeddings.detach(), state["embeddings"])
    assert prompt.parameters()[0] is prompt.embeddings


@pytest.mark.parametrize(
    "state", [{}, {"embeddings": torch.zeros(3, 64)}, {"weights": torch.zeros(4, 64)}], ids=str
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="expected embeddings"):
        _create(num_virtual_tokens=4).load_state_dict(state)


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="init_text"):
        _create(num_virtual_tokens=4, init_text="  ")
    with pytest.raises(ValidationError, match="init_text"):
        SoftSettings(num_virtual_tokens=None, init_text=" ")
    with pytest.raises(ValidationError, match="init_text"):
        SoftSettings(num_virtual_tokens=None, init_text=None)
