"""Products of a rollout: where they stand, when they are taken, and that they change no bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from rlprompt.engines.base import Generation
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.cpu.product import MOST_ROWS
from rlprompt.model.base import FrozenBase
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.cpu.packed_linear import PackedWeight
from rlprompt.model.cpu.rollout_products import ProductStore, ProductWriter, RolloutProducts
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Completion, LowRank, PrefixKV, Query
from tests.fixtures.products import needs_products

ASKED = [Query(({"role": "user", "content": text},)) for text in ("Why is the sky blue?", "Hi")]
SAMPLING = SamplingSettings(max_tokens=12, min_tokens=3)


def _product(inputs: int, outputs: int) -> PackedWeight:
    return PackedWeight([nn.Linear(inputs, outputs, bias=False)])


def _prefix(value: float = 0.0) -> PrefixKV:
    return PrefixKV([torch.full((2, 3, 4), value)], [torch.zeros(2, 3, 4)])


def _completion(tokens: int) -> Completion:
    return Completion(tuple(range(tokens)), (0.0,) * tokens, "", False)


def _started(
    store: ProductStore, most_tokens: int, prefix: PrefixKV | None = None
) -> ProductWriter:
    writer = store.start(prefix or _prefix(), most_tokens)
    assert writer is not None
    return writer


def test_the_most_work_per_byte_is_kept_within_the_limit() -> None:
    qkv, out, down = products = [_product(8, 24), _product(8, 8), _product(32, 8)]
    sizes = {product: 2 * 10 * product.outputs for product in products}
    for limit, kept in (
        (sizes[down], {down}),
        (sizes[down] + sizes[out], {down, out}),
        (sum(sizes.values()), {down, out, qkv}),
    ):
        store = ProductStore(products, products, limit)
        _started(store, 10)
        tensors = store.tensors()
        pairs = list(zip(products, tensors, strict=True))
        assert {product for product, tensor in pairs if tensor is not None} == kept
    assert all(t is not None and t.shape == (10, p.outputs) for p, t in pairs)
    assert ProductStore(products, products, sizes[down] - 1).start(_prefix(), 10) is None
    only = ProductStore(products, products[:1], 10**6)
    _started(only, 10)
    assert [tensor is not None for tensor in only.tensors()] == [True, False, False]


def _written(
    adapter: _Adapter | None = None,
) -> tuple[PackedWeight, ProductStore, RolloutProducts, list[Completion]]:
    """Three rows, of 3 tokens, of 1 and of 3: the third takes the second's place in step 0.

    What the product gives for a token is 10 * row + step.
    """
    product = _product(8, 4)
    store = ProductStore([product], [product], 10**6)
    writer = _started(store, 6, replace(_prefix(), adapter=adapter))
    writer.begin_turn(3, 3)
    for step, rows in enumerate(([0, 2], [0, 2])):
        kept = writer.begin_step(torch.tensor(rows), step)
        assert kept is not None and kept.first == 2 * step
        (tensor,) = kept.tensors
        assert tensor is not None
        values = torch.tensor([10.0 * row + step for row in rows])
        tensor[kept.first : kept.first + 2] = values[:, None]
    done = [_completion(3), _completion(1), _completion(3)]
    writer.end_turn(done)
    return product, store, writer.finish(), done


def test_a_forward_gets_the_rows_of_its_tokens() -> None:
    product, _, products, done = _written()
    rows = products.rows([done[2], done[1], done[0]], _prefix(), num_queries=5)
    assert rows is not None and (rows.num_computed, rows.num_tokens) == (5, 9)
    taken = rows.take(product)
    assert taken is not None and taken.shape == (9, 4)
    assert torch.equal(
        taken[5:], torch.tensor([20.0, 21.0, 0.0, 1.0]).bfloat16()[:, None].expand(-1, 4)
    )
    assert rows.take(_product(8, 4)) is None  # another one


def test_a_product_is_computed_where_nothing_is_known() -> None:
    base = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    packed, x = PackedWeight([base]), torch.randn(1, 9, 64).bfloat16()
    store = ProductStore([packed], [packed], 10**6)
    writer = _started(store, 4)
    writer.begin_turn(1, 5)
    for step in range(4):
        kept = writer.begin_step(torch.tensor([0]), step)
        assert kept is not None and kept.tensors[0] is not None
        kept.tensors[0][kept.first] = 7.0
    done = [_completion(5)]
    writer.end_turn(done)
    rows = writer.finish().rows(done, _prefix(), num_queries=5)
    assert rows is not None
    with torch.no_grad():
        whole, count = packed.forward_or_take(x, None)
        assert count == 9 and torch.equal(whole, packed.forward(x))
        part, count = packed.forward_or_take(x, rows)
        assert count == 5 and part.shape == whole.shape
        assert torch.equal(part[0, :5], packed.forward(x[0, :5])) and bool((part[0, 5:] == 7).all())
        _started(store, 4)
        again, count = packed.forward_or_take(x, rows)
        assert count == 9 and torch.equal(again, whole)


def test_nothing_is_taken_for_others_or_under_another_prefix() -> None:
    _, _, products, done = _written()
    for rows, prefix in (
        ([*done, _completion(3)], _prefix()),
        ([replace(each) for each in done], _prefix()),  # equal, and perhaps of another query
        (done, _prefix(1.0)),
        (done, _prefix().cut(2)),
    ):
        assert products.rows(rows, prefix, num_queries=5) is None
    assert products.rows(done, _prefix(), num_queries=5) is not None


@pytest.mark.parametrize("most_tokens", [6, 8])
def test_a_batch_notices_that_its_memory_has_been_filled_again(most_tokens: int) -> None:
    product, store, products, done = _written()
    rows = products.rows(done, _prefix(), num_queries=5)
    assert rows is not None and rows.take(product) is not None
    _started(store, most_tokens)
    assert products.rows(done, _prefix(), num_queries=5) is None
    assert rows.take(product) is None  # a forward that has begun computes the rest


def test_a_rollout_writes_nothing_once_a_later_one_has_the_memory() -> None:
    product = _product(8, 4)
    store = ProductStore([product], [product], 10**6)
    first = _started(store, 6)
    first.begin_turn(1, 3)
    assert first.begin_step(torch.tensor([0]), 0) is not None
    _started(store, 6)
    assert first.begin_step(torch.tensor([0]), 1) is None
    done = [_completion(3)]
    first.end_turn(done)
    assert first.finish().rows(done, _prefix(), num_queries=5) is None


def test_what_one_thread_takes_another_never_overwrites() -> None:
    """A reader beside a writer gets the rows of its own rollout, or nothing."""
    product = _product(8, 512)
    store = ProductStore([product], [product], 2**30)
    end = threading.Event()
    written: list[tuple[RolloutProducts, list[Completion], int]] = []

    def write() -> None:
        while not end.is_set():
            value = len(written) % 200
            writer = _started(store, 8 * MOST_ROWS)
            writer.begin_turn(MOST_ROWS, 9)
            for step in range(8):
                kept = writer.begin_step(torch.arange(MOST_ROWS), step)
                assert kept is not None and kept.tensors[0] is not None
                kept.tensors[0][kept.first : kept.first + MOST_ROWS] = value
            done = [_completion(9) for _ in range(MOST_ROWS)]
            writer.end_turn(done)
            written.append((writer.finish(), done, value))
            time.sleep(0.002)

    thread = threading.Thread(target=write)
    thread.start()
    prefix, taken, deadline = _prefix(), 0, time.monotonic() + 20
    try:
        while taken < 100 and time.monotonic() < deadline:
            if not written:
                continue
            products, done, value = written[-1]
            rows = products.rows(done, prefix, num_queries=0)
            out = None if rows is None else rows.take(product)
            if out is not None:
                taken += 1
                assert bool((out == value).all())
    finally:
        end.set()
        thread.join()
    assert taken > 0 and len(written) > 1


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
    _, _, products, done = _written(_adapter())
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
        assert (products.rows(done, prefix, num_queries=5) is not None) is same
    _, _, plain, done = _written()
    assert plain.rows(done, replace(_prefix(), adapter=_adapter()), num_queries=5) is None


def test_a_completion_that_was_kept_in_part_is_not_known() -> None:
    product = _product(8, 4)
    writer = _started(ProductStore([product], [product], 10**6), 6)
    writer.begin_turn(1, 3)
    assert writer.begin_step(torch.tensor([0]), 1) is not None
    done = [_completion(3)]
    writer.end_turn(done)
    assert writer.finish().rows(done, _prefix(), num_queries=5) is None


def test_steps_that_onednn_multiplies_are_not_kept() -> None:
    product = _product(8, 4)
    writer = _started(ProductStore([product], [product], 10**6), 2 * MOST_ROWS)
    writer.begin_turn(MOST_ROWS + 1, 2)
    assert writer.begin_step(torch.arange(MOST_ROWS + 1), 0) is None
    assert writer.begin_step(torch.arange(MOST_ROWS), 0) is not None


def _drawn(policy: Policy, mib: int, keep_products: bool = True) -> Generation:
    engine = NativeEngine(policy, NativeSettings(reuse_mib=mib))
    engine.sync(policy.prompt)
    return engine.generate(ASKED, 3, SAMPLING, seed=1, keep_products=keep_products)


def _learned(policy: Policy, drawn: Generation) -> tuple[bool, Tensor, Sequence[Tensor]]:
    """Whether products were taken, log-probabilities, and gradients of the prefix."""
    shared = policy.shared_prefix()
    completions = [list(group.completions) for group in drawn.groups]
    tree = policy.tree([group.query for group in drawn.groups], completions, shared.leaves)
    rows = None
    if drawn.products is not None:
        flat = [each for group in completions for each in group]
        rows = drawn.products.rows(flat, shared.leaves, tree.queries.num_tokens)
    scores = policy.logprobs(tree, shared.leaves, products=rows)
    for parameter in policy.parameters():
        parameter.grad = None
    scores.logprobs.square().sum().backward()
    leaves = [*shared.leaves.keys, *shared.leaves.values, *policy.parameters()]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return rows is not None, scores.logprobs.detach(), gradients


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


@needs_products
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
    plain = _drawn(policy, 0)
    assert plain.products is None
    expected = _learned(policy, plain)
    drawn = _drawn(policy, mib)
    assert drawn == plain
    rows: list[int] = []
    forward = PackedWeight.forward

    def counted(packed: PackedWeight, x: Tensor) -> Tensor:
        rows.append(x.numel() // x.shape[-1])
        return forward(packed, x)

    monkeypatch.setattr(PackedWeight, "forward", counted)
    found = _learned(policy, drawn)
    assert found[0] and not expected[0] and len(found[2]) == len(expected[2]) >= 60
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))
    tokens = sum(len(c.token_ids) - 1 for group in drawn.groups for c in group.completions)
    queries = sum(len(policy.query_ids(query)) for query in ASKED)
    assert rows.count(queries) >= (120 if mib == 64 else 1)
    whole = sum(count == queries + tokens for count in rows)
    assert whole == 0 if mib == 64 else 0 < whole < 120
    # An update has changed the prompt: nothing of it holds any more.
    with torch.no_grad():
        policy.parameters()[0].add_(0.1)
    assert not _learned(policy, drawn)[0]


@needs_products
@pytest.mark.model
def test_nothing_is_kept_unless_it_is_asked_for(smollm2: FrozenBase) -> None:
    policy = Policy(smollm2, ChatSlot.from_tokenizer(smollm2.tokenizer), TextPrompt("be brief"))
    kept, others = _drawn(policy, 64), _drawn(policy, 64, keep_products=False)
    assert others == kept
    assert kept.products is not None and others.products is None
    # Equal text that was drawn elsewhere is not what was kept.
    assert not _learned(policy, replace(others, products=kept.products))[0]
