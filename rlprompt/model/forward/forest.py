"""Several prompts in one forward: every row of packed tokens stands behind its own prefix.

In a `TokenTree` all rows share one prefix. Here each row has the prefix of its prompt, of whatever
length, or none: queries under a population of prompts, or the prompts themselves. Keys and values
of the prefixes stand behind those of the packed tokens, once per prompt, so that what a row sees is
two ranges of one block, and attention is the tree's: the prefix in the place of the parent. Nothing
here has a gradient.

Letters: N packed tokens, R rows, Q padded row length, W padded length of a prefix with its row,
U prompts, P tokens of all prefixes, H heads, H_kv key/value heads, D head dim. Masks: True = the
position counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rlprompt.kernels.cpu.ops import tree_attention
from rlprompt.kernels.dispatch import fused_attention
from rlprompt.kernels.operands import KeyValue, Packed
from rlprompt.kernels.reference import mask_bias
from rlprompt.kernels.triton.attention_rows import AttentionRows
from rlprompt.model.forward.attention import LayerCall, windowed
from rlprompt.model.forward.tree import PaddedRows, dense, padded_rows
from rlprompt.types import PrefixKV


@dataclass(frozen=True)
class Forest:
    """Where the tokens of R rows stand, and those of the prefixes that they see."""

    rows: PaddedRows
    """The rows alone; positions are counted from the start of each row's prompt."""
    spans: Tensor
    """int64 [R, 4]: a row's first packed token and its number of tokens, the first key of its
    prefix (from N on) and its number of tokens; see `kernels.cpu.ops.tree_attention`."""
    prefix_lengths: tuple[int, ...]
    """The number of tokens of each of U prefixes."""
    index: Tensor
    """int64 [R * W], the key of each place of [prefix | row]; padding names key 0."""
    mask: Tensor
    """bool [R, W]."""

    @property
    def positions(self) -> Tensor:
        """int64 [N], counted from the start of each row's prompt."""
        return self.rows.positions[self.rows.mask]

    def unfold(self, keys: Tensor) -> Tensor:
        """Keys, or values, [N + P, H_kv, D] as [prefix | row], right-padded [R, H_kv, W, D]."""
        whole = keys.index_select(0, self.index)
        return whole.view(*self.mask.shape, *keys.shape[1:]).transpose(1, 2)


def build_forest(
    lengths: Sequence[int],
    device: torch.device,
    prefix_lengths: Sequence[int] = (),
    prompt_of_row: Sequence[int] = (),
) -> Forest:
    """Lay out R rows that are packed behind each other.

    Args:
        lengths: the number of tokens of each row, at least one each.
        device: where the tensors go.
        prefix_lengths: the number of tokens of each of the U prefixes.
        prompt_of_row: the prefix that each row stands behind, 0 to U - 1; empty = no row has one.

    Raises:
        ValueError: no row, or one without a token.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError("a forest needs a row, and at least one token in every row")
    firsts = list(accumulate(lengths, initial=0))
    prefix_firsts = list(accumulate(prefix_lengths, initial=firsts[-1]))
    before = [(prefix_firsts[u], prefix_lengths[u]) for u in prompt_of_row]
    before = before or [(0, 0)] * len(lengths)
    spans = torch.tensor([[f, n, *b] for f, n, b in zip(firsts[:-1], lengths, before, strict=True)])
    first, length, prefix_first, prefix_length = spans.t()[..., None]
    place = torch.arange(int((length + prefix_length).max()))[None]
    mask = place < prefix_length + length
    own = torch.where(mask, first + place - prefix_length, 0)
    index = torch.where(place < prefix_length, prefix_first + place, own)
    rows = padded_rows(lengths, [tokens for _, tokens in before])
    return Forest(
        rows.to(device),
        spans.to(device),
        tuple(prefix_lengths),
        index.flatten().to(device),
        mask.to(device),
    )


class ForestContext:
    """Attention in a `Forest`: each row to its prefix and, causally, to itself.

    What it keeps is what decoding goes on from, where every row is [prefix | row].
    """

    products = None

    def __init__(
        self, forest: Forest, prefixes: Sequence[PrefixKV] = (), fused: bool | None = None
    ) -> None:
        """Prepare for one forward.

        Args:
            forest: the packed rows.
            prefixes: keys and values of each of the U prompts; they get no gradient.
            fused: whether attention goes through the Triton kernels; None = as the device suggests.

        Raises:
            ValueError: the prefixes are of other lengths, or an adapter belongs to one.
        """
        lengths = tuple(prefix.num_tokens for prefix in prefixes)
        if lengths != forest.prefix_lengths:
            raise ValueError(
                f"forest is built for prefixes of {forest.prefix_lengths} tokens, given {lengths}"
            )
        if any(prefix.adapter is not None for prefix in prefixes):
            raise ValueError("rows under an adapter cannot stand beside others")
        self._forest = forest
        self._prefixes = prefixes
        self._fused = fused
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._biases: dict[int | None, Tensor] = {}
        self._triton_rows: AttentionRows | None = None
        self.cpp_layers: set[int] = set()
        """Layers whose attention runs in the C++ kernels."""

    @property
    def mask(self) -> Tensor:
        """The tokens of each [prefix | row], bool [R, W]."""
        return self._forest.mask

    @property
    def query_keys(self) -> Iterator[Tensor]:
        """Each layer's keys of [prefix | row], right-padded [R, H_kv, W, D], made one by one."""
        return map(self._forest.unfold, self._keys)

    @property
    def query_values(self) -> Iterator[Tensor]:
        """Each layer's values, as `query_keys`."""
        return map(self._forest.unfold, self._values)

    def row_prefixes(self) -> list[PrefixKV]:
        """Each row as a prefix for others, without what stood before it."""
        ranges = self._forest.spans[:, :2].tolist()
        return [
            PrefixKV(
                [key[first : first + n].transpose(0, 1).contiguous() for key in self._keys],
                [value[first : first + n].transpose(0, 1).contiguous() for value in self._values],
            )
            for first, n in ranges
        ]

    @torch.no_grad()
    def attend(self, call: LayerCall) -> Tensor:
        """Attention of all rows, packed again: [1, H, N, D]."""
        query, key, value = (t[0].transpose(0, 1) for t in (call.query, call.key, call.value))
        key = torch.cat([key, *(_packed(p.keys[call.layer], key) for p in self._prefixes)])
        value = torch.cat([value, *(_packed(p.values[call.layer], value) for p in self._prefixes)])
        self._keys.append(key)
        self._values.append(value)
        out = self._attended(call, Packed(dense(query), key, value))
        return out.transpose(0, 1)[None]

    def _attended(self, call: LayerCall, packed: Packed) -> Tensor:
        """[N, H, D], by what serves the layer."""
        forest, like = self._forest, packed.query
        shared = KeyValue(packed.key[:0].transpose(0, 1), packed.value[:0].transpose(0, 1))
        if call.cpp:
            self.cpp_layers.add(call.layer)
            return tree_attention(packed, shared, forest.spans, call.scaling)
        fused = self._fused
        if fused is None:
            fused = call.is_fused("tree")
        if fused:
            return fused_attention(packed, shared, self._rows(), call.scoring)
        key, value = forest.unfold(packed.key), forest.unfold(packed.value)
        bias = self._bias(call.window, like.dtype)
        return forest.rows.fold(call.attend(forest.rows.unfold(like), key, value, bias))

    def _rows(self) -> AttentionRows:
        """The forest as the Triton kernels read it: a row's prefix in the place of its parent."""
        if self._triton_rows is None:
            first, length, prefix_first, prefix_length = self._forest.spans.t()
            none = torch.zeros_like(first)
            ranges = [first, first + length, prefix_first, prefix_first + prefix_length, none, none]
            positions = torch.cat(
                [
                    self._forest.positions,
                    *(torch.arange(n, device=first.device) for n in self._forest.prefix_lengths),
                ]
            )
            longest = self._forest.rows.mask.shape[1]
            table = torch.stack(ranges, 1)
            self._triton_rows = AttentionRows(table.int(), positions.int(), longest)
        return self._triton_rows

    def _bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What each token of a row sees of [prefix | row], as an additive bias [R, Q, W]."""
        if window not in self._biases:
            own = self._forest.rows.positions
            seen = self._forest.mask
            place = torch.arange(seen.shape[1], device=seen.device)[None].expand(len(seen), -1)
            mask = seen[:, None] & (place[:, None] <= own[:, :, None])
            self._biases[window] = mask_bias(windowed(mask, own, place, window), dtype)
        return self._biases[window]


def _packed(prefix: Tensor, like: Tensor) -> Tensor:
    """[H_kv, P, D] -> [P, H_kv, D], of the type of `like`."""
    return prefix.transpose(0, 1).to(like.dtype)
