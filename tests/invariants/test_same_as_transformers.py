"""Our forward gives the log-probabilities of transformers' own, for every family and prompt."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from transformers import PreTrainedModel

from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import PLAIN
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.tiny import FAMILIES, WINDOW, tiny_tokenizer
from tests.invariants.oracle import (
    QUERIES,
    TEXT,
    completions,
    context_ids,
    flat,
    model_of,
    own_logprobs,
    policy_of,
    query,
    scores,
    soft_prompt,
)

GROUPS = [completions(3, 12, 1, seed=1), completions(1, seed=2), completions(2, 7, seed=3)]


def _expected(
    policy: Policy, model: PreTrainedModel, text: str | None, temperature: float = 1.0
) -> torch.Tensor:
    rows = [
        own_logprobs(model, context_ids(policy, text, asked), c.token_ids, temperature)
        for asked, group in zip(QUERIES, GROUPS, strict=True)
        for c in group
    ]
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), ("llama", "sdpa"), ("gemma3", "sdpa")],
)
def test_text_prompt(family: str, attention: str) -> None:
    policy, model = policy_of(family), model_of(family)
    model.set_attn_implementation(attention)
    ours = scores(policy, TextPrompt(TEXT), QUERIES, GROUPS)
    expected = _expected(policy, model, TEXT)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(flat(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_prompt_in_double_precision_and_tempered(family: str) -> None:
    policy, model = policy_of(family, torch.float64), model_of(family, torch.float64)
    ours = scores(policy, TextPrompt(TEXT), QUERIES, GROUPS, temperature=0.7)
    expected = _expected(policy, model, TEXT, temperature=0.7)
    assert ours.logprobs.dtype == torch.float64
    tolerance = 1e-5 if family == "gemma2" else 1e-9  # its only attention rounds to float32
    torch.testing.assert_close(flat(ours), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt(family: str) -> None:
    policy, model = policy_of(family), model_of(family)
    ours = scores(policy, NonePrompt(), QUERIES, GROUPS)
    torch.testing.assert_close(flat(ours), _expected(policy, model, None), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_soft_prompt_from_a_text_is_that_text(family: str) -> None:
    policy = policy_of(family)
    soft = scores(policy, soft_prompt(policy), QUERIES, GROUPS)
    text = scores(policy, TextPrompt(TEXT), QUERIES, GROUPS)
    torch.testing.assert_close(flat(soft), flat(text), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_windows_are_felt(family: str) -> None:
    """The sequences above are long enough for a window: without it the numbers are others."""
    policy, model = policy_of(family), model_of(family)
    assert min(len(context_ids(policy, TEXT, asked)) for asked in QUERIES) > 2 * WINDOW
    wide = model_of.__wrapped__(family)
    wide.config.sliding_window = 512
    for module in wide.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.__dict__["sliding_window"] = 512
    gap = (_expected(policy, wide, TEXT) - _expected(policy, model, TEXT)).abs()
    assert gap.mean() > 0.01


def test_no_prompt_is_the_template_without_a_system_message() -> None:
    policy = policy_of("llama")
    for asked in QUERIES:
        rendered = policy.base.tokenizer.apply_chat_template(
            list(asked.messages), add_generation_prompt=True, return_dict=False
        )
        prompt = NonePrompt()
        ours = [*policy.none_head_ids, *prompt.query_ids(policy, asked.messages)]
        assert ours == rendered


def test_a_prefix_of_no_tokens() -> None:
    """The plain template without a beginning-of-text token has nothing before the user turn."""
    base = policy_of("gemma3").base
    policy = Policy(base, ChatSlot.from_tokenizer(tiny_tokenizer(), PLAIN))
    assert policy.none_head_ids == []
    prefix = policy.prefix(NonePrompt())
    assert prefix.num_tokens == 0
    assert len(prefix.keys) == base.num_layers
    assert prefix.values[0].shape == (base.num_kv_heads, 0, base.head_dim)
    ours = scores(policy, NonePrompt(), QUERIES, GROUPS)
    expected = _expected(policy, model_of("gemma3"), None)
    torch.testing.assert_close(flat(ours), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_padding_in_transformers_changes_nothing_once_positions_are_explicit(
    family: str, side: str
) -> None:
    """What we compute without padding is what any padding gives under explicit positions."""
    policy, model = policy_of(family), model_of(family)
    group = GROUPS[0]
    ours = scores(policy, TextPrompt(TEXT), QUERIES[:1], [group])
    for place, answer in enumerate(group):
        ids = [*context_ids(policy, TEXT, QUERIES[0]), *answer.token_ids]
        left, right = {"left": (5, 0), "right": (0, 5), "none": (0, 0)}[side]
        row = torch.tensor([[9] * left + ids + [9] * right])
        mask = torch.tensor([[0] * left + [1] * len(ids) + [0] * right])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = model(
                input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits[0, left : left + len(ids)]
        count = len(answer.token_ids)
        expected = logits[-count - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(ours.logprobs[place, :count], expected, rtol=0, atol=1e-4)


@pytest.mark.model
@pytest.mark.parametrize(
    ("dtype", "largest", "mean"), [("float32", 1e-3, 1e-4), ("auto", 1.0, 0.1)]
)
def test_the_real_model(
    smollm2_oracle: PreTrainedModel, dtype: Literal["float32", "auto"], largest: float, mean: float
) -> None:
    """float32 to the last digits; bfloat16 within its rounding (measured: 0.07, at most 0.35)."""
    text = "You are a pirate. Answer in short sentences."
    asked = [query("What is the capital of France?"), query("Hi")]
    groups = [completions(20, 1, 33, seed=5), completions(8, seed=6)]
    base = load_base(ModelSettings(path="smollm2-135m", dtype=dtype))
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer))
    rows = [
        own_logprobs(smollm2_oracle, context_ids(policy, text, q), c.token_ids)
        for q, group in zip(asked, groups, strict=True)
        for c in group
    ]
    gap = (flat(scores(policy, TextPrompt(text), asked, groups)) - torch.cat(rows)).abs()
    assert gap.mean() < mean
    assert gap.max() < largest
