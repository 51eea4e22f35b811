"""What a run will need on hardware that is not here: memory, time bounds and traffic, from a model.

The model is arithmetic over shapes, stated beside each line. It counts what the code keeps and
moves and knows nothing of overlap, fragmentation or kernels: memory is what tensors take, times are
lower bounds. benchmarks/check_plan.py compares it with what runs here allocate and receive.

Letters: P parameters, L layers, d model width, F width of the MLP, H_kv key/value heads, D head
dim, V vocabulary, W ranks, R rows decoded at a time, T tokens, S columns of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rlprompt.engines.native import NativeSettings
from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import CHUNK_TOKENS, FUSED_CHUNK_TOKENS
from rlprompt.planning.tables import Device, Shape
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.recipe.division import require_work
from rlprompt.recipe.schema import Recipe

QUERY_TOKENS = 64
"""Tokens of a query with its template, where the caller does not know them."""
_NORM_BYTES = 8
"""Two RMS norms per layer keep their input in float32: 2 x 4 bytes per element."""
_FREE_SHARE = 0.5
"""The rule of `gather: auto`: a whole base may take this share of the memory that is free."""
_CHARACTERS_PER_TOKEN = 4
"""Of a text in English, where no tokenizer is at hand."""
_CACHE_BLOCK = 32
"""Columns by which a cache grows."""


@dataclass(frozen=True)
class Plan:
    """What one rank will need."""

    memory: Mapping[str, float]
    """Bytes of each part at its worst moment; rollout and update do not happen at once."""
    rollout_bytes: float
    update_bytes: float
    """What meets in a rollout, and in an update; all of it where they overlap."""
    traffic: Mapping[str, float]
    """Bytes of each part that a rank receives per step."""
    bounds: Mapping[str, float]
    """Seconds that each part of a step takes at least."""
    decode_tokens_per_second: float
    """Of all ranks, at most."""
    overlaps: bool = False
    """Whether rollouts go on during updates."""

    @property
    def step_seconds(self) -> float:
        """Lower bound of a step; of two phases at once, the longer one's."""
        return max(self.bounds.values()) if self.overlaps else sum(self.bounds.values())


def plan(
    recipe: Recipe,
    shape: Shape,
    ranks: int,
    device: Device,
    *,
    query_tokens: int = QUERY_TOKENS,
) -> Plan:
    """Plan a recipe on a number of equal devices, one rank each.

    Args:
        recipe: recipe, of which batch sizes, lengths, budget, dtype and `distributed` count.
        shape: shape of the base, in place of the recipe's.
        ranks: the number of ranks, W.
        device: data sheet of each rank's device.
        query_tokens: mean length of a query with its template.

    Raises:
        InputError: the recipe divides less than one query per rank, overlaps on several, searches,
            or draws with another engine than the native one.
    """
    if recipe.search is not None:
        raise InputError(
            "a plan is about updates by gradients, and a search makes none; plan the recipe "
            "without search"
        )
    engine = recipe.engine
    if not isinstance(engine, NativeSettings):
        raise InputError(
            f"engine.type is {engine.type}, and a plan knows the memory of the native engine only; "
            "plan with engine.type=native"
        )
    require_work(recipe, ranks)
    overlaps = recipe.training.overlap_rollouts
    work = _Work(recipe, engine, shape, ranks, device, query_tokens)
    held = _memory(work)
    decoding = (
        held["cache of a rollout"] + held["cache, while it grows"] + held["drawing of tokens"]
    )
    at_rest = sum(
        held[part]
        for part in ("base, at rest", "products of a rollout", "prompt, gradient, moments")
    )
    # While the largest matrix arrives there is no cache yet.
    gathering = held["base, gathered for a rollout"]
    rollout = at_rest + gathering + max(decoding, held["received twice"])
    update = at_rest + sum(
        held[part]
        for part in (
            "base, gathered for an update",
            "activations of a micro-batch",
            "LM head's buffers",
        )
    )
    if overlaps:
        rollout = update = rollout + update - at_rest
    traffic = _traffic(work) if ranks > 1 else {}
    bounds, rate = _bounds(work, sum(traffic.values()), held["cache of a rollout"])
    return Plan(held, rollout, update, traffic, bounds, rate, overlaps)


class _MicroBatches(NamedTuple):
    """How a rank's batch is cut."""

    per_pass: int
    largest: int
    """Tokens of the largest."""
    tokens: int
    """Tokens of all passes."""


@dataclass(frozen=True)
class _Work:
    """What is planned."""

    recipe: Recipe
    engine: NativeSettings
    shape: Shape
    ranks: int
    device: Device
    query_tokens: int

    def of(self, name: str) -> int:
        """A count of the algorithm's settings; 1 where it has no such setting."""
        return int(getattr(self.recipe.algorithm, name, 1))

    @property
    def bytes_each(self) -> int:
        """Of a weight or activation; `auto` is bfloat16 on a GPU."""
        return 4 if self.recipe.model.dtype == "float32" else 2

    @property
    def is_sharded(self) -> bool:
        return self.recipe.distributed.base == "sharded"

    @property
    def at_rest(self) -> float:
        """Bytes of the base on a rank, outside of everything."""
        whole = self.shape.parameters * self.bytes_each
        return whole / self.ranks if self.is_sharded else whole

    @property
    def rolls_out_whole(self) -> bool:
        """Whether rollouts gather the base once; see `Shards.rolls_out_whole`."""
        if self.recipe.distributed.gather != "auto":
            return self.recipe.distributed.gather == "whole"
        free = self.device.memory - self.at_rest
        return self.shape.parameters * self.bytes_each <= _FREE_SHARE * free

    @property
    def rows(self) -> int:
        """Completions of a rank; where layers are gathered at each token, all ranks draw all."""
        queries = self.recipe.training.queries_per_step
        together = self.is_sharded and not self.rolls_out_whole
        return (queries if together else -(-queries // self.ranks)) * self.of("group_size")

    @property
    def rows_at_once(self) -> int:
        """R."""
        return min(self.rows, self.engine.max_rows)

    @property
    def rollout_turns(self) -> int:
        """How often the token loop runs."""
        return -(-self.rows // self.rows_at_once)

    @property
    def prompt_tokens(self) -> int:
        prompt = self.recipe.prompt
        text = getattr(prompt, "init_text", None) or getattr(prompt, "text", None)
        guess = 32 if text is None else -(-len(text) // _CHARACTERS_PER_TOKEN)
        return int(getattr(prompt, "num_virtual_tokens", None) or guess)

    @property
    def columns(self) -> int:
        """S of the longest row."""
        return self.prompt_tokens + self.query_tokens + self.recipe.sampling.max_tokens

    @property
    def micro_batches(self) -> _MicroBatches:
        """Micro-batches of a rank."""
        groups = -(-self.recipe.training.queries_per_step // self.ranks)
        # The last token of a completion predicts nothing.
        answer = self.recipe.sampling.max_tokens - 1
        group = self.query_tokens + self.of("group_size") * answer
        budget = self.recipe.training.token_budget
        per_turn = max(1, budget // group)
        largest = min(max(budget, self.query_tokens + answer), min(per_turn, groups) * group)
        turns = -(-groups // per_turn) if group <= budget else groups * -(-group // budget)
        return _MicroBatches(turns, largest, groups * group * self.of("num_epochs"))


def _memory(work: _Work) -> dict[str, float]:
    shape, each = work.shape, work.bytes_each
    ends = shape.end_parameters * each
    largest = max(shape.vocab * shape.width, shape.width * shape.mlp) * each
    # Layers come one matrix at a time, embedding and LM head stay for the whole of an update.
    parts = (ends + shape.width * shape.mlp * each) * work.is_sharded
    whole = shape.parameters * each * work.is_sharded
    column = work.rows_at_once * shape.kv_elements * each
    before_last_growth = (work.columns - 1) // _CACHE_BLOCK * _CACHE_BLOCK
    first = work.prompt_tokens + work.query_tokens
    grows = first // _CACHE_BLOCK * _CACHE_BLOCK < before_last_growth
    tokens = work.micro_batches.largest
    if work.device.is_cpu:
        head = 3 * CHUNK_TOKENS * shape.vocab * 4  # two that all chunks share, and the product
    else:
        head = 2 * min(FUSED_CHUNK_TOKENS, tokens) * shape.vocab * each
    return {
        "base, at rest": work.at_rest,
        "base, gathered for a rollout": whole if work.rolls_out_whole else parts,
        "base, gathered for an update": parts,
        "received twice": largest * (work.is_sharded and work.device.is_cpu),
        "cache of a rollout": column * work.columns,
        "cache, while it grows": column * before_last_growth * grows,
        "drawing of tokens": 2 * work.rows_at_once * shape.vocab * 4,
        "products of a rollout": _kept_products(work),
        "activations of a micro-batch": _activations(work, tokens),
        "LM head's buffers": head,
        "prompt, gradient, moments": work.prompt_tokens * shape.width * 4 * 4,
    }


def _kept_products(work: _Work) -> float:
    """What `engine.reuse_mib` keeps, at most."""
    shape, recipe = work.shape, work.recipe
    exact = work.device.is_cpu and work.bytes_each == 2 and not work.is_sharded
    by_hooks = isinstance(recipe.prompt, AdapterSettings) and recipe.prompt.method.type == "ia3"
    if not exact or by_hooks:
        return 0.0
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.width
    outputs = shape.layers * (attention + 2 * shape.mlp + shape.width)
    tokens = work.rows * (recipe.sampling.max_tokens - 1)
    return min(work.engine.reuse_mib * 2.0**20, 2.0 * outputs * tokens)


def _activations(work: _Work, tokens: int) -> float:
    """What the backward of one micro-batch needs.

    Linear layers of a frozen base keep no input, for their weights want no gradient. Per token and
    layer there remain the norms' inputs, queries, keys, values and their outcome, and three vectors
    of the gated MLP; on a CPU the attention weights too. With gradient checkpointing: one input per
    layer, and one layer in full.
    """
    shape = work.shape
    qkv = shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    kept = qkv + shape.heads * shape.head_dim + 3 * shape.mlp
    if work.device.is_cpu:
        kept += shape.heads * work.columns
    layer = _NORM_BYTES * shape.width + work.bytes_each * kept
    if work.recipe.training.gradient_checkpointing:
        return float(tokens * (shape.layers * shape.width * work.bytes_each + layer))
    return float(tokens * shape.layers * layer)


def _traffic(work: _Work) -> dict[str, float]:
    """Bytes that a rank receives per step: its own share of what is gathered is there already."""
    recipe, shape = work.recipe, work.shape
    minibatches = min(work.of("num_minibatches"), recipe.training.queries_per_step)
    updates = work.of("num_epochs") * minibatches
    # Summed in float64, and copied from the first rank after the optimizer's step.
    gradient = 2.0 * work.prompt_tokens * shape.width * 8 * updates
    if not work.is_sharded:
        return {"gradient and prompt": gradient}
    share = (work.ranks - 1) / work.ranks * work.bytes_each
    layers = (shape.layers * shape.layer_parameters + shape.width) * share
    ends = shape.end_parameters * share
    passes = 1 if recipe.algorithm.needs_reference else 0
    turns = work.micro_batches.per_pass
    # Of an update: the prompt forward, forward again and backward; each turn forward and backward.
    of_update = updates * (3 + 2 * turns) + passes * (1 + turns)
    rollout = shape.parameters * share
    if not work.rolls_out_whole:
        rollout = work.rollout_turns * recipe.sampling.max_tokens * layers + ends
    return {
        "base, for the rollout": rollout + layers + ends,  # and the prompt's prefill before it
        "base, for the update": of_update * layers + ends,
        "gradient and prompt": gradient,
    }


def _bounds(work: _Work, received: float, cache: float) -> tuple[dict[str, float], float]:
    """Least seconds of each part of a step, and most completion tokens per second of all ranks."""
    recipe, device = work.recipe, work.device
    per_token = 2 * work.shape.parameters
    decode = max(
        # The cache is half full on average.
        (work.shape.parameters * work.bytes_each + cache / 2) / device.bandwidth,
        work.rows_at_once * per_token / device.flops,
    )
    references = 1 if recipe.algorithm.needs_reference else 0
    rollout = work.rollout_turns * recipe.sampling.max_tokens * decode
    # Forward, and a backward to the inputs only; a reference costs one forward.
    update = (2 + references) * work.micro_batches.tokens * per_token / device.flops
    drawing = 1 if work.is_sharded and not work.rolls_out_whole else work.ranks
    rate = drawing * work.rows * recipe.sampling.max_tokens / rollout
    bounds = {"rollout": rollout, "update": update, "traffic": received / device.link}
    return bounds, rate
