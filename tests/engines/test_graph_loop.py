"""Recorded decode steps: the plain loop's tokens and log-probabilities, bit for bit.

Without a GPU a recording is a plain call of the function that would be recorded. Two things differ
from the plain loop then: rows go in buckets, and what has ended is seen every few tokens only. With
neither, shapes are the plain loop's and so are the bits, whatever multiplies. With both, a product
may have more rows, which changes its last digits where a library picks its order of sums by their
number; so in those tests both sides multiply each row by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlprompt.engines.base import Generation
from rlprompt.engines.capture import (
    Capture,
    CudaCapture,
    Function,
    HostDecisionError,
    call_plainly,
    warm_up,
)
from rlprompt.engines.graph_loop import (
    GraphLimits,
    GraphLoop,
    column_bucket,
    graph_loop,
    row_bucket,
)
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.tiny import FAMILIES
from tests.invariants.oracle import QUERIES, TEXT, policy_of

STOPS = tuple(range(3, 300, 9))
"""One token in nine: rows end at all times."""
EXACT: dict[str, Any] = {"check_every": 1, "rows": lambda rows: rows}
ROOM = 2**30


class RowByRow(TorchDispatchMode):
    """Every product is sums of its own for each number: no row knows how many are beside it, nor
    where it stands among them."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.linear.default:
            made = row_by_row(args[0], args[1])
            return made + args[2] if len(args) > 2 and args[2] is not None else made
        if func in PRODUCTS and args[1].ndim == 2:
            return row_by_row(args[0], args[1].t())
        return func(*args, **(kwargs or {}))


def each_row_alone() -> RowByRow:
    return RowByRow()  # type: ignore[no-untyped-call]  # torch's base class has no types


PRODUCTS = (torch.ops.aten.matmul.default, torch.ops.aten.mm.default)


def row_by_row(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`functional.linear` without a bias."""
    return (x[..., None, :] * weight).contiguous().sum(-1)


def warmed(function: Function, undo: Function) -> Function:
    """What a CUDA capture does before it records, and a plain call in place of the recording."""
    warm_up(function, undo)
    return function


def loop_of(
    policy: Policy, capture: Capture = warmed, is_required: bool = True, **limits: Any
) -> GraphLoop:
    """Recorded steps, an error where they cannot be."""
    given = GraphLimits(**{"most_bytes": ROOM, **limits})
    return GraphLoop(policy.forward, given, lambda: capture, is_required)


def engines(
    policy: Policy, prompt: Prompt, settings: NativeSettings | None = None, **limits: Any
) -> tuple[NativeEngine, NativeEngine]:
    """The plain loop's and the recorded one's, under one prompt."""
    made = (
        NativeEngine(policy, settings),
        NativeEngine(policy, settings, loop_of(policy, **limits)),
    )
    for engine in made:
        engine.sync(prompt)
    return made


def drawn(engine: NativeEngine, sampling: SamplingSettings, seed: int = 0) -> Generation:
    return engine.generate(QUERIES, 5, sampling, seed)


def lengths(made: Generation) -> list[int]:
    return [len(c.token_ids) for group in made.groups for c in group.completions]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.7, "top_p": 0.9},
    "hot": {"temperature": 1.6, "top_k": 20},
    "all": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    "late": {"min_tokens": 10},
    "late and cut": {"min_tokens": 9, "top_k": 3, "temperature": 1.3},
    "endless": {"stop_token_ids": ()},
    "two": {"max_tokens": 2},
}


def sampling_of(name: str) -> SamplingSettings:
    return SamplingSettings(**{"max_tokens": 21, "stop_token_ids": STOPS, **SAMPLINGS[name]})


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_plain_loops_shapes_the_bits_are_its_own(family: str) -> None:
    """Every family: sliding windows, soft caps and heads that share keys among them."""
    plain, recorded = engines(policy_of(family), TextPrompt(TEXT), **EXACT)
    for seed in range(2):
        expected = drawn(plain, sampling_of("plain"), seed)
        assert drawn(recorded, sampling_of("plain"), seed) == expected
        assert len(set(lengths(expected))) > 1


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "ia3"])
def test_under_every_kind_of_prompt(kind: str) -> None:
    policy = policy_of("qwen2")
    prompt = make(kind, policy, noise=0.3)
    plain, recorded = engines(policy, prompt, **EXACT)
    for seed in range(2):  # the second time by what is recorded already, under a moved prompt
        prompt = make(kind, policy, noise=0.3, seed=seed)
        for engine in (plain, recorded):
            engine.sync(prompt)
        expected = drawn(plain, sampling_of("plain"), seed)
        assert drawn(recorded, sampling_of("plain"), seed) == expected


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_in_buckets_and_late_looks_change_no_bit(name: str) -> None:
    policy = policy_of("llama")
    sampling = sampling_of(name)
    plain, *recorded = (
        *engines(policy, TextPrompt(TEXT), check_every=8),
        engines(policy, TextPrompt(TEXT), check_every=3)[1],
        engines(policy, TextPrompt(TEXT), check_every=64)[1],
    )
    with each_row_alone():
        for seed in range(2):
            expected = drawn(plain, sampling, seed)
            for engine in recorded[: 1 if seed else None]:
                assert drawn(engine, sampling, seed) == expected


def test_rows_that_end_early_are_many() -> None:
    """What the test above is about does happen: rows end at many times, and leave holes."""
    made = lengths(drawn(engines(policy_of("llama"), TextPrompt(TEXT))[0], sampling_of("plain")))
    assert len(set(made)) > 5 and min(made) < 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_other_precisions(dtype: torch.dtype) -> None:
    policy = policy_of("phi3", dtype)
    plain, recorded = engines(policy, TextPrompt(TEXT))
    if policy.forward.cpp:
        pytest.skip("the C++ kernels decode this base")
    with each_row_alone():
        for name in ("plain", "cold"):
            assert drawn(recorded, sampling_of(name)) == drawn(plain, sampling_of(name))


def test_several_turns_and_several_prompts_at_once() -> None:
    policy = policy_of("llama")
    settings = NativeSettings(max_rows=6)
    plain, recorded = engines(policy, TextPrompt(TEXT), settings)
    prompts = [TextPrompt(TEXT), NonePrompt(), make("soft", policy, 0.3), make("lora", policy, 0.3)]
    with each_row_alone():
        assert drawn(recorded, sampling_of("plain")) == drawn(plain, sampling_of("plain"))
        ours, theirs = (
            engine.generate_each(prompts, QUERIES, 2, sampling_of("cold"), 1)
            for engine in (recorded, plain)
        )
    assert ours == theirs


def test_long_completions_cross_buckets_of_columns() -> None:
    policy = policy_of("llama")
    sampling = SamplingSettings(max_tokens=90, temperature=0.5)
    plain, recorded = engines(policy, TextPrompt(TEXT), columns=lambda columns: columns // 16 * 32)
    with each_row_alone():
        expected, made = (each.generate(QUERIES, 1, sampling, 0) for each in (plain, recorded))
    assert made == expected
    assert max(lengths(expected)) > 64


def test_recordings_are_used_again_and_are_not_too_many() -> None:
    policy = policy_of("llama")
    made: list[int] = []

    def counted(function: Function, undo: Function) -> Function:
        made.append(1)
        return warmed(function, undo)

    graphs = loop_of(policy, counted, most_graphs=3)
    engine = NativeEngine(policy, graphs=graphs)
    engine.sync(TextPrompt(TEXT))
    sampling = SamplingSettings(max_tokens=21, temperature=0.0, stop_token_ids=STOPS)
    drawn(engine, sampling)
    first = len(made)
    assert 1 < first <= 3
    drawn(engine, sampling, seed=1)
    shorter = sampling.model_copy(update={"max_tokens": 13})
    drawn(engine, shorter)
    assert len(made) == first == graphs.num_graphs
    for temperature in (0.5, 0.6, 0.7):
        drawn(engine, sampling.model_copy(update={"temperature": temperature}))
    assert len(made) > 3 and graphs.num_graphs == 3


def test_an_adapter_that_trains_is_recorded_once() -> None:
    policy = policy_of("llama")
    made: list[int] = []

    def counted(function: Function, undo: Function) -> Function:
        made.append(1)
        return function

    engine = NativeEngine(policy, graphs=loop_of(policy, counted))
    results = []
    for seed in range(3):
        engine.sync(make("lora", policy, noise=0.5, seed=seed))
        results.append(drawn(engine, sampling_of("endless")))
    assert len(made) == 1
    assert results[0] != results[1] != results[2]
    engine.sync(make("lora", policy, 0.5, method={"type": "lora", "rank": 3}))
    drawn(engine, sampling_of("endless"))
    assert len(made) == 2


def test_what_an_earlier_rollout_left_is_not_seen() -> None:
    """A prompt that has become NaN leaves NaN in the fixed memory; a mask does not hide it."""
    policy = policy_of("llama")
    graphs = loop_of(policy)
    plain, recorded = NativeEngine(policy), NativeEngine(policy, graphs=graphs)
    for engine in (plain, recorded):
        engine.sync(TextPrompt(TEXT))
    drawn(recorded, sampling_of("endless"))
    assert graphs._memory is not None
    with torch.inference_mode():
        graphs._memory.data.fill_(torch.nan)
    with each_row_alone():
        expected = drawn(plain, sampling_of("plain"))
        assert drawn(recorded, sampling_of("plain")) == expected


def test_a_listener_hears_each_token_and_progress_is_the_plain_loops() -> None:
    policy = policy_of("llama")
    both = engines(policy, TextPrompt(TEXT), **EXACT)
    heard: list[list[int]] = [[], []]
    said: list[list[tuple[int, int]]] = [[], []]
    for number, engine in enumerate(both):
        engine.generate_one(QUERIES[0], sampling_of("plain"), 3, heard[number].append)
        engine.generate(
            QUERIES, 1, sampling_of("plain"), 0, lambda *now, at=number: said[at].append(now)
        )
    assert heard[0] == heard[1] and len(heard[0]) > 1
    assert said[0] == said[1] and len(said[0]) > 1


def test_a_listener_may_end_the_draw() -> None:
    engine = engines(policy_of("llama"), TextPrompt(TEXT))[1]
    heard: list[int] = []

    def listen(token: int) -> None:
        heard.append(token)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate_one(QUERIES[0], sampling_of("endless"), 3, listen)
    assert len(heard) == 3
    again = [
        e.generate_one(QUERIES[0], sampling_of("endless"), 3, lambda _: None)
        for e in (engine, engines(policy_of("llama"), TextPrompt(TEXT))[1])
    ]
    assert again[0] == again[1] and list(again[0].token_ids[:3]) == heard


def failing_after(count: int) -> Capture:
    """A recorder that works so many times."""
    left = [count]

    def capture(function: Function, undo: Function) -> Function:
        function()  # half of a warm-up has run when it fails
        if not left[0]:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        left[0] -= 1
        undo()
        return function

    return capture


@pytest.mark.parametrize("works", [0, 1], ids=["at once", "in the middle"])
def test_what_cannot_be_recorded_is_called_plainly(
    works: int, caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of("llama")
    plain, recorded = engines(
        policy, TextPrompt(TEXT), capture=failing_after(works), is_required=False
    )
    with each_row_alone(), caplog.at_level(logging.WARNING):
        for seed in range(3):
            assert drawn(recorded, sampling_of("plain"), seed) == drawn(
                plain, sampling_of("plain"), seed
            )
    assert [record.getMessage() for record in caplog.records] == [
        "decoding without CUDA graphs: a step of this base cannot be recorded (RuntimeError: CUDA "
        "error: operation not permitted when stream is capturing)"
    ]


@contextmanager
def deciding(policy: Policy) -> Iterator[None]:
    """Inside it a layer takes a decision by numbers, as a router of experts may."""

    def decide(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 2.0 if bool(output.isnan().any()) else output

    handle = next(iter(policy.base.model.get_decoder().layers)).mlp.register_forward_hook(decide)
    try:
        yield
    finally:
        handle.remove()


def test_a_base_that_decides_by_numbers_is_found_out_before_it_is_recorded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = policy_of("llama")
    with deciding(policy), each_row_alone():
        plain, recorded = engines(policy, TextPrompt(TEXT), is_required=False)
        expected = drawn(plain, sampling_of("plain"))
        assert drawn(recorded, sampling_of("plain")) == expected
    (record,) = caplog.records
    assert "HostDecisionError" in record.getMessage()
    assert "makes Python wait for numbers from the device" in record.getMessage()


def test_a_warm_up_undoes_both_calls() -> None:
    number = torch.zeros(1)

    def step() -> None:
        number.add_(1)

    def undo() -> None:
        number.sub_(1)

    warm_up(step, undo)
    assert float(number) == 0.0

    def decide() -> None:
        number.add_(float(number))

    with pytest.raises(HostDecisionError, match="makes Python wait"):
        warm_up(decide, undo)


def test_too_much_memory_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    plain, recorded = engines(policy, TextPrompt(TEXT), most_bytes=2**19, is_required=False)
    for _ in range(2):
        assert drawn(recorded, sampling_of("plain")) == drawn(plain, sampling_of("plain"))
    (record,) = caplog.records  # 2 layers x (keys, values) x 2 heads x 16 x 4 bytes x 16 x 128
    assert "1 MiB of keys and values at fixed addresses for 16 rows are more than the 0 MiB" in (
        record.getMessage()
    )
    assert "engine.max_rows" in record.getMessage()


def test_memory_grows_and_starts_anew_where_both_do_not_fit() -> None:
    policy = policy_of("llama")
    per_column = 2 * 2 * 2 * 16 * 4
    graphs = loop_of(policy, most_bytes=per_column * 16 * 256)
    engine, plain = NativeEngine(policy, graphs=graphs), NativeEngine(policy)
    for each in (engine, plain):
        each.sync(TextPrompt(TEXT))
    short, long = SamplingSettings(max_tokens=4), SamplingSettings(max_tokens=100)
    with each_row_alone():
        for copies, sampling, held in [
            (5, short, (16, 128)),
            (1, long, (16, 256)),
            (10, short, (32, 128)),
            (1, long, (3, 256)),
        ]:
            made, expected = (
                each.generate(QUERIES, copies, sampling, 0) for each in (engine, plain)
            )
            assert made == expected
            assert graphs._memory is not None
            assert (graphs._memory.rows, graphs._memory.columns) == held


def test_ia3_is_decoded_plainly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    plain, recorded = engines(policy, make("ia3", policy, 0.3), is_required=False)
    assert drawn(recorded, sampling_of("plain")) == drawn(plain, sampling_of("plain"))
    (record,) = caplog.records
    assert record.getMessage().endswith("the adapter is not of low rank, as LoRA is")


def test_what_is_asked_for_and_cannot_be_is_refused() -> None:
    policy = policy_of("llama")
    if policy.device.type == "cpu":
        with pytest.raises(InputError, match=r"engine\.cuda_graphs is on, but the base is on cpu"):
            NativeEngine(policy, NativeSettings(cuda_graphs="on"))
        assert graph_loop(policy.forward, "auto") is None
    assert graph_loop(policy.forward, "off") is None
    required = GraphLoop(policy.forward, GraphLimits(ROOM), lambda: failing_after(0), True)
    engine = NativeEngine(policy, graphs=required)
    engine.sync(TextPrompt(TEXT))
    with pytest.raises(InputError, match=r"engine\.cuda_graphs is on, but a step of this base"):
        drawn(engine, sampling_of("plain"))


@pytest.mark.parametrize(
    ("bucket", "counts"),
    [
        (row_bucket, {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 7: 8, 9: 12, 13: 16, 64: 64, 65: 96, 100: 128}),
        (column_bucket, {1: 128, 128: 128, 129: 256, 700: 1024}),
    ],
    ids=["rows", "columns"],
)
def test_buckets_are_few(bucket: Callable[[int], int], counts: dict[int, int]) -> None:
    assert {count: bucket(count) for count in counts} == counts
    assert all(bucket(count) >= count for count in range(1, 3000))
    assert len({bucket(count) for count in range(1, 257)}) <= 16


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["soft", "lora"])
def test_replays_on_a_gpu_have_the_bits_of_plain_calls(kind: str) -> None:
    device = torch.device("cuda")
    from tests.fixtures.runs import tiny_policy

    policy = tiny_policy(device=device)
    prompt = make(kind, policy, 0.3)
    made = []
    for capture in (CudaCapture(device), call_plainly):
        engine = NativeEngine(policy, graphs=loop_of(policy, capture))
        engine.sync(prompt)
        made.append([drawn(engine, sampling_of(name), 1) for name in SAMPLINGS])
    assert made[0] == made[1]


@pytest.mark.gpu
def test_a_gpu_records_by_itself() -> None:
    from tests.fixtures.runs import tiny_policy

    policy = tiny_policy(device=torch.device("cuda"))
    engine = NativeEngine(policy, NativeSettings(cuda_graphs="on"))
    engine.sync(TextPrompt(TEXT))
    assert drawn(engine, sampling_of("plain")) == drawn(engine, sampling_of("plain"))
