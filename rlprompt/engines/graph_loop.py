"""Decoding by recorded steps: the same tokens as the plain loop, with one launch for each.

On a GPU a decode step of a small batch takes less time than Python takes to launch its hundreds of
kernels. So a step is recorded as a CUDA graph, from the embedding of the last tokens to the draw of
the next ones, and replayed. A recording knows addresses, not values: everything that changes from
token to token stands in tensors that stay where they are (`_Memory`), and what is left is a matter
of shapes. These come in buckets, of rows and of columns, one recording each, made when it is first
needed.

A token's end is seen by the host only every few tokens, since each look waits for the device. Rows
that have ended go on until then, in their own columns, and what they draw is thrown away.

Letters: B rows, G groups, L layers, H_kv key/value heads, S columns, D head dim, K tokens between
two looks, d model width.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlprompt.engines.cache import DecodeCache, own_spans, seen_columns
from rlprompt.engines.capture import Capture, CudaCapture, Function
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.token_loop import ModuleDecoder, Row, TokenLoop
from rlprompt.errors import InputError
from rlprompt.kernels.operands import Packed, Spans
from rlprompt.model.forward.adapter_hooks import attach_low_rank
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.types import Adapter, LowRank

logger = logging.getLogger(__name__)

CHECK_EVERY = 8
"""K: a look costs the device some idle time, once in K tokens; a row that has ended costs at most
K - 1 tokens in a batch that runs anyway, and the batch as a whole as many at its end."""
MOST_GRAPHS = 48
"""Recordings that are kept; the one unused for longest goes first."""
MEMORY_SHARE = 1 / 8
"""Of the device's memory, what fixed tensors may take; they stay between two rollouts."""
_LEAST_COLUMNS = 128


def row_bucket(rows: int) -> int:
    """The rows of the recording that serves so many: powers of two, and three quarters of them."""
    power = 1 << (rows - 1).bit_length()
    smaller = power * 3 // 4
    return smaller if power > 2 and rows <= smaller else power


def column_bucket(columns: int) -> int:
    """The columns of the recording that serves so many: powers of two from 128 on."""
    return max(_LEAST_COLUMNS, 1 << (columns - 1).bit_length())


@dataclass(frozen=True)
class GraphLimits:
    """How shapes are rounded up, and what recordings may take."""

    most_bytes: int
    """For keys and values at fixed addresses."""
    check_every: int = CHECK_EVERY
    """Tokens between two looks at which rows have ended."""
    rows: Callable[[int], int] = row_bucket
    columns: Callable[[int], int] = column_bucket
    most_graphs: int = MOST_GRAPHS


class StaticCache:
    """Keys and values in fixed memory, whose next column is known on the device only.

    Satisfies `engines.cache.AttendedCache`.
    """

    def __init__(self, data: Tensor, padding: Tensor, column: Tensor, prefix_tokens: int) -> None:
        """Look at memory that somebody else owns.

        Args:
            data: [2 L, B, H_kv, S, D], keys of all layers, then values.
            padding: int64 [B], unseen columns between prefix and query.
            column: int64 [1], the column that is written next.
            prefix_tokens: columns at the front that are equal in all rows.
        """
        self._data, self._padding, self._column = data, padding, column
        self.prefix_tokens = prefix_tokens

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are stored in."""
        return self._data.dtype

    def reserve(self) -> None:
        """Nothing: all columns are there."""

    def positions(self) -> Tensor:
        """Absolute position [B] of the column about to be written."""
        return self._column - self._padding

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, [B, H_kv, S, D], views."""
        return self._data[layer], self._data[self._data.shape[0] // 2 + layer]

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write the column of every row, [B, H_kv, D] each."""
        for stored, new in zip(self.layer(layer), (key, value), strict=True):
            stored.index_copy_(2, self._column, new[:, :, None])

    def has_cpp_layout(self, layer: int) -> bool:
        """False: the C++ kernels have recordings of their own, steps in one call."""
        return False

    def attend(self, layer: int, new: Packed, scaling: float) -> Tensor:
        """Nothing that this memory is laid out for.

        Raises:
            ValueError: always.
        """
        raise ValueError("fixed memory is not laid out for the C++ kernels")

    def seen(self, window: int | None) -> Tensor:
        """The columns that the token about to be written may see, bool [B, 1, S]."""
        columns = self._data.shape[3]
        return seen_columns(columns, self._padding, self._column, self.prefix_tokens, window)

    def spans(self) -> Spans:
        """The columns behind the prefix that each row sees, the one to be written included."""
        return own_spans(self._padding, self._column, self.prefix_tokens)


class _Memory:
    """Every tensor that recorded steps read or write, at an address that stays."""

    def __init__(self, like: Tensor, rows: int, columns: int, block: int) -> None:
        """Take memory.

        Args:
            like: a cache [2 L, any, H_kv, any, D].
            rows: most rows.
            columns: most columns.
            block: tokens between two looks.
        """
        self.rows, self.columns, self.block = rows, columns, block
        self.data = like.new_zeros(like.shape[0], rows, like.shape[2], columns, like.shape[4])
        wide = torch.promote_types(like.dtype, torch.float32)
        self.padding, self.tokens = like.new_zeros(2, rows, dtype=torch.int64).unbind()
        self.column, self.place = like.new_zeros(2, 1, dtype=torch.int64).unbind()
        """The next column, and the place of the next token among those of a block."""
        self.drawn = like.new_zeros(block, rows, dtype=torch.int64)
        self.logprobs = like.new_zeros(block, rows, dtype=wide)
        self.uniform = like.new_zeros(block, rows, dtype=torch.float64)

    @staticmethod
    def bytes_for(like: Tensor, rows: int, columns: int) -> int:
        """What keys and values take."""
        per_column = like.shape[0] * like.shape[2] * like.shape[4] * like.element_size()
        return per_column * rows * columns

    def load(self, cache: DecodeCache) -> None:
        """Take over the rows of a prefilled cache."""
        rows, columns = cache.num_rows, cache.column
        # Columns that are hidden by a mask must not hold what an earlier rollout left: a NaN shows.
        self.data.zero_()
        self.data[:, :rows, :, :columns] = cache.data[:, :rows, :, :columns]
        self.padding.zero_()
        self.padding[:rows] = cache.padding[:rows]
        self.column.fill_(columns)
        self.tokens.zero_()

    def move(self, source: Sequence[int], target: Sequence[int], columns: int) -> None:
        """Copy rows, as far as they are written, over others."""
        moved, into = (torch.tensor(r, device=self.data.device) for r in (source, target))
        self.data[:, into, :, :columns] = self.data[:, moved, :, :columns]
        for each in (self.padding, self.tokens):
            each[into] = each[moved]

    def undo(self) -> Function:
        """What brings back, as it is now, all that a step changes and another one reads."""
        state = (self.tokens, self.column, self.place)
        before = [tensor.clone() for tensor in state]

        def bring_back() -> None:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(old)

        return bring_back


class _FixedLowRank:
    """An adapter of low rank whose numbers stand at fixed addresses.

    Satisfies `rlprompt.types.Adapter`.
    """

    def __init__(self, additions: Mapping[str, LowRank]) -> None:
        """Copy what an adapter adds."""
        self._additions = {
            name: LowRank(each.down.detach().clone(), each.up.detach().clone(), each.scale)
            for name, each in additions.items()
        }

    def overwrite(self, additions: Mapping[str, LowRank]) -> bool:
        """Take over the numbers of another one; False = it is of another shape."""
        if _outline(additions) != _outline(self._additions):
            return False
        for name, each in additions.items():
            self._additions[name].down.copy_(each.down)
            self._additions[name].up.copy_(each.up)
        return True

    def attach(self, model: nn.Module) -> Callable[[], None]:
        """Add to the outputs of layers, as the adapter itself does."""
        return attach_low_rank(model, self._additions)

    def snapshot(self) -> _FixedLowRank:
        """A copy that later rollouts leave alone."""
        return _FixedLowRank(self._additions)

    def low_rank(self) -> Mapping[str, LowRank]:
        """What is added to layers, by full name."""
        return self._additions


def _outline(additions: Mapping[str, LowRank]) -> dict[str, tuple[object, ...]]:
    return {
        name: (each.down.shape, each.up.shape, each.down.dtype, each.up.dtype, each.scale)
        for name, each in additions.items()
    }


class _Key(NamedTuple):
    """What is written into a recording: shapes, and numbers that Python knows."""

    rows: int
    columns: int
    prefix_tokens: int
    sampling: SamplingSettings
    banned: tuple[int, ...]
    adapter: _FixedLowRank | None


class GraphLoop:
    """Draws the tokens of `TokenLoop` by recorded steps, on one base."""

    def __init__(
        self,
        forward: PrefixForward,
        limits: GraphLimits,
        make_capture: Callable[[], Capture],
        is_required: bool = False,
    ) -> None:
        """Keep the parts; nothing is recorded and no memory is taken yet.

        Args:
            forward: the base.
            limits: how shapes are rounded, and most memory.
            make_capture: what makes the recorder of one set of fixed tensors.
            is_required: whether what cannot be recorded is an error.
        """
        self._forward = forward
        self._modules = ModuleDecoder(forward)
        self.limits = limits
        self._make_capture = make_capture
        self._is_required = is_required
        self._capture = make_capture()
        self._memory: _Memory | None = None
        self._adapter: _FixedLowRank | None = None
        self._recorded: OrderedDict[_Key, Function] = OrderedDict()
        self._broken = False
        self._said: set[str] = set()

    @property
    def num_graphs(self) -> int:
        """Recordings that are kept."""
        return len(self._recorded)

    def run(
        self,
        loop: TokenLoop,
        cache: DecodeCache,
        states: Tensor,
        uniform: Tensor,
        adapter: Adapter | None,
    ) -> list[Row] | None:
        """Decode the rows of a cache; arguments and result as of `TokenLoop.run`.

        Args:
            loop: what is drawn, and until when.
            cache: B prefilled rows, which are copied.
            states: [G, d], what the first tokens are drawn from.
            uniform: [max_tokens, B] in [0, 1).
            adapter: the adapter of the rows' prefix; None = none is on.

        Returns:
            What was drawn, in the order of the rows; None = these rows are not for recordings, and
            nothing was drawn.

        Raises:
            InputError: recordings are required and cannot be made.
        """
        if not self._works() or loop.max_tokens == 1:
            return None
        fixed = None
        if adapter is not None:
            fixed = self._fixed(adapter)
            if fixed is None:
                self._refuse("adapter", "the adapter is not of low rank, as LoRA is")
                return None
        memory = self._fitting_memory(loop, cache)
        if memory is None:
            return None
        memory.load(cache)
        with self._forward.adapted(fixed):
            decoding = _Decoding(self, loop, memory, cache, uniform.to(states.device), fixed)
            rows = decoding.run(states)
        if not self._works():  # found out on the way
            self._release()
        return rows

    def _works(self) -> bool:
        """Whether no step has failed to be recorded."""
        return not self._broken

    def step(self, loop: TokenLoop, memory: _Memory, key: _Key) -> Function:
        """A decode step of a bucket, recorded unless it cannot be.

        Args:
            loop: what draws.
            memory: what the step reads and writes.
            key: the bucket.
        """
        if key in self._recorded:
            self._recorded.move_to_end(key)
            return self._recorded[key]
        function = self._function(loop, memory, key)
        if self._broken:
            return function
        undo = memory.undo()
        try:
            made = self._capture(function, undo)
        except Exception as error:  # whatever it is: a plain call gives the same numbers
            undo()
            self._broken = True
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._refuse("step", f"a step of this base cannot be recorded ({said})")
            return function
        logger.debug("decode step of %d rows, %d columns recorded", key.rows, key.columns)
        self._recorded[key] = made
        while len(self._recorded) > self.limits.most_graphs:
            self._recorded.popitem(last=False)
        return made

    def _function(self, loop: TokenLoop, memory: _Memory, key: _Key) -> Function:
        """One step: the last tokens in, the next ones drawn and noted."""
        rows, drawer, hidden = key.rows, loop.drawer, self._modules.hidden
        tokens, place = memory.tokens[:rows], memory.place
        data = memory.data[:, :rows, :, : key.columns]
        cache = StaticCache(data, memory.padding[:rows], memory.column, key.prefix_tokens)
        uniform = memory.uniform[:, :rows]
        notes = memory.drawn[:, :rows], memory.logprobs[:, :rows]
        banned = None
        if key.banned:
            banned = torch.tensor(key.banned, dtype=torch.int64, device=tokens.device)

        def step() -> None:
            logits = drawer.logits(hidden(tokens, cache))
            drawn = drawer.draw(logits, uniform.index_select(0, place)[0], banned)
            for noted, new in zip(notes, drawn, strict=True):
                noted.index_copy_(0, place, new[None])
            tokens.copy_(drawn[0])
            place.add_(1)
            memory.column.add_(1)

        return step

    def _fixed(self, adapter: Adapter) -> _FixedLowRank | None:
        """The adapter's numbers at addresses that recordings know; None = it has another form."""
        additions = adapter.low_rank()
        if additions is None:
            return None
        if self._adapter is None or not self._adapter.overwrite(additions):
            for key in [key for key in self._recorded if key.adapter is not None]:
                del self._recorded[key]
            self._adapter = _FixedLowRank(additions)
        return self._adapter

    def _fitting_memory(self, loop: TokenLoop, cache: DecodeCache) -> _Memory | None:
        """Fixed memory that these rows fit into; None = it would be too much."""
        if any(cache.has_cpp_layout(layer) for layer in range(cache.data.shape[0] // 2)):
            self._refuse("kernels", "the C++ kernels decode this base")
            return None
        limits, held = self.limits, self._memory
        rows = limits.rows(cache.num_rows)
        columns = _whole(cache.column + loop.max_tokens - 1)
        if held is not None and rows <= held.rows and columns <= held.columns:
            return held
        if held is not None:  # one set for all that comes, where it is allowed
            both = max(rows, held.rows), max(columns, held.columns)
            if _Memory.bytes_for(cache.data, *both) <= limits.most_bytes:
                rows, columns = both
        needed = _Memory.bytes_for(cache.data, rows, columns)
        if needed > limits.most_bytes:
            self._refuse(
                "memory",
                f"{needed / 2**20:.0f} MiB of keys and values at fixed addresses for {rows} rows "
                f"are more than the {limits.most_bytes / 2**20:.0f} MiB that may stay between "
                "rollouts; a smaller engine.max_rows or sampling.max_tokens needs less",
            )
            return None
        self._release()
        self._memory = _Memory(cache.data, rows, columns, limits.check_every)
        return self._memory

    def _release(self) -> None:
        """Give all fixed memory back, and the recordings that point into it."""
        self._recorded.clear()
        self._memory = None
        self._capture = self._make_capture()

    def _refuse(self, kind: str, reason: str) -> None:
        """Say once of each kind of reason why rows are decoded plainly.

        Raises:
            InputError: they must not be.
        """
        if self._is_required:
            raise InputError(f"engine.cuda_graphs is on, but {reason}; set it to auto")
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("decoding without CUDA graphs: %s", reason)


class _Decoding:
    """One batch of rows on its way."""

    def __init__(
        self,
        graphs: GraphLoop,
        loop: TokenLoop,
        memory: _Memory,
        cache: DecodeCache,
        uniform: Tensor,
        adapter: _FixedLowRank | None,
    ) -> None:
        self._graphs, self._loop, self._memory = graphs, loop, memory
        self._uniform, self._adapter = uniform, adapter
        self._prefix_tokens, self._column = cache.prefix_tokens, cache.column
        self._going = list(range(cache.num_rows))
        """Which of the first rows stand where."""
        self._rows = [Row([], []) for _ in self._going]
        everything = loop.drawer.sampling
        self._drawn_by = everything.model_copy(
            update={"max_tokens": 1, "min_tokens": 0, "stop_token_ids": ()}
        )
        """What a recording has of the settings."""
        self._stop = tuple(sorted(loop.stop))

    def run(self, states: Tensor) -> list[Row]:
        """Draw block after block until all rows have ended."""
        loop, total = self._loop, len(self._rows)
        logits = loop.drawer.logits(states).repeat_interleave(total // len(states), 0)
        # Who listens wants each token when it is drawn.
        block = 1 if loop.heard is not None else self._memory.block
        for first in range(0, loop.max_tokens, block):
            end = min(first + block, loop.max_tokens)
            self._begin(first, end)
            for number in range(first, end):
                if number == 0:
                    self._draw_first(logits)
                else:
                    self._replay(number)
            ended = self._look(first, end)
            self._drop(ended)
            if not self._going:
                break
        return self._rows

    def _banned(self, number: int) -> tuple[int, ...]:
        return self._stop if number < self._loop.drawer.sampling.min_tokens else ()

    def _begin(self, first: int, end: int) -> None:
        """Hand over the numbers that a block is drawn by."""
        memory, count = self._memory, len(self._going)
        going = torch.tensor(self._going, device=self._uniform.device)
        memory.uniform[: end - first, :count] = self._uniform[first:end].index_select(1, going)
        memory.place.zero_()

    def _draw_first(self, logits: Tensor) -> None:
        """The tokens that the prefill's states give; nothing to record."""
        memory, count = self._memory, len(self._going)
        banned = self._banned(0)
        ids = torch.tensor(banned, dtype=torch.int64, device=logits.device) if banned else None
        tokens, logprobs = self._loop.drawer.draw(logits, memory.uniform[0, :count], ids)
        memory.drawn[0, :count] = tokens
        memory.logprobs[0, :count] = logprobs
        memory.tokens[:count] = tokens
        memory.place.add_(1)

    def _replay(self, number: int) -> None:
        limits, memory = self._graphs.limits, self._memory
        key = _Key(
            min(limits.rows(len(self._going)), memory.rows),
            min(limits.columns(self._column + 1), memory.columns),
            self._prefix_tokens,
            self._drawn_by,
            self._banned(number),
            self._adapter,
        )
        self._graphs.step(self._loop, memory, key)()
        self._column += 1

    def _look(self, first: int, end: int) -> set[int]:
        """Note what a block has drawn, up to each row's end; the places of rows that ended."""
        memory, count, loop = self._memory, len(self._going), self._loop
        tokens = memory.drawn[: end - first, :count].t().tolist()
        scores = memory.logprobs[: end - first, :count].t().tolist()
        ended, longest = set(), 0
        for place, row in enumerate(self._going):
            stops = (n for n, token in enumerate(tokens[place], 1) if token in loop.stop)
            length = next(stops, None)
            if length is not None:
                ended.add(place)
            length = length or end - first
            self._rows[row].token_ids.extend(tokens[place][:length])
            self._rows[row].logprobs.extend(scores[place][:length])
            longest = max(longest, length)
        if loop.progress is not None:
            for number in range(first, first + longest):
                loop.progress(number + 1, loop.max_tokens)
        if loop.heard is not None:
            loop.heard(tokens[0][0])
        return ended

    def _drop(self, ended: Iterable[int]) -> None:
        """Let the last rows that go on take the places of those that have ended."""
        gone = set(ended)
        remaining = len(self._going) - len(gone)
        holes = [place for place in range(remaining) if place in gone]
        movers = [place for place in range(remaining, len(self._going)) if place not in gone]
        if holes:
            self._memory.move(movers, holes, self._column)
        for hole, mover in zip(holes, movers, strict=True):
            self._going[hole] = self._going[mover]
        del self._going[remaining:]


def _whole(columns: int) -> int:
    """As many columns or a few more."""
    return -(-columns // _LEAST_COLUMNS) * _LEAST_COLUMNS


def graph_loop(forward: PrefixForward, choice: str) -> GraphLoop | None:
    """Recorded decoding where the device has it.

    Args:
        forward: the base.
        choice: `engine.cuda_graphs` of a recipe.

    Returns:
        None where tokens are drawn by the plain loop.

    Raises:
        InputError: recordings are asked for and cannot be.
    """
    if choice == "off":
        return None
    device, reason = forward.device, None
    if device.type != "cuda":
        reason = f"the base is on {device.type}, which has none"
    elif forward.base.shards is not None:
        reason = "the base is sharded, and its layers arrive anew at every token"
    if reason is None:
        total = torch.cuda.get_device_properties(device).total_memory
        limits = GraphLimits(most_bytes=int(total * MEMORY_SHARE))
        return GraphLoop(forward, limits, lambda: CudaCapture(device), choice == "on")
    if choice == "on":
        raise InputError(f"engine.cuda_graphs is on, but {reason}; set it to auto")
    return None
