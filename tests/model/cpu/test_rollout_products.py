"""Products of a rollout: where they stand, when they are taken, and that they change no bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.cpu import ops
from rlprompt.model.base import FrozenBase
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.packed_linear import PackedWeight
from rlprompt.model.cpu.rollout_products import (
    Recording,
    current_replay,
    is_wanted,
    to_be_learned_from,
)
from rlprompt.model.files.fetch import cache_dir
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Completion, Group, LowRank, PrefixKV, Query

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")
ASKED = [Query(({"role": "user", "content": text},)) for text in ("Why is the sky blue?", "Hi")]
SAMPLING = SamplingSettings(max_tokens=12, min_tokens=3)


@dataclass(frozen=True)
class _Product:
    name: str
    inputs: int
    outputs: int


def _prefix(value: float = 0.0) -> PrefixKV:
    return PrefixKV([torch.full((2, 3, 4), value)], [torch.zeros(2, 3, 4)])


def _completion(tokens: int) -> Completion:
    return Completion(tuple(range(tokens)), (0.0,) * tokens, "", False)


def test_the_most_work_per_byte_is_kept_within_the_limit() -> None:
    products = [_Product("qkv", 8, 24), _Product("out", 8, 8), _Product("down", 32, 8)]
    sizes = {"down": 2 * 10 * 8, "out": 2 * 10 * 8, "qkv": 2 * 10 * 24}
    for limit, kept in (
        (sizes["down"] - 1, set()),
        (sizes["down"], {"down"}),
        (sizes["down"] + sizes["out"], {"down", "out"}),
        (sum(sizes.values()), {"down", "out", "qkv"}),
    ):
        recording = Recording(products, products, limit)
        recording.start(_prefix(), 10)
        stores = recording.stores()
        found = {p.name for p, s in zip(products, stores, strict=bool(stores)) if s is not None}
        assert found == kept
    assert all(
        s is None or s.shape == (10, p.outputs) for p, s in zip(products, stores, strict=True)
    )
    only = Recording(products, products[:1], 10**6)
    only.start(_prefix(), 10)
    assert [store is not None for store in only.stores()] == [True, False, False]


def _recorded(adapter: _Adapter | None = None) -> tuple[Recording, list[Completion]]:
    """Three rows, of 3 tokens, of 1 and of 3: the third takes the second's place in step 0."""
    recording = Recording([_Product("down", 8, 4)], [_Product("down", 8, 4)], 10**6)
    recording.start(replace(_prefix(), adapter=adapter), 6)
    recording.begin_turn(3, 3)
    for step, rows in enumerate(([0, 2], [0, 2])):
        recording.begin_step(torch.tensor(rows), step)
        assert recording.take() == 2 * step
    done = [_completion(3), _completion(1), _completion(3)]
    recording.end_turn(done)
    return recording, done


def test_a_replay_says_where_each_token_stands() -> None:
    recording, done = _recorded()
    with recording.replayed([done[2], done[1], done[0]], _prefix(), num_queries=5) as replays:
        replay = current_replay()
        assert replays and replay is not None and replay.first == 5
        assert replay.places.tolist() == [1, 3, 0, 2]
        assert replay.rows(_Product("down", 8, 4), 9) is recording.stores()[0]
        assert replay.rows(_Product("down", 8, 4), 8) is None  # another forward
        assert replay.rows(_Product("up", 8, 4), 9) is None
    assert current_replay() is None


def test_nothing_is_replayed_for_others_or_under_another_prefix() -> None:
    recording, done = _recorded()
    for rows, prefix in (
        ([*done, _completion(3)], _prefix()),
        (done, _prefix(1.0)),
        (done, _prefix().cut(2)),
    ):
        with recording.replayed(rows, prefix, num_queries=5) as replays:
            assert not replays and current_replay() is None
    recording.start(_prefix(), 6)  # the next rollout
    with recording.replayed(done, _prefix(), num_queries=5) as replays:
        assert not replays


@dataclass(frozen=True)
class _Adapter:
    parts: dict[str, LowRank] | None

    def attach(self, model: nn.Module) -> Callable[[], None]:
        raise NotImplementedError

    def snapshot(self) -> _Adapter:
        return self

    def low_rank(self) -> dict[str, LowRank] | None:
        return self.parts


def _adapter(down: float = 1.0, up: float = 1.0, scale: float = 2.0, name: str = "q") -> _Adapter:
    part = LowRank(torch.full((2, 4), down), torch.full((3, 2), up), scale)
    return _Adapter({name: part})


def test_an_adapter_has_to_add_the_same_bit_for_bit() -> None:
    recording, done = _recorded(_adapter())
    for adapter, same in (
        (_adapter(), True),
        (None, False),
        (_Adapter(None), False),
        (_adapter(down=1.0 + 1e-6), False),
        (_adapter(up=0.0), False),
        (_adapter(scale=1.0), False),
        (_adapter(name="k"), False),
    ):
        prefix = replace(_prefix(), adapter=adapter)
        with recording.replayed(done, prefix, num_queries=5) as replays:
            assert replays is same
    plain, done = _recorded()
    with plain.replayed(done, replace(_prefix(), adapter=_adapter()), num_queries=5) as replays:
        assert not replays


def test_a_completion_that_was_kept_in_part_is_not_known() -> None:
    recording = Recording([_Product("down", 8, 4)], [_Product("down", 8, 4)], 10**6)
    recording.start(_prefix(), 6)
    recording.begin_turn(1, 3)
    recording.begin_step(torch.tensor([0]), 1)
    recording.take()
    done = [_completion(3)]
    recording.end_turn(done)
    with recording.replayed(done, _prefix(), num_queries=5) as replays:
        assert not replays


def test_only_rollouts_to_learn_from_are_wanted() -> None:
    assert not is_wanted()
    with to_be_learned_from():
        assert is_wanted()
    assert not is_wanted()


def _drawn(policy: Policy, prompt: Prompt, mib: int, learns: bool = True) -> list[Group]:
    engine = NativeEngine(policy, NativeSettings(reuse_mib=mib))
    engine.sync(prompt)
    if not learns:
        return engine.generate(ASKED, 3, SAMPLING, seed=1)
    with to_be_learned_from():
        engine.generate(ASKED, 3, SAMPLING, seed=0)  # the step is chosen in the first rollout
        return engine.generate(ASKED, 3, SAMPLING, seed=1)


def _learned(policy: Policy, groups: list[Group]) -> tuple[bool, Tensor, list[Tensor]]:
    """Whether products were taken, log-probabilities, and gradients of the prefix."""
    shared = policy.shared_prefix()
    drawn = [list(group.completions) for group in groups]
    tree = policy.tree([group.query for group in groups], drawn, shared.leaves)
    with policy.replayed(tree, drawn, shared.leaves) as replays:
        scores = policy.logprobs(tree, shared.leaves)
    for parameter in policy.parameters():
        parameter.grad = None
    scores.logprobs.square().sum().backward()
    leaves = [*shared.leaves.keys, *shared.leaves.values, *policy.parameters()]
    return replays, scores.logprobs, [leaf.grad for leaf in leaves if leaf.grad is not None]


def _soft(policy: Policy) -> Prompt:
    return SoftPrompt.create(SoftSettings(num_virtual_tokens=4), policy, 0)


def _lora(policy: Policy) -> Prompt:
    targets = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    settings = AdapterSettings(text="be brief", method=LoRASettings(target_modules=targets))
    prompt = AdapterPrompt.create(settings, policy, 0)
    generator = torch.Generator().manual_seed(0)
    for name, weight in prompt.adapter.weights.items():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.02, generator=generator)
    return prompt


@needs_kernels
@pytest.mark.model
@pytest.mark.parametrize("made", [_soft, _lora])
@pytest.mark.parametrize("mib", [1, 64])
def test_an_update_takes_them_and_no_bit_changes(
    smollm2: FrozenBase,
    made: Callable[[Policy], Prompt],
    mib: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer))
    policy.prompt = made(policy)
    plain = _drawn(policy, policy.prompt, 0)
    assert policy.recording is None
    expected = _learned(policy, plain)
    groups = _drawn(policy, policy.prompt, mib)
    assert groups == plain
    rows: list[int] = []
    product = PackedWeight._product

    def counted(packed: PackedWeight, x: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return product(packed, x)

    monkeypatch.setattr(PackedWeight, "_product", counted)
    found = _learned(policy, groups)
    assert found[0] and not expected[0] and len(found[2]) == len(expected[2]) >= 60
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))
    tokens = sum(len(c.token_ids) - 1 for group in groups for c in group.completions)
    queries = sum(len(policy.query_ids(query)) for query in ASKED)
    assert rows.count(queries) >= (120 if mib == 64 else 1)
    whole = sum(count == queries + tokens for count in rows)
    assert whole == 0 if mib == 64 else 0 < whole < 120
    # An update has changed the prompt: nothing of it holds any more.
    with torch.no_grad():
        policy.parameters()[0].add_(0.1)
    assert not _learned(policy, groups)[0]


@needs_kernels
@pytest.mark.model
def test_nothing_is_kept_of_an_evaluation_or_an_equal_text_drawn_elsewhere(
    smollm2: FrozenBase,
) -> None:
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer), TextPrompt("be brief"))
    groups = _drawn(policy, policy.prompt, 64)
    others = _drawn(policy, policy.prompt, 64, learns=False)
    assert others == groups
    shared = policy.prefix(policy.prompt)
    drawn = [list(group.completions) for group in others]
    tree = policy.tree(ASKED, drawn, shared)
    with policy.replayed(tree, drawn, shared) as replays:
        assert not replays
