"""The gradient of the prompt: shared prefix, micro-batches, recomputation change nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.model.base import verify_unchanged
from rlprompt.model.forward.attention import CausalContext
from rlprompt.policy import Policy, SharedPrefix
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Completion, Query
from tests.fixtures.tiny import FAMILIES
from tests.invariants.oracle import (
    QUERIES,
    completions,
    embedded_logprobs,
    model_of,
    policy_of,
    soft_prompt,
)

GROUPS = [completions(5, 1, 11, seed=1), completions(1, seed=2), completions(2, 7, seed=3)]
TEMPERATURE = 0.8


def _weights(group: int, row: int, tokens: int, dtype: torch.dtype) -> Tensor:
    """Fixed upstream weights of a completion's tokens."""
    generator = torch.Generator().manual_seed(100 * group + row)
    return torch.randn(tokens, generator=generator, dtype=torch.float64).to(dtype)


Micro = Sequence[tuple[int, Sequence[int]]]
WHOLE: Micro = [(0, (0, 1, 2)), (1, (0,)), (2, (0, 1))]
ONE_BY_ONE: list[Micro] = [[(g, (i,))] for g, rows in WHOLE for i in rows]
MIXED: list[Micro] = [[(2, (1,)), (0, (2, 0))], [(1, (0,)), (2, (0,))], [(0, (1,))]]


def _loss(policy: Policy, prefix: SharedPrefix, micro: Micro, entropy: float) -> Tensor:
    queries: list[Query] = [QUERIES[g] for g, _ in micro]
    groups: list[list[Completion]] = [[GROUPS[g][i] for i in rows] for g, rows in micro]
    tree = policy.tree(queries, groups, prefix.leaves)
    out = policy.logprobs(tree, prefix.leaves, TEMPERATURE, entropy_grad=entropy > 0)
    weights = torch.cat(
        [
            _weights(g, i, len(GROUPS[g][i].token_ids), out.logprobs.dtype)
            for g, rows in micro
            for i in rows
        ]
    )
    loss = (out.logprobs[out.mask] * weights).sum()
    return loss + entropy * out.entropy.sum() if entropy else loss


def _gradient(
    policy: Policy, prompt: SoftPrompt, micros: Sequence[Micro] = (WHOLE,), entropy: float = 0.0
) -> Tensor:
    policy.prompt = prompt
    (parameter,) = policy.parameters()
    parameter.grad = torch.zeros_like(parameter)
    shared = SharedPrefix(policy.prefix())
    for micro in micros:
        _loss(policy, shared, micro, entropy).backward()
    shared.backward()
    return parameter.grad.clone()


def _unshared(policy: Policy, family: str, prompt: SoftPrompt) -> Tensor:
    """Autograd through one forward of transformers per row, over all of its tokens."""
    model: Any = model_of(family, policy.base.dtype)
    embed = model.get_input_embeddings()
    total = torch.zeros((), dtype=policy.base.dtype)
    for g, rows in WHOLE:
        for i in rows:
            tokens = GROUPS[g][i].token_ids
            after = torch.tensor([*policy.tail_ids(QUERIES[g].messages), *tokens])
            head = embed(torch.tensor(policy.head_ids))
            sequence = torch.cat([head, prompt.embeddings, embed(after)])
            logprobs = embedded_logprobs(model, sequence, tokens, TEMPERATURE)
            total = total + (logprobs * _weights(g, i, len(tokens), logprobs.dtype)).sum()
    (grad,) = torch.autograd.grad(total, prompt.embeddings)
    return grad


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_two_stage_gradient_is_that_of_unshared_rows(family: str) -> None:
    policy = policy_of(family, torch.float64)
    prompt = soft_prompt(policy, noise=0.3)
    expected = _unshared(policy, family, prompt)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(_gradient(policy, prompt), expected, rtol=1e-9, atol=1e-9)


def test_two_stage_gradient_of_gemma2_in_float32() -> None:
    """transformers runs it with eager attention only, which rounds to float32."""
    policy = policy_of("gemma2")
    prompt = soft_prompt(policy, noise=0.3)
    expected = _unshared(policy, "gemma2", prompt)
    torch.testing.assert_close(_gradient(policy, prompt), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_accumulated_micro_batches_are_the_whole_batch(family: str, entropy: float) -> None:
    policy = policy_of(family, torch.float64)
    prompt = soft_prompt(policy, noise=0.3)
    whole = _gradient(policy, prompt, [WHOLE], entropy)
    for micros in (ONE_BY_ONE, MIXED):
        parts = _gradient(policy, prompt, micros, entropy)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10 * float(whole.abs().max()))


def test_finite_differences() -> None:
    policy = policy_of("llama", torch.float64)
    prompt = soft_prompt(policy, noise=0.3)
    grad = _gradient(policy, prompt, entropy=0.1)
    step = 1e-5
    for token, coordinate in ((0, 0), (2, 17), (prompt.num_virtual_tokens - 1, 63)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                prompt.embeddings[token, coordinate] += sign * step
                shared = SharedPrefix(policy.prefix())
                values.append(float(_loss(policy, shared, WHOLE, 0.1)))
                prompt.embeddings[token, coordinate] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        assert slope == pytest.approx(float(grad[token, coordinate]), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_checkpointing_changes_nothing(family: str, dtype: torch.dtype) -> None:
    policy = policy_of(family, dtype)
    prompt = soft_prompt(policy, noise=0.3)
    plain = _gradient(policy, prompt, MIXED)
    policy.gradient_checkpointing = True
    try:
        assert policy.gradient_checkpointing
        recomputed = _gradient(policy, prompt, MIXED)
    finally:
        policy.gradient_checkpointing = False
    assert not policy.gradient_checkpointing
    assert not any(module.training for module in policy.base.model.modules())
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_gradient_checkpointing_recomputes() -> None:
    """It does what it is for: every layer attends twice."""
    policy = policy_of("llama")
    prompt = soft_prompt(policy)
    embeddings = torch.cat([policy.embed(policy.head_ids), prompt.embeddings])
    calls = []
    for on in (False, True):
        policy.gradient_checkpointing = on
        context = CausalContext()
        states = policy.forward.hidden(embeddings, torch.arange(len(embeddings)), context)
        states.sum().backward()
        calls.append(len(context.keys))
    policy.gradient_checkpointing = False
    assert calls == [policy.base.num_layers, 2 * policy.base.num_layers]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_is_untouched_by_a_backward(family: str, dtype: torch.dtype) -> None:
    policy = policy_of(family, dtype)
    grad = _gradient(policy, soft_prompt(policy, noise=0.3))
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 0
    assert verify_unchanged(policy.base) == policy.base.fingerprint
    assert all(p.grad is None and not p.requires_grad for p in policy.base.model.parameters())


def test_bfloat16_gradient_points_where_the_exact_one_does() -> None:
    rounded, exact = policy_of("llama", torch.bfloat16), policy_of("llama", torch.float64)
    ours = _gradient(rounded, soft_prompt(rounded)).double()
    expected = _gradient(exact, soft_prompt(exact))
    cosine = torch.cosine_similarity(ours.flatten(), expected.flatten(), dim=0)
    assert ours.dtype == torch.float64
    assert cosine > 0.98


def test_a_prompt_without_parameters_takes_a_backward_too() -> None:
    """Nothing to carry: a reference or baseline may stand where a trained prompt stood."""
    policy = policy_of("llama")
    policy.prompt = TextPrompt("the rain")
    shared = SharedPrefix(policy.prefix())
    _loss(policy, shared, WHOLE, 0.0).backward()
    shared.backward()
    assert policy.parameters() == []
