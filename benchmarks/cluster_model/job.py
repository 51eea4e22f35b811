"""What is simulated: a job, and the conditions under which it runs.

Letters: W ranks, Q queries of a step, G completions of a group, T most tokens of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlprompt.planning.tables import Device, Shape

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """One training step, and where it runs: one rank per device, bfloat16."""

    shape: Shape
    device: Device
    ranks: int
    """W."""
    queries: int
    """Q."""
    group_size: int
    """G."""
    query_tokens: int
    prompt_tokens: int
    max_tokens: int
    """T."""
    max_rows: int
    """Completions that a rank decodes at a time."""
    token_budget: int
    """Tokens of a micro-batch."""
    trained: int
    """Parameters of the prompt."""
    is_sharded: bool = False
    """The base lies in W parts, and every layer is gathered when it is used."""
    rolls_out_whole: bool = False
    """Of a sharded base: gathered once for a rollout, and not at every token."""
    save_every: int = 5
    """Steps from one checkpoint to the next."""
    balances: bool = True
    """Groups are given to ranks by their tokens, and not by their number, for the update."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight."""
        return 2

    @property
    def nodes(self) -> int:
        """Nodes that hold the ranks."""
        return -(-self.ranks // self.device.per_node)

    @property
    def draws_together(self) -> bool:
        """Whether all ranks decode the same rows in step, since each token gathers each layer."""
        return self.is_sharded and not self.rolls_out_whole

    @property
    def first_columns(self) -> int:
        """Columns of the cache before the first token."""
        return self.prompt_tokens + self.query_tokens


@dataclass(frozen=True)
class Conditions:
    """What a plan leaves out. The default is a machine on which none of it exists."""

    length_spread: float = 0.0
    """Standard deviation of log length; see `draw_lengths`. 0 = every completion has T tokens."""
    slow_chance: float = 0.0
    """Chance that a rank is slow in a step."""
    slow_factor: float = 1.0
    """Times as long as the others that a slow rank takes for its own work in that step."""
    jitter: float = 0.0
    """Mean share by which any rank takes longer, exponentially distributed."""
    has_prefill: bool = False
    """Prompt and queries go through the model before decoding, and the prompt in the update."""
    launch_s: float = 0.0
    """Seconds that the host needs to launch the kernels of one layer for one token."""
    hop_s: float = 0.0
    """Seconds of a message of gloo from a rank to another, beside its bytes."""
    socket_rate: float | None = None
    """Bytes per second of such messages; None = those of the devices' links."""
    pickle_s: float = 0.0
    """Seconds per byte of an object that a rank reads from another."""
    gather_s: float = 0.0
    """Seconds of one gather of weights beside its bytes, per rank inside a node that it passes."""
    far_gather_s: float = 0.0
    """The same, per node that it passes."""
    reward_s: float = 0.0
    """Seconds per completion, on the rank that scores it."""
    checkpoint_s: float = 0.0
    """Seconds of writing a checkpoint, on the first rank."""
    device_mtbf_s: float = float("inf")
    """Mean seconds between two failures of one device and its share of a node."""
    hang_share: float = 0.0
    """Of the failures that are noticed by a time limit only."""
    hang_s: float = 0.0
    """The time limit, `distributed.timeout_s`."""
    requeue_s: float = 0.0
    """Seconds until the batch system has started the job anew."""
    node_read_rate: float = float("inf")
    """Bytes per second at which one node reads weights."""
    file_system_rate: float = float("inf")
    """Bytes per second that the file system gives all nodes together."""


def draw_lengths(job: Job, spread: float, rng: np.random.Generator) -> Ints:
    """Tokens of the completions of a step.

    The logarithm of a length is normal around log(T / 2); half of its variance belongs to the query
    and half to the completion. What is longer than T is cut there, as a run cuts it.

    Args:
        job: the job.
        spread: standard deviation of the logarithm; 0 gives T for all.
        rng: where numbers come from.

    Returns:
        int64 [Q, G], in 1..T.
    """
    shape = (job.queries, job.group_size)
    each = rng.standard_normal(shape)
    common = rng.standard_normal((job.queries, 1))
    if spread == 0.0:
        return np.full(shape, job.max_tokens, dtype=np.int64)
    lengths = job.max_tokens / 2 * np.exp(spread * (each + common) / np.sqrt(2.0))
    cut: Ints = np.clip(np.rint(lengths), 1, job.max_tokens).astype(np.int64)
    return cut


def draw_slowness(job: Job, conditions: Conditions, rng: np.random.Generator) -> Floats:
    """How many times as long each rank takes for its own work in a step.

    Args:
        job: the job.
        conditions: the conditions, of which `slow_chance`, `slow_factor` and `jitter` count.
        rng: where numbers come from.

    Returns:
        float64 [W], at least 1.
    """
    is_slow = rng.random(job.ranks) < conditions.slow_chance
    jitter = conditions.jitter * rng.exponential(size=job.ranks)
    return np.where(is_slow, conditions.slow_factor, 1.0) * (1.0 + jitter)
