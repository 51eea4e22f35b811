"""The gradient of every representation: that of transformers' (and PEFT's) autograd, to 1e-9.

The oracle runs one sequence at a time through a second copy of the model: a soft prompt among the
input embeddings, a prefix in transformers' own cache, an adapter injected by PEFT.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from rlprompt.model.fingerprint import fingerprint
from rlprompt.policy import Policy, SharedPrefix
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.prompts import TRAINABLE, make
from tests.invariants.oracle import QUERIES, completions, model_of, policy_of

FAMILIES = ("llama", "qwen3", "gemma3")
GROUPS = [completions(4, 1, 9, seed=1), completions(1, seed=2), completions(2, 5, seed=3)]


def _ours(policy: Policy, prompt: Prompt) -> list[Tensor]:
    """Group by group, as micro-batches do it."""
    for parameter in prompt.parameters():
        parameter.grad = None
    shared = SharedPrefix(policy.prefix(prompt))
    for asked, group in zip(QUERIES, GROUPS, strict=True):
        tree = policy.tree([asked], [group], shared.leaves, prompt)
        out = policy.logprobs(tree, shared.leaves)
        (out.logprobs.sum() + 0.1 * out.logprobs.square().sum()).backward()
    shared.backward()
    return [_grad(parameter) for parameter in prompt.parameters()]


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def _loss(logits: Tensor, tokens: tuple[int, ...]) -> Tensor:
    scores = logits[-len(tokens) - 1 : -1].log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens)[:, None])
    return chosen.sum() + 0.1 * chosen.square().sum()


def _oracle(policy: Policy, prompt: Prompt, model: Any) -> Tensor:
    """The loss of all completions, each by a forward over its whole sequence."""
    total = torch.zeros((), dtype=policy.base.dtype)
    for asked, group in zip(QUERIES, GROUPS, strict=True):
        for one in group:
            after = [*policy.tail_ids(asked.messages), *one.token_ids]
            embedded, cache = _slot(policy, prompt, model)
            tail = model.get_input_embeddings()(torch.tensor(after))
            total = total + _loss(
                _forward(model, torch.cat([embedded, tail]), cache), one.token_ids
            )
    return total


def _slot(policy: Policy, prompt: Prompt, model: Any) -> tuple[Tensor, DynamicCache | None]:
    """Head and slot as embeddings [n, d] still to be run, after a cache that holds a prefix."""
    embed = model.get_input_embeddings()
    embedded, cache = embed(torch.tensor(policy.head_ids)), None
    parts = prompt.parts if isinstance(prompt, SequencePrompt) else [prompt]
    for part in parts:
        if isinstance(part, PrefixPrompt):
            cache = DynamicCache()
            model.get_decoder()(inputs_embeds=embedded[None], past_key_values=cache, use_cache=True)
            cache = _extended(cache, part)
            embedded = embedded[:0]
        elif isinstance(part, SoftPrompt):
            embedded = torch.cat([embedded, part.embeddings])
        else:
            assert isinstance(part, TextPrompt | AdapterPrompt)
            ids = policy.slot_ids(part.init_text)
            embedded = torch.cat([embedded, embed(torch.tensor(ids))])
    return embedded, cache


def _extended(before: DynamicCache, part: PrefixPrompt) -> DynamicCache:
    """A cache with the prompt's keys and values behind those of `before`."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(part.keys_values()):
        past = before.layers[layer]
        assert isinstance(past, CacheLayerMixin)
        assert past.keys is not None and past.values is not None
        keys, values = (
            torch.cat([past.keys, key[None]], 2),
            torch.cat([past.values, value[None]], 2),
        )
        cache.update(keys, values, layer)
    return cache


def _forward(model: Any, embedded: Tensor, cache: DynamicCache | None) -> Tensor:
    first = 0 if cache is None else cache.get_seq_length()
    out = model(
        inputs_embeds=embedded[None],
        past_key_values=cache,
        position_ids=torch.arange(first, first + len(embedded))[None],
        use_cache=cache is not None,
    )
    logits: Tensor = out.logits[0]
    return logits


def _peft_of(prompt: AdapterPrompt, model: Any) -> tuple[Any, list[Tensor]]:
    """PEFT's own injection with the prompt's weights, and its parameters in our order."""
    config = prompt.adapter.peft_config("tiny")
    kinds: dict[str, Any] = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config}
    keys = ("target_modules", "r", "lora_alpha", "feedforward_modules")
    settings = {key: config[key] for key in keys if key in config}
    wrapped = peft.get_peft_model(
        copy.deepcopy(model),
        kinds[config["peft_type"]](task_type="CAUSAL_LM", **settings),
        autocast_adapter_dtype=False,
    )
    weights = {f"base_model.model.{k}": v for k, v in prompt.state_dict().items()}
    result: Any = peft.set_peft_model_state_dict(wrapped, weights)
    assert not result.unexpected_keys
    named = {k.replace(".default", ""): p for k, p in wrapped.named_parameters() if p.requires_grad}
    return wrapped, [named[name] for name in weights]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TRAINABLE)
def test_gradients_are_those_of_whole_sequences(kind: str, family: str) -> None:
    policy, model = policy_of(family, torch.float64), model_of(family, torch.float64)
    prompt = _double(make(kind, policy, noise=0.3))
    ours = _ours(policy, prompt)
    wanted: list[Tensor] = list(prompt.parameters())
    if isinstance(prompt, AdapterPrompt):
        model, wanted = _peft_of(prompt, model)
    expected = torch.autograd.grad(_oracle(policy, prompt, model), wanted)
    largest = max(float(grad.abs().max()) for grad in expected)
    assert largest > 1e-3
    for got, grad in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-9, atol=1e-10 * largest)


def _double(prompt: Prompt) -> Prompt:
    """LoRA and IA3 are made in float32; the test wants no rounding in their sums."""
    for parameter in prompt.parameters():
        parameter.data = parameter.data.double()
    return prompt


@pytest.mark.parametrize("kind", TRAINABLE)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradient_checkpointing_changes_nothing(kind: str, family: str) -> None:
    policy = policy_of(family, torch.float64)
    prompt = _double(make(kind, policy, noise=0.3))
    plain = _ours(policy, prompt)
    policy.gradient_checkpointing = True
    try:
        recomputed = _ours(policy, prompt)
    finally:
        policy.gradient_checkpointing = False
    for got, expected in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_frozen_part_gets_no_gradient_and_keeps_its_bits() -> None:
    policy = policy_of("llama")
    prompt = make("soft_then_prefix", policy, noise=0.3)
    assert isinstance(prompt, SequencePrompt)
    frozen, trained = prompt.parts[0].state_dict(), prompt.parts[1].state_dict()
    optimizer = torch.optim.SGD(prompt.parameters(), lr=0.1)
    _ours(policy, prompt)
    optimizer.step()
    prompt.constrain()
    assert all(p.grad is None for p in prompt.parts[0].parameters())
    after = prompt.parts[0].state_dict()
    assert all(torch.equal(after[name], frozen[name]) for name in frozen)
    assert not torch.equal(prompt.parts[1].state_dict()["offset"], trained["offset"])


def test_peft_leaves_the_oracle_alone() -> None:
    """The models of the other tests are shared; injection works on a copy."""
    model = model_of("llama", torch.float64)
    before = fingerprint(model)
    prompt = make("lora", policy_of("llama", torch.float64))
    assert isinstance(prompt, AdapterPrompt)
    _peft_of(prompt, model)
    assert fingerprint(model) == before
    assert not any("lora" in name for name, _ in model.named_parameters())
