"""What a run will need on hardware that is not here: memory, time bounds and traffic, from a model.

The model is arithmetic over shapes, stated beside each line. It counts what the code keeps and
moves and knows nothing of overlap, fragmentation or kernels: memory is what tensors take, times are
lower bounds. tests/test_planning.py compares weights, caches and traffic with counted bytes.

Letters: P parameters, L layers, d model width, F width of the MLP, H_kv key/value heads, D head
dim, V vocabulary, W ranks, R rows decoded at a time, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlprompt.errors import InputError
from rlprompt.recipe import Recipe

ACTIVATION_NORM_BYTES = 8
"""Two RMS norms per layer keep their input in float32: 2 x 4 bytes per element."""


@dataclass(frozen=True)
class Shape:
    """A decoder-only base of the Llama family."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Query, key, value and output projections, the gated MLP, and two norms."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.mlp + 2 * self.width

    @property
    def end_parameters(self) -> int:
        """Embedding and LM head, one matrix when they are tied."""
        return self.vocab * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """P, with the final norm."""
        return self.layers * self.layer_parameters + self.end_parameters + self.width

    @property
    def kv_elements(self) -> int:
        """Elements of keys and values per token, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


SHAPES = {
    "135m": Shape(30, 576, 1536, 9, 3, 64, 49152, True),  # SmolLM2
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, True),  # Llama 3.2
    "3b": Shape(28, 3072, 8192, 24, 8, 128, 128256, True),  # Llama 3.2
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256, False),  # Llama 3.1
    "70b": Shape(80, 8192, 28672, 64, 8, 128, 128256, False),  # Llama 3.1
}
"""By `--model-size`."""


@dataclass(frozen=True)
class Device:
    """One accelerator, by its data sheet."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its memory."""
    flops: float
    """Dense bfloat16 operations per second."""
    link: float
    """Bytes per second from another device of the node, one direction."""


DEVICES = {
    "a100": Device(80e9, 2.04e12, 312e12, 300e9),
    "h100": Device(80e9, 3.35e12, 989e12, 450e9),
    "h200": Device(141e9, 4.8e12, 989e12, 450e9),
    "l40s": Device(48e9, 0.864e12, 362e12, 32e9),
}
"""By `--gpu`: SXM versions; the L40S is linked over PCIe 4."""


@dataclass(frozen=True)
class Plan:
    """What one rank will need."""

    memory: Sequence[tuple[str, float]]
    """(part, bytes) at the worst moment of each; rollout and update do not happen at once."""
    rollout_bytes: float
    update_bytes: float
    """Sums of the parts that meet in a rollout, and in an update."""
    traffic: Sequence[tuple[str, float]]
    """(part, bytes that a rank receives per step)."""
    bounds: Sequence[tuple[str, float]]
    """(what, seconds per step at least)."""
    decode_tokens_per_second: float
    """Of all ranks, at most."""

    @property
    def step_seconds(self) -> float:
        """Lower bound of a step."""
        return sum(seconds for _, seconds in self.bounds)


def plan(recipe: Recipe, shape: Shape, ranks: int, device: Device, bytes_each: int = 2) -> Plan:
    """Plan a recipe on a number of equal devices, one rank each.

    Args:
        recipe: its batch sizes, lengths, budget and `distributed` count.
        shape: of the base, in place of the recipe's.
        ranks: W.
        device: of each rank.
        bytes_each: of a weight or activation; 2 for bfloat16.

    Raises:
        InputError: the recipe divides less than one query per rank.
    """
    queries = recipe.training.queries_per_step
    if queries < ranks:
        raise InputError(
            f"training.queries_per_step is {queries} and there are {ranks} ranks, so some would "
            "have nothing to do; raise it"
        )
    sharded = recipe.distributed.base == "sharded"
    whole = shape.parameters * bytes_each
    rows = -(-queries // ranks) * _of(recipe, "group_size")
    longest = _prompt_tokens(recipe) + _QUERY_TOKENS + recipe.sampling.max_tokens
    cache = rows * longest * shape.kv_elements * bytes_each
    ends = shape.end_parameters * bytes_each
    at_rest = whole / ranks if sharded else whole
    rolls_whole = sharded and recipe.distributed.gather != "layers"
    gathered_rollout = (whole if rolls_whole else ends + _layer(shape, bytes_each)) * sharded
    gathered_update = (ends + _layer(shape, bytes_each)) * sharded
    activations = _activations(recipe, shape, bytes_each)
    head = 2 * 128 * shape.vocab * 4
    prompt = _prompt_tokens(recipe) * shape.width * 4 * 4
    turns, tokens = _turns(recipe, ranks)
    traffic = _traffic(recipe, shape, ranks, turns, bytes_each) if ranks > 1 else []
    received = sum(size for _, size in traffic)
    per_token = 2 * shape.parameters
    references = 1 if recipe.algorithm.needs_reference else 0
    decode = max(
        (whole + cache / 2) / device.bandwidth,  # the cache is half full on average
        rows * per_token / device.flops,
    )
    return Plan(
        memory=[
            ("base, at rest", at_rest),
            ("base, gathered for a rollout", gathered_rollout),
            ("base, gathered for an update", gathered_update),
            ("cache of a rollout", cache),
            ("activations of a micro-batch", activations),
            ("LM head's buffers", head),
            ("prompt, gradient, moments", prompt),
        ],
        rollout_bytes=at_rest + gathered_rollout + cache + prompt,
        update_bytes=at_rest + gathered_update + activations + head + prompt,
        traffic=traffic,
        bounds=[
            ("rollout", recipe.sampling.max_tokens * decode),
            # Forward, and a backward to the inputs only; a reference costs one forward.
            ("update", (2 + references) * tokens * per_token / device.flops),
            ("traffic", received / device.link),
        ],
        decode_tokens_per_second=ranks * rows / decode,
    )


_QUERY_TOKENS = 64
"""Assumed tokens of a query with its template; docs/cluster.md says so."""


def _prompt_tokens(recipe: Recipe) -> int:
    return int(getattr(recipe.prompt, "num_virtual_tokens", None) or 32)


def _of(recipe: Recipe, name: str) -> int:
    """A count of the algorithm's settings; 1 where it has no such setting."""
    return int(getattr(recipe.algorithm, name, 1))


def _layer(shape: Shape, bytes_each: int) -> int:
    """Weights of two layers: the one that runs and the next one, which is on its way."""
    return 2 * shape.layer_parameters * bytes_each


def _activations(recipe: Recipe, shape: Shape, bytes_each: int) -> float:
    """What the backward of one micro-batch needs.

    Linear layers of a frozen base keep no input, for their weights want no gradient. Per token and
    layer there remain the norms' inputs, queries, keys, values and their outcome, and three vectors
    of the gated MLP. With gradient checkpointing: one input per layer, and one layer in full.
    """
    qkv = shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    kept = qkv + shape.heads * shape.head_dim + 3 * shape.mlp
    layer = ACTIVATION_NORM_BYTES * shape.width + bytes_each * kept
    tokens = recipe.training.token_budget
    if recipe.training.gradient_checkpointing:
        return float(tokens * (shape.layers * shape.width * bytes_each + layer))
    return float(tokens * shape.layers * layer)


def _turns(recipe: Recipe, ranks: int) -> tuple[int, int]:
    """Micro-batches of a rank per pass over a batch, and the tokens that it learns from."""
    groups = -(-recipe.training.queries_per_step // ranks)
    group = _QUERY_TOKENS + _of(recipe, "group_size") * recipe.sampling.max_tokens
    tokens = groups * group * _of(recipe, "num_epochs")
    per_turn = max(1, recipe.training.token_budget // group)
    return -(-groups // per_turn), tokens


def _traffic(
    recipe: Recipe, shape: Shape, ranks: int, turns: int, bytes_each: int
) -> list[tuple[str, float]]:
    """Bytes that a rank receives per step: its own share of what is gathered is there already."""
    gradient = 2.0 * _prompt_tokens(recipe) * shape.width * 8  # summed in float64, then the copy
    if recipe.distributed.base == "replicated":
        return [("gradient and prompt", gradient)]
    share = (ranks - 1) / ranks * bytes_each
    layers = (shape.layers * shape.layer_parameters + shape.width) * share
    ends = shape.end_parameters * share
    passes = 1 if recipe.algorithm.needs_reference else 0
    updates = _of(recipe, "num_epochs") * _of(recipe, "num_minibatches")
    # Of an update: the prompt forward, forward again and backward; each turn forward and backward.
    of_update = updates * (3 + 2 * turns) + passes * (1 + turns)
    rollout = shape.parameters * share
    if recipe.distributed.gather == "layers":
        rollout = recipe.sampling.max_tokens * layers + ends
    return [
        ("base, for the rollout", rollout + layers + ends),  # and the prompt's prefill before it
        ("base, for the update", of_update * layers + ends),
        ("gradient and prompt", gradient * updates),
    ]
