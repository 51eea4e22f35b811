"""Several prompts in one batch of the native engine: what one prompt after the other draws.

By the C++ kernels tokens and log-probabilities are the same bits, where these multiply too. Written
out in matrix products, which sum in another order, log-probabilities of the tiny models are within
1e-9 in float64 and within 5e-5 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rlprompt.engines.base import Engine, Generation
from rlprompt.engines.cache import DecodeCache
from rlprompt.engines.decode_cpp import cpp_decoder
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.kernels.cpu import ops
from rlprompt.model.base import FrozenBase
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.chat.template import PLAIN
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import PrefixKV, Query
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.tiny import FAMILIES, tiny_tokenizer
from tests.invariants.oracle import QUERIES, TEXT, flat, policy_of, query, scores, soft_prompt

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")
STOPS = tuple(range(3, 300, 9))
SAMPLING = SamplingSettings(max_tokens=20, temperature=0.9, stop_token_ids=STOPS)
LONG = "and the men went in, and then the hand; she is out there, the sun and the rain and the land"


def mixed(policy: Policy) -> list[Prompt]:
    """Prompts of every kind and of lengths from a few tokens to many."""
    kinds = [name for name in KINDS if name not in ("lora", "ia3")]
    moved = [make(name, policy, noise=0.3, seed=i) for i, name in enumerate(kinds)]
    return [*moved, NonePrompt(), TextPrompt("a"), TextPrompt(LONG), soft_prompt(policy, LONG, 0.2)]


def both(
    policy: Policy,
    prompts: Sequence[Prompt],
    queries: Sequence[Query] = QUERIES,
    copies: int = 3,
    sampling: SamplingSettings = SAMPLING,
    **settings: Any,
) -> tuple[list[Generation], list[Generation]]:
    """What is drawn together, and one prompt after the other."""
    engine = NativeEngine(policy, NativeSettings(**settings))
    together = engine.generate_each(prompts, queries, copies, sampling, seed=4)
    apart = Engine.generate_each(engine, prompts, queries, copies, sampling, seed=4)
    return together, apart


def assert_same(drawn: tuple[list[Generation], list[Generation]], tolerance: float) -> None:
    together, apart = drawn
    assert len(together) == len(apart)
    for ours, theirs in zip(together, apart, strict=True):
        assert [g.query for g in ours.groups] == [g.query for g in theirs.groups]
        for group, expected in zip(ours.groups, theirs.groups, strict=True):
            for one, other in zip(group.completions, expected.completions, strict=True):
                assert one.token_ids == other.token_ids
                assert (one.text, one.terminated) == (other.text, other.terminated)
                assert one.sampling_logprobs == pytest.approx(
                    other.sampling_logprobs, abs=tolerance
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_all_kinds_and_lengths_together(family: str) -> None:
    policy = policy_of(family, torch.float64)
    assert_same(both(policy, mixed(policy), copies=2), 1e-9)


def test_in_float32_rows_end_at_all_times() -> None:
    policy = policy_of("llama")
    prompts = mixed(policy)
    drawn = both(policy, prompts)
    assert_same(drawn, 5e-5)
    assert len({policy.prefix_length(prompt) for prompt in prompts}) > 4
    assert len({str(each.groups) for each in drawn[0]}) > len(prompts) // 2
    ends = {len(c.token_ids) for each in drawn[0] for g in each.groups for c in g.completions}
    assert len(ends) > 4


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("one_call", [True, False], ids=["one call", "modules"])
def test_the_kernels_give_the_same_bits(family: str, one_call: bool) -> None:
    policy = policy_of(family, torch.bfloat16)
    together, apart = both(policy, mixed(policy), cpp_decode=one_call)
    assert together == apart


@needs_kernels
def test_bits_do_not_depend_on_threads() -> None:
    policy = policy_of("llama", torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together, apart = both(policy, mixed(policy)[::3], copies=2)
    finally:
        torch.set_num_threads(before)
    assert together == apart


@pytest.mark.parametrize("max_rows", [1, 2, 7, 9, 18, 40])
def test_turns_change_nothing(max_rows: int) -> None:
    policy = policy_of("llama", torch.float64)
    assert_same(both(policy, mixed(policy), max_rows=max_rows), 1e-9)


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_queries_and_completions(prompts: int, count: int, copies: int) -> None:
    policy = policy_of("gemma3", torch.float64)
    drawn = both(policy, mixed(policy)[-prompts:], QUERIES[:count], copies)
    assert_same(drawn, 1e-9)
    assert [len(each.groups) for each in drawn[0]] == [count] * prompts


def test_a_prompt_may_be_there_twice() -> None:
    policy = policy_of("llama", torch.float64)
    prompt = soft_prompt(policy, noise=0.2)
    first, between, again = both(policy, [prompt, NonePrompt(), prompt])[0]
    assert first.groups == again.groups != between.groups


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(max_tokens=1),
        SamplingSettings(temperature=0.0, max_tokens=12, min_tokens=12),
        SamplingSettings(top_k=5, top_p=0.9, min_p=0.01, max_tokens=12, stop_token_ids=STOPS),
        SamplingSettings(max_tokens=9, stop_token_ids=tuple(range(304))),
        SamplingSettings(max_tokens=36),  # the cache grows
    ],
    ids=["one token", "greedy", "truncated", "all end at once", "long"],
)
def test_every_way_to_draw(sampling: SamplingSettings) -> None:
    policy = policy_of("llama", torch.float64)
    assert_same(both(policy, mixed(policy), sampling=sampling), 1e-9)


def test_adapters_stand_alone_among_the_others() -> None:
    policy = policy_of("llama", torch.float64)
    adapters = [make(name, policy, noise=0.3, seed=i) for i, name in enumerate(("lora", "ia3"))]
    adapters.append(make("lora", policy, noise=0.3, seed=7))
    prompts = [adapters[0], TextPrompt(TEXT), adapters[1], soft_prompt(policy, noise=0.2)]
    prompts.append(adapters[2])
    drawn = both(policy, prompts)
    assert_same(drawn, 1e-9)
    assert len({str(each.groups) for each in drawn[0]}) == 5
    assert_same(both(policy, adapters), 1e-9)


@needs_kernels
def test_adapters_beside_others_keep_the_bits_of_the_kernels() -> None:
    policy = policy_of("llama", torch.bfloat16)
    adapters: list[Prompt] = [
        make("lora", policy, noise=0.3, seed=1),
        make("lora", policy, noise=0.3, seed=2),
    ]
    together, apart = both(policy, [*adapters, TextPrompt(TEXT), NonePrompt(), adapters[0]])
    assert together == apart
    assert together[0] == together[-1] != together[1]


def test_prompts_without_any_token() -> None:
    policy = Policy(policy_of("mistral").base, ChatSlot.from_tokenizer(tiny_tokenizer(), PLAIN))
    assert policy.prefix_length(NonePrompt()) == 0
    assert_same(both(policy, [NonePrompt(), TextPrompt(TEXT), NonePrompt()]), 1e-5)
    assert_same(both(policy, [NonePrompt(), NonePrompt()]), 1e-5)


def test_the_last_prompt_stays_synced() -> None:
    policy = policy_of("llama", torch.float64)
    engine = NativeEngine(policy)
    prompts = [NonePrompt(), TextPrompt(TEXT)]
    last = engine.generate_each(prompts, QUERIES, 2, SAMPLING, seed=0)[-1]
    assert_same(([engine.generate(QUERIES, 2, SAMPLING, seed=0)], [last]), 1e-9)


def test_a_later_update_of_an_adapter_is_not_drawn_under() -> None:
    policy = policy_of("llama", torch.float64)
    engine, prompt = NativeEngine(policy), make("lora", policy, noise=0.3)
    (before,) = engine.generate_each([prompt], QUERIES, 2, SAMPLING, seed=0)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.mul_(-2.0)
    assert engine.generate(QUERIES, 2, SAMPLING, seed=0) == before
    (after,) = engine.generate_each([prompt], QUERIES, 2, SAMPLING, seed=0)
    assert after != before


def test_one_forward_prefills_a_population(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the prompts, one for their queries, then one per token: none per prompt."""
    policy = policy_of("llama")
    prompts = [soft_prompt(policy, noise=0.1 * i) for i in range(16)]
    calls: list[int] = []
    hidden = PrefixForward.hidden

    def counted(self: PrefixForward, embeddings: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(len(embeddings))
        return hidden(self, embeddings, *others)

    monkeypatch.setattr(PrefixForward, "hidden", counted)
    engine = NativeEngine(policy)
    sampling = SamplingSettings(max_tokens=4, min_tokens=4)
    engine.generate_each(prompts, QUERIES, 2, sampling, seed=0)
    own = len(policy.head_ids) + prompts[0].num_virtual_tokens
    asked = sum(len(policy.query_ids(each, prompts[0])) for each in QUERIES)
    assert calls == [16 * own, 16 * asked, 96, 96, 96]


def test_a_class_that_makes_its_own_prefix_keeps_it() -> None:
    """Derived from a soft prompt, it would otherwise be drawn under as one."""

    class Louder(SoftPrompt):
        def prefix(self, conditioner: Any) -> PrefixKV:
            made = super().prefix(conditioner)
            return PrefixKV(made.keys, [2.0 * value for value in made.values])

    policy = policy_of("llama", torch.float64)
    plain = soft_prompt(policy, noise=0.2)
    louder = Louder(plain.embeddings)
    drawn = both(policy, [plain, louder, NonePrompt()])
    assert_same(drawn, 1e-9)
    assert drawn[0][0].groups != drawn[0][1].groups


def test_no_prompt_is_refused() -> None:
    engine = NativeEngine(policy_of("llama"))
    with pytest.raises(InputError, match="no prompt to draw under; give one"):
        engine.generate_each([], QUERIES, 1, SAMPLING, seed=0)
    with pytest.raises(InputError, match="no prompt to draw under; give one"):
        Engine.generate_each(engine, [], QUERIES, 1, SAMPLING, seed=0)


def test_what_generate_refuses_is_refused() -> None:
    engine = NativeEngine(policy_of("llama"))
    prompts = [NonePrompt(), TextPrompt(TEXT)]
    with pytest.raises(InputError, match="stop_token_ids"):
        unknown = SamplingSettings(stop_token_ids=(304,))
        engine.generate_each(prompts, QUERIES, 1, unknown, seed=0)
    with pytest.raises(InputError, match="shorten the query or max_tokens"):
        endless = SamplingSettings(max_tokens=500)
        engine.generate_each(prompts, [query("rain")], 1, endless, seed=0)


def test_only_the_prompt_that_leaves_no_room_is_too_long() -> None:
    policy = policy_of("llama")
    fits = policy.prefix_length(TextPrompt("a")) + len(policy.tail_ids(QUERIES[1].messages))
    sampling = SamplingSettings(max_tokens=512 - fits, temperature=0.0)
    engine = NativeEngine(policy)
    engine.generate_each([TextPrompt("a")], QUERIES[1:2], 1, sampling, seed=0)
    with pytest.raises(InputError, match="query 0 needs 5"):
        engine.generate_each([TextPrompt("a"), TextPrompt(LONG)], QUERIES[1:2], 1, sampling, seed=0)


def test_batches_are_whole_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    class Watched(DecodeCache):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            rows.append(self.num_rows)

    monkeypatch.setattr("rlprompt.engines.native.DecodeCache", Watched)
    policy = policy_of("llama")
    engine = NativeEngine(policy, NativeSettings(max_rows=20))
    prompts = [TextPrompt("a")] * 7
    engine.generate_each(prompts, QUERIES, 2, SamplingSettings(max_tokens=2), seed=0)
    assert rows == [18, 18, 6]


@needs_kernels
@pytest.mark.model
def test_the_real_model(smollm2: FrozenBase) -> None:
    """The same bits, where the kernels multiply; with AMX, oneDNN's depend on the number of rows.

    Everywhere, completions are drawn from what the training forward gives under each prompt.
    """
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer))
    prompts: list[Prompt] = [
        soft_prompt(policy, "You are a pirate.", 0.3),
        TextPrompt("Answer in one short sentence, and end it with a question about the weather."),
        NonePrompt(),
        soft_prompt(policy, "Be brief.", 0.1),
    ]
    asked = [query("What is the capital of France?"), query("Hi")]
    together, apart = both(policy, prompts, asked, 4, SamplingSettings(max_tokens=20))
    decoder = cpp_decoder(policy.forward, keep_bytes=2**20)
    if decoder is not None and decoder.store is not None:
        assert together == apart
    for prompt, generation in zip(prompts, together, strict=True):
        got = scores(policy, prompt, asked, [g.completions for g in generation.groups])
        drawn = [c for g in generation.groups for c in g.completions]
        sampled = torch.tensor([x for c in drawn for x in c.sampling_logprobs])
        # Where oneDNN multiplies with AMX, it rounds a token by the rows that it is given with.
        bound = 0.001 if decoder is not None and decoder.store is not None else 0.1
        assert (flat(got) - sampled).abs().mean() < bound
