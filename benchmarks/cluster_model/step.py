"""What ranks do in a step of rlprompt, as stages: what each does alone, and where they meet.

The order is that of `training/step.py`, `training/update.py` and `distributed/ranks.py`. Letters: W
ranks, Q queries, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.cluster_model import costs
from benchmarks.cluster_model.events import WAITING, Stage, Timeline, play
from benchmarks.cluster_model.job import (
    Conditions,
    Floats,
    Ints,
    Job,
    draw_lengths,
    draw_slowness,
)
from rlprompt.rollout.packing import pack

KINDS = (
    "decode",
    "launches",
    "weights",
    "update",
    WAITING,
    "rewards",
    "meetings",
    "checkpoint",
    "failures",
)
"""What seconds are counted as; `weights` are gathers under a base in shards."""


def steps_of(job: Job, conditions: Conditions, seed: int) -> Timeline:
    """Play the steps from one checkpoint to the next, the checkpoint included.

    What is drawn for the lengths does not depend on the other conditions, so that two conditions
    are compared on the same completions.

    Args:
        job: the job.
        conditions: the conditions, but for failures.
        seed: the seed of lengths and slow ranks.
    """
    of_lengths, of_ranks = (np.random.default_rng([seed, stream]) for stream in (0, 1))
    stages: list[Stage] = []
    for _ in range(job.save_every):
        lengths = draw_lengths(job, conditions.length_spread, of_lengths)
        slowness = draw_slowness(job, conditions, of_ranks)
        stages += stages_of_step(job, conditions, lengths, slowness)
    stages += _on_first(job, "checkpoint", conditions.checkpoint_s)
    return play(stages, job.ranks)


def stages_of_step(
    job: Job, conditions: Conditions, lengths: Ints, slowness: Floats
) -> list[Stage]:
    """The stages of one step; those of no seconds that are no meetings are left out.

    Args:
        job: the job.
        conditions: the conditions, but for failures.
        lengths: tokens [Q, G] of the completions.
        slowness: times as long as usual that each rank [W] takes for its own work.
    """
    stages = _rollout(job, conditions, lengths, slowness)
    stages += _meeting(job, _share_completions(job, conditions, lengths))
    # Each rank scores whole groups of its own, and all get every number.
    scored = np.array([share.size for share in _shares(job, lengths)], dtype=np.float64)
    stages += _alone("rewards", conditions.reward_s * scored)
    told = float(scored.max()) * costs.SCORE_BYTES + costs.OBJECT_BYTES
    stages += _meeting(job, costs.gather_objects_seconds(job, told, conditions))
    own = lengths.size / job.ranks * costs.OBJECT_BYTES
    stages += _meeting(job, costs.gather_objects_seconds(job, own, conditions))
    stages += _update(job, conditions, lengths, slowness)
    gradient = 8.0 * job.trained
    said = costs.gather_objects_seconds(job, costs.LOSSES_BYTES, conditions)
    summed = costs.sum_seconds(job, gradient, conditions)
    copied = costs.broadcast_seconds(job, gradient, conditions)
    stages += _meeting(job, summed + said + copied)
    agreed = 2 * (job.ranks - 1) * conditions.hop_s
    agreed += costs.gather_objects_seconds(job, costs.OBJECT_BYTES, conditions)
    agreed += costs.broadcast_seconds(job, costs.OBJECT_BYTES, conditions) * _exists(conditions)
    return stages + _meeting(job, agreed)


def owners(job: Job, tokens: Sequence[int]) -> Ints:
    """The rank that learns from each group.

    The largest group first, to the rank that has the fewest tokens; or, where the job does not
    balance, by number.

    Args:
        job: the job.
        tokens: tokens of each group, Q of them.

    Returns:
        int64 [Q], in 0..W-1.
    """
    if not job.balances:
        return np.arange(len(tokens), dtype=np.int64) % job.ranks
    chosen = np.zeros(len(tokens), dtype=np.int64)
    load = np.zeros(job.ranks)
    for group in sorted(range(len(tokens)), key=lambda each: -tokens[each]):
        rank = int(load.argmin())
        chosen[group] = rank
        load[rank] += tokens[group]
    return chosen


def _rollout(job: Job, conditions: Conditions, lengths: Ints, slowness: Floats) -> list[Stage]:
    if job.draws_together:
        made = costs.rollout(job, lengths, conditions.launch_s)
        before = _prefill(job, lengths, conditions)
        layers, ends = costs.layers_bytes(job), costs.ends_bytes(job)
        turns = made.tokens + 1
        count = turns * costs.gathers_of_layers(job) + 2
        gathered = costs.gather_seconds(job, turns * layers + 2 * ends, count, conditions)
        own = np.full(job.ranks, made.device_s + before)
        return [
            *_in_step(job, "decode", own, slowness),
            *_together(job, "launches", made.launch_s),
            *_together(job, "weights", gathered),
        ]
    stages: list[Stage] = []
    if job.is_sharded:
        whole = job.shape.parameters * job.weight_bytes
        parts = costs.layers_bytes(job) + costs.ends_bytes(job)
        count = 1 + costs.gathers_of_layers(job)
        gathered = costs.gather_seconds(job, whole + parts, count, conditions)
        stages += _together(job, "weights", gathered)
    shares = _shares(job, lengths)
    drawn = [costs.rollout(job, share, conditions.launch_s) for share in shares]
    prefills = [_prefill(job, share, conditions) for share in shares]
    own = np.array([each.device_s for each in drawn]) + np.array(prefills)
    launches = np.array([each.launch_s for each in drawn])
    return [*stages, *_alone("decode", own * slowness), *_alone("launches", launches)]


def _shares(job: Job, lengths: Ints) -> list[Ints]:
    """Lengths of the groups that each rank draws and scores, in order."""
    return np.array_split(lengths, [len(lengths) * r // job.ranks for r in range(1, job.ranks)])


def _prefill(job: Job, lengths: Ints, conditions: Conditions) -> float:
    """Seconds in which the prompt, and the queries of each turn, go through the model."""
    if not conditions.has_prefill:
        return 0.0
    per_turn = max(1, job.max_rows // job.group_size)
    turns = [len(lengths[first : first + per_turn]) for first in range(0, len(lengths), per_turn)]
    queries = sum(costs.forward_seconds(job, turn * job.query_tokens) for turn in turns)
    return costs.forward_seconds(job, job.prompt_tokens) + queries


def _update(job: Job, conditions: Conditions, lengths: Ints, slowness: Floats) -> list[Stage]:
    answers = lengths.sum(axis=1) - lengths.shape[1]  # the last token predicts nothing
    tokens = job.query_tokens + answers
    owner = owners(job, tokens.tolist())
    once = 0.0
    if conditions.has_prefill:  # the prompt forward, forward again and backward
        once = 3 * costs.forward_seconds(job, job.prompt_tokens)
    if not job.is_sharded:
        own = np.bincount(owner, weights=tokens, minlength=job.ranks)
        seconds = np.array([costs.learn_seconds(job, float(each)) for each in own]) + once
        return _alone("update", seconds * slowness)
    turns = _turns(job, lengths, owner)
    per_turn = 2 * 2.0 * job.shape.active_parameters * turns / job.device.flops
    slowest = float((per_turn * slowness[:, None]).max(axis=0).sum()) + once * slowness.max()
    usual = float(per_turn.sum()) / job.ranks + once
    layers, ends = costs.layers_bytes(job), costs.ends_bytes(job)
    count = costs.gathers_of_layers(job)
    passes = turns.shape[1]
    forward = costs.gather_seconds(
        job, (2 + passes) * layers + ends, (2 + passes) * count + 1, conditions
    )
    backward = costs.gather_seconds(job, (1 + passes) * layers, (1 + passes) * count, conditions)
    return [
        *_together(job, "update", usual),
        *_together(job, WAITING, slowest - usual),
        *_together(job, "weights", forward + backward),
    ]


def _turns(job: Job, lengths: Ints, owner: Ints) -> Floats:
    """Tokens [W, turns] of each rank's micro-batches; a rank without one has 0."""
    packed = []
    for rank in range(job.ranks):
        groups = np.flatnonzero(owner == rank)
        own = [lengths[group].tolist() for group in groups]
        made = pack([job.query_tokens] * len(own), own, job.token_budget)
        packed.append([float(each.num_tokens) for each in made])
    found = np.zeros((job.ranks, max(len(each) for each in packed)))
    for row, each in zip(found, packed, strict=True):
        row[: len(each)] = each
    return found


def _share_completions(job: Job, conditions: Conditions, lengths: Ints) -> float:
    """Seconds in which every rank gets the completions of every rank.

    Ranks that draw together have them, and compare a digest (`Ranks.same`).
    """
    if job.draws_together:
        return costs.gather_objects_seconds(job, costs.OBJECT_BYTES, conditions)
    starts = [len(lengths) * rank // job.ranks for rank in range(job.ranks)]
    largest = float(np.add.reduceat(lengths.sum(axis=1), starts).max())
    return costs.gather_objects_seconds(job, largest * costs.OBJECT_BYTES_PER_TOKEN, conditions)


def _exists(conditions: Conditions) -> bool:
    """Whether meetings beside that of the gradient take time."""
    return conditions.socket_rate is not None


def _alone(kind: str, seconds: Floats) -> list[Stage]:
    return [Stage(kind, seconds)] if seconds.any() else []


def _on_first(job: Job, kind: str, seconds: float) -> list[Stage]:
    own = np.zeros(job.ranks)
    own[0] = seconds
    return _alone(kind, own)


def _together(job: Job, kind: str, seconds: float) -> list[Stage]:
    return [Stage(kind, np.full(job.ranks, seconds), is_meeting=True)] if seconds > 0 else []


def _in_step(job: Job, kind: str, seconds: Floats, slowness: Floats) -> list[Stage]:
    """Work that all ranks do in step, layer by layer: as slow as the slowest."""
    usual = float(seconds.mean())
    lost = float((seconds * slowness).max()) - usual
    return [*_together(job, kind, usual), *_together(job, WAITING, lost)]


def _meeting(job: Job, seconds: float) -> list[Stage]:
    """A meeting of several ranks, which takes place however little it takes."""
    if job.ranks == 1:
        return []
    return [Stage("meetings", np.full(job.ranks, seconds), is_meeting=True)]
