"""Seconds of the pieces of a step, each a function of sizes and rates.

Written from the description of the step, not from `rlprompt/planning/plan.py`, so that comparing
the two means something. Letters: R rows, W ranks, P parameters.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from benchmarks.cluster_model.job import Conditions, Floats, Ints, Job

OBJECT_BYTES_PER_TOKEN = 17
"""Of a pickled completion: token id, log-probability and text (measured on `types.Completion`)."""
SCORE_BYTES = 16
"""Of a completion's pickled rewards."""
OBJECT_BYTES = 200
"""Of any pickled object besides."""
LOSSES_BYTES = 2_000
"""Of what ranks tell each other of an update."""
_GATHERS_PER_LAYER = 7
"""A matrix comes at a time: four of attention, three of the MLP."""


class Rollout(NamedTuple):
    """What decoding some rows takes."""

    device_s: float
    """Seconds of the device."""
    launch_s: float
    """Seconds that it waits for launches besides."""
    tokens: int
    """How often the token loop runs, over all turns."""


def token_seconds(job: Job, rows: Floats, columns: Floats) -> Floats:
    """Seconds in which a device decodes one token of each row.

    Weights and cache are read once, or products are computed, whichever takes longer.

    Args:
        job: the job.
        rows: the rows that go on, R.
        columns: the columns of the cache that each row attends to.

    Returns:
        Seconds, of the same shape.
    """
    shape, device = job.shape, job.device
    met = np.minimum(shape.parameters, rows * shape.active_parameters)
    read = (met + rows * columns * shape.kv_elements) * job.weight_bytes / device.bandwidth
    computed = rows * 2.0 * shape.active_parameters / device.flops
    return np.maximum(read, computed)


def rollout(job: Job, lengths: Ints, launch_s: float = 0.0) -> Rollout:
    """What a rank needs to decode its queries' completions.

    As many whole groups as `max_rows` has room for are decoded at once; a row that ends leaves, and
    a turn ends with its longest row.

    Args:
        job: the job.
        lengths: tokens [queries, G] of the completions.
        launch_s: the host's seconds per layer and token.
    """
    per_turn = max(1, job.max_rows // job.group_size)
    device_s = waits_s = 0.0
    tokens = 0
    for first in range(0, len(lengths), per_turn):
        own = lengths[first : first + per_turn].ravel()
        ended = np.bincount(own, minlength=int(own.max()) + 1)
        rows = (own.size - np.cumsum(ended))[:-1].astype(np.float64)
        columns = job.first_columns + np.arange(len(rows), dtype=np.float64) + 0.5
        seconds = token_seconds(job, rows, columns)
        device_s += float(seconds.sum())
        launches = launch_s * job.shape.layers
        waits_s += float(np.maximum(0.0, launches - seconds).sum())
        tokens += len(rows)
    return Rollout(device_s, waits_s, tokens)


def forward_seconds(job: Job, tokens: float) -> float:
    """Seconds of one pass of some tokens through the model, which reads all weights.

    Args:
        job: the job.
        tokens: tokens of the pass.
    """
    computed = 2.0 * job.shape.active_parameters * tokens / job.device.flops
    return max(computed, job.shape.parameters * job.weight_bytes / job.device.bandwidth)


def learn_seconds(job: Job, tokens: float) -> float:
    """Seconds of forward and backward of packed tokens; a frozen base has no weight gradients.

    Args:
        job: the job.
        tokens: packed tokens.
    """
    return 2 * 2.0 * job.shape.active_parameters * tokens / job.device.flops


def gather_seconds(job: Job, size: float, count: int, conditions: Conditions) -> float:
    """Seconds in which every rank receives weights that lie in W parts.

    Inside a node all but the own share comes over the rank's link, and what other nodes hold comes
    once per node over all of its adapters. Each gather goes around a ring of all ranks besides.

    Args:
        job: the job.
        size: bytes of the weights, whole.
        count: number of gathers that they come in.
        conditions: the conditions, of which `gather_s` and `far_gather_s` count.
    """
    device = job.device
    near = size * (job.ranks - 1) / job.ranks / device.link
    adapters = min(device.per_node, job.ranks) * device.network
    far = size * (job.nodes - 1) / job.nodes / adapters
    crossings = job.nodes if job.nodes > 1 else 0
    hops = (job.ranks - 1 - max(0, crossings - 1)) * conditions.gather_s
    return max(near, far) + count * (hops + crossings * conditions.far_gather_s)


def layers_bytes(job: Job) -> float:
    """Bytes of all layers and the last norm."""
    shape = job.shape
    return float(shape.layers * shape.layer_parameters + shape.width) * job.weight_bytes


def ends_bytes(job: Job) -> float:
    """Bytes of embedding and LM head."""
    return float(job.shape.end_parameters * job.weight_bytes)


def gathers_of_layers(job: Job) -> int:
    """Gathers in which all layers come once."""
    return job.shape.layers * _GATHERS_PER_LAYER


def _rate(job: Job, conditions: Conditions) -> float:
    if conditions.socket_rate is not None:
        return conditions.socket_rate
    return job.device.link if job.nodes == 1 else job.device.network


def gather_objects_seconds(job: Job, size: float, conditions: Conditions) -> float:
    """Seconds in which every rank gets an object of every rank: sizes, then bytes, around a ring.

    Args:
        job: the job.
        size: bytes of the largest rank's object, to which all are padded.
        conditions: the conditions of gloo.
    """
    others = job.ranks - 1
    moved = others * size / _rate(job, conditions) if conditions.socket_rate else 0.0
    read = job.ranks * size * conditions.pickle_s if others else 0.0
    return 2 * others * conditions.hop_s + moved + read


def broadcast_seconds(job: Job, size: float, conditions: Conditions) -> float:
    """Seconds in which the first rank's bytes reach all, along a tree.

    Args:
        job: the job.
        size: the number of bytes.
        conditions: the conditions of gloo.
    """
    depth = math.ceil(math.log2(job.ranks))
    return depth * (conditions.hop_s + size / _rate(job, conditions))


def sum_seconds(job: Job, size: float, conditions: Conditions) -> float:
    """Seconds in which every rank gets the sum of all ranks' tensors: twice around a ring.

    Args:
        job: the job.
        size: bytes of a tensor.
        conditions: the conditions of gloo.
    """
    each = size / job.ranks / _rate(job, conditions)
    return 2 * (job.ranks - 1) * (conditions.hop_s + each)


def restart_seconds(job: Job, conditions: Conditions) -> float:
    """Mean seconds from a failure to the first step after it: noticed, requeued, weights read.

    Args:
        job: the job.
        conditions: the conditions of failures.
    """
    size = job.shape.parameters * job.weight_bytes
    read = max(size / conditions.node_read_rate, job.nodes * size / conditions.file_system_rate)
    return conditions.hang_share * conditions.hang_s + conditions.requeue_s + read
