"""The prefix prompt: where it starts, its place, its trust region, its low rank."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from rlprompt.errors import InputError
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import PrefixKV
from tests.invariants.oracle import TEXT, policy_of


def _create(family: str = "llama", seed: int = 0, **settings: object) -> PrefixPrompt:
    parsed = PrefixSettings.model_validate(settings)
    return PrefixPrompt.create(parsed, policy_of(family), seed)


def _keys_of_text(text: str, repeat: int = 1) -> list[torch.Tensor]:
    policy = policy_of("llama")
    ids = [*policy.head_ids, *policy.slot_ids(text) * repeat]
    return list(policy.prefill(policy.embed(ids)).keys)


def test_it_holds_the_keys_and_values_of_its_text() -> None:
    policy = policy_of("llama")
    prompt = _create(init_text=TEXT)
    layers, heads, dim = policy.kv_shape
    tokens = len(policy.slot_ids(TEXT))
    assert prompt.keys_values().shape == (layers, 2, heads, tokens, dim)
    assert prompt.position == len(policy.head_ids)
    text, ours = TextPrompt(TEXT).prefix(policy), prompt.prefix(policy)
    for got, expected in zip([*ours.keys, *ours.values], [*text.keys, *text.values], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_head_is_frozen() -> None:
    policy = policy_of("llama")
    prompt = _create(init_text=TEXT)
    with torch.no_grad():
        prompt.parameters()[0].normal_()
    first = len(policy.head_ids)
    for made, head in zip(prompt.prefix(policy).keys, policy.head_prefix().keys, strict=True):
        assert torch.equal(made[:, :first], head)
        assert not head.requires_grad


@pytest.mark.parametrize("length", [2, 9])
def test_a_text_is_repeated_or_cut_to_the_length(length: int) -> None:
    prompt = _create(num_virtual_tokens=length, init_text="the rain")
    whole = _keys_of_text("the rain", repeat=9)[1]
    slot = whole[:, prompt.position : prompt.position + length]
    torch.testing.assert_close(prompt.start[1, 0], slot, rtol=0, atol=1e-5)


def test_a_drawn_start_is_seeded() -> None:
    drawn, same, other = (
        _create(seed=seed, num_virtual_tokens=4, init_text=None) for seed in (0, 0, 1)
    )
    assert torch.equal(drawn.start, same.start)
    assert not torch.equal(drawn.start, other.start)


def test_a_unit_of_offset_is_the_size_of_its_head() -> None:
    prompt = _create(init_text=TEXT)
    rms = prompt.start[1, 0, 1].square().mean().sqrt()
    before = prompt.keys_values().detach()
    with torch.no_grad():
        prompt.parameters()[0].add_(1.0)
    moved = (prompt.keys_values() - before)[1, 0, 1]
    torch.testing.assert_close(moved, torch.full_like(moved, float(rms)), rtol=1e-4, atol=1e-5)


def test_low_rank_has_its_rank_and_starts_as_the_text() -> None:
    full, low = _create(init_text=TEXT), _create(init_text=TEXT, rank=2)
    assert torch.equal(low.keys_values(), full.keys_values())
    left, right = low.parameters()
    with torch.no_grad():
        right.normal_()
    layers, _, heads, tokens, dim = low.start.shape
    matrices = low.offset().detach().transpose(2, 3).reshape(layers * 2, tokens, heads * dim)
    assert [int(torch.linalg.matrix_rank(m)) for m in matrices] == [2] * (2 * layers)
    assert left.shape == (layers, 2, tokens, 2)


@pytest.mark.parametrize("rank", [None, 2])
def test_tokens_that_leave_the_trust_region_return_to_its_border(rank: int | None) -> None:
    prompt = _create(init_text=TEXT, rank=rank, max_offset=0.5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if rank is None:
            prompt.parameters()[0][:, :, :, 0] *= 0.1
    before = prompt.offset().detach().clone()
    prompt.constrain()
    after = prompt.offset().detach()
    rms = after.square().mean((2, 4)).sqrt()
    assert float(rms.max()) <= 0.5 + 1e-5
    outside = before.square().mean((2, 4)).sqrt() > 0.5
    assert bool(outside.any())
    torch.testing.assert_close(rms[outside], torch.full_like(rms[outside], 0.5), rtol=1e-4, atol=0)
    cosine = torch.cosine_similarity(after.flatten(), before.flatten(), dim=0)
    assert cosine > 0.8
    if rank is None:  # what was inside stays, to the bit
        assert torch.equal(after[:, :, :, 0], before[:, :, :, 0])


def test_without_a_trust_region_nothing_is_scaled() -> None:
    prompt = _create(init_text=TEXT, max_offset=None)
    with torch.no_grad():
        prompt.parameters()[0].fill_(100.0)
    prompt.constrain()
    assert bool((prompt.parameters()[0] == 100.0).all())


def test_metrics_are_in_units_of_the_start() -> None:
    prompt = _create(init_text=TEXT)
    assert prompt.metrics() == {"drift_from_init": 0.0, "drift_from_init_max": 0.0}
    with torch.no_grad():
        prompt.parameters()[0][0, 0, :, 1] = 3.0
    metrics = prompt.metrics()
    assert metrics["drift_from_init_max"] == pytest.approx(3.0)
    share = 1 / prompt.start[:, :, 0, :, 0].numel()
    assert metrics["drift_from_init"] == pytest.approx(3.0 * share**0.5)


def test_keys_keep_to_their_place() -> None:
    policy = policy_of("llama")
    prompt = _create(init_text=TEXT)
    later = policy.prefill(policy.embed([5]), policy.head_prefix())
    with pytest.raises(InputError, match=r"belong to positions from 5 on, and it stands at 6"):
        prompt.extend(policy, later)


def test_a_bfloat16_base_gets_the_bits_of_its_own_prefill() -> None:
    policy = policy_of("llama", torch.bfloat16)
    prompt = PrefixPrompt.create(PrefixSettings(init_text=TEXT), policy, 0)
    whole = policy.prefill(policy.embed(policy.slot_ids(TEXT)), policy.head_prefix())
    made: PrefixKV = prompt.prefix(policy)
    assert prompt.parameters()[0].dtype == torch.float32
    for got, expected in zip([*made.keys, *made.values], [*whole.keys, *whole.values], strict=True):
        assert torch.equal(got.bfloat16(), expected)


def test_a_start_without_length_is_refused() -> None:
    with pytest.raises(ValidationError, match="needs an init_text to count"):
        PrefixSettings(init_text=None)
    with pytest.raises(InputError, match="init_text is empty"):
        _create(num_virtual_tokens=3, init_text=" ")
