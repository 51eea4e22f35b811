"""The part that holds recorded decode steps against plain ones: their numbers, then their speed."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.correct import LOGPROB_TOLERANCE, queries
from benchmarks.gpu.speed import Work, model_policy
from benchmarks.gpu.world import World, require
from rlprompt.engines.capture import Capture, CudaCapture, Function, call_plainly, warm_up
from rlprompt.engines.graph_loop import GraphLimits, GraphLoop
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.policy import Policy
from rlprompt.types import Completion

ROWS = (1, 8, 64, 256)
"""Completions decoded at once."""
MOST_BYTES = 2**33


def decode_graphs(world: World) -> dict[str, Any]:
    """Recorded decode steps: bits of plain calls, gap to the plain loop, tokens per second."""
    world.require_device()
    work = Work(2, 2, 6, virtual=4) if world.dry_run else Work(8, 8, 64)
    policy = model_policy(world, "llama-3.2-1b", work)
    recorded = _engine(policy, _warmed if world.dry_run else CudaCapture(world.device))
    called, plain = _engine(policy, call_plainly), _plain(policy)
    vocab = policy.base.vocab_size
    sampling = SamplingSettings(
        max_tokens=work.tokens,
        temperature=0.8,
        top_k=50,
        min_tokens=2,
        # Rows end at all times, also where there are few.
        stop_token_ids=tuple(range(5, vocab, 3 if world.dry_run else 40)),
    )
    drawn = [_drawn(each, work, sampling) for each in (recorded, called, plain)]
    equal, gap = _common(drawn[0], drawn[2])
    total = sum(len(each.token_ids) for each in drawn[2])
    figures: dict[str, Any] = {
        "shape": "llama-3.2-1b",
        "dtype": str(world.dtype),
        "tokens": total,
        "tokens_equal_to_the_plain_loop": equal,
        "mean_logprob_gap_of_those": gap,
    }
    holds = {
        "replays have the bits of plain calls": drawn[0] == drawn[1],
        "some rows end early": len({len(each.token_ids) for each in drawn[2]}) > 1,
        "log-probabilities near the plain loop's": gap < LOGPROB_TOLERANCE[world.dtype],
    }
    if not all(holds.values()):  # no time is told of what is wrong
        return require(figures, **holds)
    del called
    for rows in (2,) if world.dry_run else ROWS:
        figures[f"rows_{rows}"] = _speed(world, rows, work.tokens, plain, recorded)
    return require(figures, **holds)


def _warmed(function: Function, undo: Function) -> Function:
    warm_up(function, undo)
    return function


def _plain(policy: Policy) -> NativeEngine:
    engine = NativeEngine(policy, NativeSettings(cuda_graphs="off", reuse_mib=0))
    engine.sync(policy.prompt)
    return engine


def _engine(policy: Policy, capture: Capture) -> NativeEngine:
    """An engine that fails where a step cannot be recorded."""
    limits = GraphLimits(MOST_BYTES)
    graphs = GraphLoop(policy.forward, limits, lambda: capture, is_required=True)
    engine = NativeEngine(policy, NativeSettings(reuse_mib=0), graphs)
    engine.sync(policy.prompt)
    return engine


def _drawn(engine: NativeEngine, work: Work, sampling: SamplingSettings) -> list[Completion]:
    groups = engine.generate(queries(work.queries), work.group, sampling, 0).groups
    return [each for group in groups for each in group.completions]


def _common(ours: list[Completion], theirs: list[Completion]) -> tuple[int, float]:
    """Tokens before each row's first difference, and the mean gap of their log-probabilities."""
    gaps: list[float] = []
    for one, other in zip(ours, theirs, strict=True):
        for place, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)):
            if a != b:
                break
            gaps.append(abs(one.sampling_logprobs[place] - other.sampling_logprobs[place]))
    return len(gaps), sum(gaps) / max(1, len(gaps))


def _speed(
    world: World, rows: int, tokens: int, plain: NativeEngine, recorded: NativeEngine
) -> dict[str, float]:
    """Tokens per second of both, prefill included, and what the first recorded rollout took."""
    count = min(8, rows)
    sampling = SamplingSettings(max_tokens=tokens, min_tokens=tokens)
    figures = {}
    for name, engine in (("plain", plain), ("recorded", recorded)):

        def decode(engine: NativeEngine = engine) -> None:
            engine.generate(queries(count), rows // count, sampling, 0)

        figures[f"{name}_first_seconds"] = world.seconds(decode)
        seconds = min(world.seconds(decode) for _ in range(1 if world.dry_run else 2))
        figures[f"{name}_tokens_per_second"] = rows * tokens / seconds
    figures["recorded_over_plain"] = (
        figures["recorded_tokens_per_second"] / figures["plain_tokens_per_second"]
    )
    return figures
