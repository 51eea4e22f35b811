"""Rows that join and leave between steps draw what each would draw alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlprompt.engines.continuous import Ask, ContinuousDecoder, Token
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.row_cache import RowCache
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import ModelSettings
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.row_blocks import ROWS, fix_rows, fixed_rows, packed_weights
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Query
from tests.fixtures.tiny import tiny_base, tiny_model

_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "min_p": 0.01},
)


def tiny_policy(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    base = tiny_base(family, dtype)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


def asks_of(
    policy: Policy, prompts: Sequence[Prompt], count: int, tokens: int
) -> tuple[list[Ask], list[list[tuple[int, ...]]]]:
    """Requests under several prompts, and what the native engine answers to each alone."""
    engine = NativeEngine(policy)
    with torch.no_grad():
        prefixes = [policy.prefix(prompt).snapshot() for prompt in prompts]
    asks, expected = [], []
    for i in range(count):
        place = i % len(prompts)
        content = "the rain " * (1 + i % 5) + str(i)
        query = Query(messages=({"role": "user", "content": content},))
        sampling = SamplingSettings(**_SETTINGS[i % len(_SETTINGS)], max_tokens=tokens + i % 3)
        copies = 1 + i % 2
        engine.sync(prompts[place])
        (group,) = engine.generate([query], copies, sampling, seed=i).groups
        expected.append([each.token_ids for each in group.completions])
        ids = tuple(policy.query_ids(query, prompts[place]))
        asks.append(Ask(prefixes[place], ids, sampling, i, copies))
    return asks, expected


def drawn(decoder: ContinuousDecoder, asks: Sequence[Ask]) -> list[list[tuple[int, ...]]]:
    """What comes of requests that join two at a time, every second step."""
    found: dict[int, list[list[int]]] = {id(ask): [[] for _ in range(ask.copies)] for ask in asks}
    waiting, step = list(asks), 0
    while waiting or decoder.num_rows:
        if waiting and step % 2 == 0:
            decoder.join(waiting[:2])
            waiting = waiting[2:]
        for token in decoder.step():
            found[id(token.ask)][token.copy].append(token.token_id)
        step += 1
    return [[tuple(copy) for copy in found[id(ask)]] for ask in asks]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_rows_that_come_and_go_draw_what_each_would_alone(family: str) -> None:
    policy = tiny_policy(family)
    texts = [TextPrompt("Answer in one line."), TextPrompt("the sun and the rain in the land")]
    asks, expected = asks_of(policy, [*texts, NonePrompt()], 8, 10)
    assert drawn(ContinuousDecoder(policy), asks) == expected


def test_prompts_with_an_adapter_stand_beside_others() -> None:
    policy = tiny_policy("llama")
    adapters = []
    for seed in (0, 1):
        made = AdapterPrompt.create(AdapterPrompt.Settings(), policy, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in made.parameters():
                each.add_(0.1 * torch.randn(each.shape, generator=generator))
        adapters.append(made)
    asks, expected = asks_of(policy, [*adapters, TextPrompt("Answer in one line.")], 6, 8)
    assert drawn(ContinuousDecoder(policy), asks) == expected


def test_products_of_a_fixed_number_of_rows_make_a_row_independent_in_bf16() -> None:
    policy = tiny_policy("llama", torch.bfloat16)
    if not packed_weights(policy.base.model):
        pytest.skip("this build of torch packs no weights in bfloat16 here")
    assert fix_rows(policy.base.model)
    soft = SoftPrompt.create(SoftPrompt.Settings(num_virtual_tokens=4), policy, 0)
    asks, expected = asks_of(policy, [soft, TextPrompt("Answer in one line.")], 8, 10)
    assert drawn(ContinuousDecoder(policy), asks) == expected
    for weight in packed_weights(policy.base.model):
        x = torch.randn(ROWS + 9, weight.inputs).bfloat16()
        whole = weight.forward(x)
        for first, count in ((0, 1), (3, 7), (ROWS, 9)):
            rows = x[first : first + count].contiguous()
            assert torch.equal(weight.forward(rows), whole[first : first + count])
        plain = torch.nn.functional.linear(
            x, torch.cat([layer.weight for layer in weight.layers]), weight.bias
        )
        torch.testing.assert_close(whole.float(), plain.float(), rtol=2e-2, atol=2e-2)


def test_a_model_without_packed_products_is_not_called_independent() -> None:
    policy = tiny_policy("llama")
    assert not fix_rows(policy.base.model)
    assert fixed_rows(policy.base.model) == 1


def test_a_row_that_leaves_changes_nothing_for_the_others() -> None:
    policy = tiny_policy("llama")
    asks, expected = asks_of(policy, [TextPrompt("Answer in one line.")], 5, 9)
    decoder = ContinuousDecoder(policy)
    decoder.join(asks)
    found: dict[int, list[list[int]]] = {id(ask): [[] for _ in range(ask.copies)] for ask in asks}
    for step in range(20):
        if step == 3:
            decoder.leave(asks[0])
            decoder.leave(asks[1], copy=0)
        for token in decoder.step():
            found[id(token.ask)][token.copy].append(token.token_id)
    assert decoder.num_rows == 0
    for ask, copies in list(zip(asks, expected, strict=True))[2:]:
        assert [tuple(each) for each in found[id(ask)]] == copies
    assert len(found[id(asks[0])][0]) == min(3, len(expected[0][0]))
    assert tuple(found[id(asks[1])][1]) == expected[1][1]


def test_logprobs_are_the_base_s_at_temperature_1() -> None:
    policy = tiny_policy("llama")
    prompt = TextPrompt("Answer in one line.")
    query = Query(messages=({"role": "user", "content": "the rain"},))
    with torch.no_grad():
        prefix = policy.prefix(prompt)
    sampling = SamplingSettings(temperature=0.5, max_tokens=6)
    ask = Ask(prefix, tuple(policy.query_ids(query, prompt)), sampling, 3, top_logprobs=4)
    decoder = ContinuousDecoder(policy)
    decoder.join([ask])
    tokens: list[Token] = []
    while decoder.num_rows:
        tokens += decoder.step()
    ids = [token.token_id for token in tokens]
    whole = [*policy.head_ids, *policy.slot_ids(prompt.init_text), *ask.query_ids, *ids]
    with torch.no_grad():
        logits = tiny_model("llama")(torch.tensor([whole])).logits[0].log_softmax(1)
    scores = logits[len(whole) - len(ids) - 1 : -1]
    for row, token in zip(scores, tokens, strict=True):
        assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-4)
        best = row.topk(4)
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [v for _, v in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_so_many_join_at_a_time_that_a_step_stays_small() -> None:
    def ask(tokens: int) -> Ask:
        policy_prefix = tiny_policy("llama").head_prefix()
        return Ask(policy_prefix, (5,) * tokens, SamplingSettings())

    assert ContinuousDecoder.prefilled_at_once([ask(100), ask(100), ask(100)]) == 2
    assert ContinuousDecoder.prefilled_at_once([ask(400), ask(1)]) == 1
    assert ContinuousDecoder.prefilled_at_once([]) == 0


def test_memory_is_given_back_when_all_rows_have_left() -> None:
    cache = RowCache()
    with pytest.raises(ValueError, match="no rows"):
        cache.data  # noqa: B018
    assert cache.drop([]) == []


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_in_bf16_draws_what_each_row_would_alone(smollm2_dir: object) -> None:
    policy = open_policy(ModelSettings(path="smollm2-135m"))
    if policy.base.dtype == torch.bfloat16:
        assert fix_rows(policy.base.model)
    prompts = [TextPrompt("Answer in one line."), TextPrompt("You are a pirate."), NonePrompt()]
    asks, expected = asks_of(policy, prompts, 6, 8)
    assert drawn(ContinuousDecoder(policy), asks) == expected
