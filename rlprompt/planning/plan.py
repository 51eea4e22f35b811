"""What a run will need on hardware that is not here: memory, time bounds and traffic, from a model.

The model is arithmetic over shapes, stated beside each line. It counts what the code keeps and
moves and knows nothing of overlap, fragmentation or kernels: memory is what tensors take, times are
lower bounds. benchmarks/check_plan.py compares it with what runs here allocate and receive.

Letters: P parameters, L layers, d model width, F width of the MLP, H_kv key/value heads, D head
dim, V vocabulary, W ranks, R rows decoded at a time, T tokens, S columns of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from rlprompt.engines.native import NativeSettings
from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import CHUNK_TOKENS, FUSED_CHUNK_TOKENS
from rlprompt.planning.tables import Device, Shape
from rlprompt.planning.trained import adapted_linears, prompt_tokens, trained_parameters
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.base import PromptSettings
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.recipe.division import require_work
from rlprompt.recipe.schema import Recipe

QUERY_TOKENS = 64
"""Tokens of a query with its template, where the caller does not know them."""
_NORM_BYTES = 8
"""Two RMS norms per layer keep their input in float32: 2 x 4 bytes per element."""
_FREE_SHARE = 0.5
"""The rule of `gather: auto`: a whole base may take this share of the memory that is free."""
_SERVED_SHARE = 0.7
"""Of a GPU's memory that the weights of a served base may take, beside cache and buffers."""
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
    host_bytes: float = 0.0
    """Of a rank's share of the base in the memory of its host, or on its disk."""
    fitting_rows: int = 0
    """Most rows that can be decoded at a time; 0 where not even one fits."""
    advice: tuple[str, ...] = ()
    """Sentences about what does not fit or is bound by traffic, and what to do."""

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
            "plan with 'engine={type: native}'"
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
        for part in (
            "base, at rest",
            "base, second shards",
            "products of a rollout",
            "prompt, gradient, moments",
        )
    )
    # While the largest matrix arrives there is no cache yet.
    gathering = held["base, gathered for a rollout"]
    fitting = _fitting_rows(work, held, at_rest)
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
    bounds, rate = _bounds(work, held["cache of a rollout"])
    host = work.shape.parameters * work.bytes_each / ranks if work.offload != "none" else 0.0
    made = Plan(held, rollout, update, _traffic(work), bounds, rate, overlaps, host, fitting)
    return replace(made, advice=_advice(work, held, made))


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
        if self.offload != "none" and not self.device.is_cpu:
            return 0.0
        return whole / self.ranks if self.is_sharded else whole

    @property
    def offload(self) -> str:
        """Where shards lie that are not in use: none, cpu or nvme."""
        return self.recipe.distributed.offload

    @property
    def secondary(self) -> int | None:
        """Ranks that share a second set of shards; None where there is none."""
        return self.recipe.distributed.secondary_shards

    @property
    def trained(self) -> int:
        """Parameters that the prompt trains."""
        return trained_parameters(self.recipe.prompt, self.shape)

    @property
    def updates(self) -> int:
        """Optimizer steps of a step."""
        queries = self.recipe.training.queries_per_step
        return self.of("num_epochs") * min(self.of("num_minibatches"), queries)

    @property
    def draws_together(self) -> bool:
        """Whether all ranks decode the same rows, since layers are gathered at each token."""
        return self.is_sharded and not self.rolls_out_whole

    @property
    def rolls_out_whole(self) -> bool:
        """Whether rollouts gather the base once; see `Shards.rolls_out_whole`."""
        if self.recipe.distributed.gather != "auto":
            return self.recipe.distributed.gather == "whole"
        free = self.device.memory - self.at_rest
        return self.shape.parameters * self.bytes_each <= _FREE_SHARE * free

    @property
    def recomputes(self) -> bool:
        """Whether backward passes run the layers forward once more."""
        return self.recipe.training.gradient_checkpointing

    @property
    def piece(self) -> int:
        """Completions of a group that are on one rank: all, but of fewer groups than ranks."""
        ranks_of_a_group = max(1, self.ranks // self.recipe.training.queries_per_step)
        return -(-self.of("group_size") // ranks_of_a_group)

    @property
    def rows(self) -> int:
        """Completions of a rank; where layers are gathered at each token, all ranks draw all."""
        queries = self.recipe.training.queries_per_step
        if self.draws_together:
            return queries * self.of("group_size")
        return -(-queries // self.ranks) * self.piece

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
        return prompt_tokens(self.recipe.prompt)

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
        group = self.query_tokens + self.piece * answer
        budget = self.recipe.training.token_budget
        per_turn = max(1, budget // group)
        largest = min(max(budget, self.query_tokens + answer), min(per_turn, groups) * group)
        turns = -(-groups // per_turn)
        if group > budget:
            # A group that is cut has its query in every part.
            in_part = max(1, (budget - self.query_tokens) // answer)
            parts = -(-self.piece // in_part)
            group += (parts - 1) * self.query_tokens
            turns = groups * parts
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
        "base, second shards": shape.parameters * each / work.secondary if work.secondary else 0.0,
        "base, gathered for a rollout": whole if work.rolls_out_whole else parts,
        "base, gathered for an update": parts,
        "received twice": largest * (work.is_sharded and work.device.is_cpu),
        "cache of a rollout": column * work.columns,
        "cache, while it grows": column * before_last_growth * grows,
        "drawing of tokens": 2 * work.rows_at_once * shape.vocab * 4,
        "products of a rollout": _kept_products(work),
        "activations of a micro-batch": _activations(work, tokens),
        "LM head's buffers": head,
        "prompt, gradient, moments": float(work.trained * 4 * 4),
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
    kept += _kept_for_adapter(work.recipe.prompt, shape)
    layer = _NORM_BYTES * shape.width + work.bytes_each * kept
    if work.recomputes:
        return float(tokens * (shape.layers * shape.width * work.bytes_each + layer))
    return float(tokens * shape.layers * layer)


def _kept_for_adapter(prompt: PromptSettings, shape: Shape) -> int:
    """Elements per token and layer that the gradient of a LoRA needs beside those of the base."""
    if not (isinstance(prompt, AdapterSettings) and isinstance(prompt.method, LoRASettings)):
        return 0
    kept = 0
    joined = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    seen = set()
    for name, linear in adapted_linears(prompt, shape).items():
        per_layer = -(-linear.number // shape.layers)
        kept += per_layer * prompt.method.rank
        source = joined.get(name, name)  # layers that read the same vector
        if source not in seen and name != "o_proj":  # its input is attention's outcome
            kept += per_layer * linear.inputs
        seen.add(source)
    return kept


class _Gathers(NamedTuple):
    """Bytes of weights that are made whole on a rank in a step, its own share included."""

    rollout: float
    forward: float
    """Of an update."""
    backward: float
    """Of an update."""


def _gathers(work: _Work) -> _Gathers:
    recipe, shape = work.recipe, work.shape
    layers = (shape.layers * shape.layer_parameters + shape.width) * work.bytes_each
    ends = shape.end_parameters * work.bytes_each
    passes = 1 if recipe.algorithm.needs_reference else 0
    turns = work.micro_batches.per_pass
    # Of an update: the prompt forward, forward again and backward; each turn forward and backward.
    forward = work.updates * (2 + turns) + passes * (1 + turns)
    # What is recomputed runs while it is gathered for the backward.
    backward = work.updates * (1 + turns)
    rollout = shape.parameters * work.bytes_each
    if not work.rolls_out_whole:
        rollout = work.rollout_turns * recipe.sampling.max_tokens * layers + ends
    # And the prompt's prefill before the rollout.
    return _Gathers(rollout + layers + ends, forward * layers + ends, backward * layers)


def _traffic(work: _Work) -> dict[str, float]:
    """Bytes that a rank receives per step: its own share of what is gathered is there already."""
    received: dict[str, float] = {}
    if work.is_sharded:
        made, share = _gathers(work), (work.ranks - 1) / work.ranks
        # DeepSpeed takes the second shards in backward passes only.
        near = work.secondary or work.ranks
        backward = made.backward * (near - 1) / near
        if work.ranks > 1:
            received["base, for the rollout"] = made.rollout * share
            received["base, for the update"] = made.forward * share + backward
        if work.offload != "none":
            own = made.rollout + made.forward + (0.0 if work.secondary else made.backward)
            place = "host" if work.offload == "cpu" else "disk"
            received[f"base, own shares from the {place}"] = own / work.ranks
    if work.ranks > 1:
        # Summed in float64, and copied from the first rank after the optimizer's step.
        received["gradient and prompt"] = 2.0 * work.trained * 8 * work.updates
    return received


def _link_seconds(work: _Work, whole: float, among: int) -> float:
    """Least seconds in which weights are gathered among ranks.

    Inside a node every rank receives all but its share over its own link; what comes from other
    nodes comes once per node, over all of its adapters together.
    """
    device = work.device
    nodes = -(-among // device.per_node)
    inside = whole * (among - 1) / among / device.link
    beyond = whole * (nodes - 1) / nodes / (min(device.per_node, among) * device.network)
    return max(inside, beyond)


def _offload_seconds(work: _Work, whole: float) -> float:
    """Least seconds in which a rank's own shares come from host or disk."""
    if work.offload == "none":
        return 0.0
    rate = work.device.host
    if work.offload == "nvme":
        rate = min(rate, work.device.disk / min(work.device.per_node, work.ranks))
    return whole / work.ranks / rate


def _traffic_seconds(work: _Work) -> tuple[float, float]:
    """Least seconds of a rollout's traffic, and of all traffic of a step."""
    rollout = update = 0.0
    if work.is_sharded:
        made = _gathers(work)
        near = work.secondary or work.ranks
        rollout = max(
            _link_seconds(work, made.rollout, work.ranks), _offload_seconds(work, made.rollout)
        )
        forward = max(
            _link_seconds(work, made.forward, work.ranks), _offload_seconds(work, made.forward)
        )
        kept = 0.0 if work.secondary else _offload_seconds(work, made.backward)
        update = forward + max(_link_seconds(work, made.backward, near), kept)
    if work.ranks > 1:
        is_far = work.ranks > work.device.per_node
        rate = work.device.network if is_far else work.device.link
        update += 2.0 * work.trained * 8 * work.updates / rate
    return rollout, rollout + update


def _decode_seconds(work: _Work, cache: float) -> float:
    """Least seconds of one token of every row: weights and cache are read, products computed."""
    shape, device = work.shape, work.device
    met = min(shape.parameters, work.rows_at_once * shape.active_parameters)
    # The cache begins with prompt and query: of its columns, this share is read on average.
    filled = 1.0 - work.recipe.sampling.max_tokens / (2.0 * work.columns)
    return max(
        (met * work.bytes_each + filled * cache) / device.bandwidth,
        work.rows_at_once * 2 * shape.active_parameters / device.flops,
    )


def _bounds(work: _Work, cache: float) -> tuple[dict[str, float], float]:
    """Least seconds of each part of a step, and most completion tokens per second of all ranks."""
    recipe, device = work.recipe, work.device
    references = 1 if recipe.algorithm.needs_reference else 0
    rollout = work.rollout_turns * recipe.sampling.max_tokens * _decode_seconds(work, cache)
    # Forward, and a backward to the inputs only; a reference costs one forward. What is recomputed
    # are the layers, not the LM head.
    per_token = (2 + references) * 2 * work.shape.active_parameters
    if work.recomputes:
        per_token += 2 * (work.shape.active_parameters - work.shape.end_parameters)
    update = work.micro_batches.tokens * per_token / device.flops
    rollout_traffic, traffic = _traffic_seconds(work)
    drawing = 1 if work.draws_together else work.ranks
    rate = drawing * work.rows * recipe.sampling.max_tokens / (rollout + rollout_traffic)
    return {"rollout": rollout, "update": update, "traffic": traffic}, rate


def _fitting_rows(work: _Work, held: Mapping[str, float], at_rest: float) -> int:
    """Most rows that can be decoded at a time; 0 where not even one fits."""
    growing = ("cache of a rollout", "cache, while it grows", "drawing of tokens")
    each = sum(held[part] for part in growing) / work.rows_at_once
    free = work.device.memory - at_rest - held["base, gathered for a rollout"]
    return max(0, min(work.rows, int(free / each)))


def _advice(work: _Work, held: Mapping[str, float], made: Plan) -> tuple[str, ...]:
    """Sentences about what the numbers mean for how to run this."""
    said = []
    memory = work.device.memory
    if made.rollout_bytes >= memory:
        if made.fitting_rows:
            said.append(
                f"the cache of {work.rows_at_once} rows at a time does not fit; engine.max_rows="
                f"{made.fitting_rows} does"
            )
        else:
            said.append(
                "not even one row at a time fits in a rollout: shorten sampling.max_tokens, or use "
                "more GPUs with distributed.base=sharded"
            )
    together = work.is_sharded and not work.rolls_out_whole and work.ranks > 1
    if together:
        layers = work.shape.layers * work.shape.layer_parameters * work.bytes_each
        link = max(_link_seconds(work, layers, work.ranks), _offload_seconds(work, layers))
        decode = _decode_seconds(work, held["cache of a rollout"])
        if link > decode:
            share = work.shape.parameters * work.bytes_each / (_SERVED_SHARE * memory)
            gpus = 1 << max(0, math.ceil(share) - 1).bit_length()
            said.append(
                f"generation under ZeRO-3 is bound by its traffic: each token gathers "
                f"{layers / 1e9:.3g} GB on every GPU, {link:.3g} s beside {decode:.3g} s of "
                f"decoding; where {made.decode_tokens_per_second:,.0f} tokens/s are too few, serve "
                f"the base by vLLM with tensor parallel over {gpus} GPUs (rlprompt submit "
                "--server), which answers under text prompts"
            )
    return tuple(said)
