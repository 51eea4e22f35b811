"""Packed forwards: prompt -> query -> completions, every token computed once.

A batch is a tree. The prompt's keys and values are shared by all rows, a query's by the completions
of its group. All tokens stand packed behind each other in one row [1, N], so that linear layers see
no padding; only attention unfolds them into padded rows.

Letters: N packed tokens, G groups, Q padded query length, B completions, T padded completion
length, P prefix tokens, H heads, H_kv key/value heads, D head dim. Masks: True = the position
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlprompt.kernels.cpu.ops import tree_attention
from rlprompt.kernels.dispatch import fused_attention
from rlprompt.kernels.gather import fold, repeat_rows, unfold
from rlprompt.kernels.operands import KeyValue, Packed
from rlprompt.kernels.reference import mask_bias
from rlprompt.kernels.triton.attention_rows import AttentionRows, attention_rows
from rlprompt.model.cpu.rollout_products import ProductRows
from rlprompt.model.forward.attention import LayerCall, windowed
from rlprompt.types import PrefixKV


@dataclass(frozen=True)
class PaddedRows:
    """Where n consecutive packed tokens stand in R right-padded rows of width W."""

    index: Tensor
    """int64 [R * W], the token (0..n-1) of each place; padding names token 0."""
    place: Tensor
    """int64 [n], the place of each token."""
    mask: Tensor
    """bool [R, W]."""
    positions: Tensor
    """int64 [R, W] absolute positions; padding continues the count."""

    @property
    def num_tokens(self) -> int:
        """The number of packed tokens, n."""
        return int(self.place.shape[0])

    def unfold(self, packed: Tensor) -> Tensor:
        """[n, H, D] -> [R, H, W, D]."""
        rows, width = self.mask.shape
        padded = unfold(packed, self.index, self.place)
        return padded.view(rows, width, *packed.shape[1:]).transpose(1, 2)

    def fold(self, padded: Tensor) -> Tensor:
        """[R, H, W, D] -> [n, H, D]."""
        flat = padded.transpose(1, 2).reshape(-1, padded.shape[1], padded.shape[3])
        return fold(flat, self.place)

    def to(self, device: torch.device) -> PaddedRows:
        """The same on a device."""
        tensors = (self.index, self.place, self.mask, self.positions)
        return PaddedRows(*(tensor.to(device) for tensor in tensors))


@dataclass(frozen=True)
class TokenTree:
    """The packed tokens of several groups under one prompt of P positions.

    Completion inputs hold all but the last token of each completion: the last one predicts nothing
    that is scored. The first completion token is predicted by the query's last token.
    """

    token_ids: Tensor
    """int64 [N]: all queries, then all completion inputs."""
    positions: Tensor
    """int64 [N], counted from the start of the prompt."""
    prefix_length: int
    queries: PaddedRows
    completions: PaddedRows | None
    """None when no completion has an input token (prefill, or one-token completions)."""
    group_of_row: Tensor
    """int64 [B]."""
    predictors: Tensor
    """int64 [M]: for each completion token, the packed token that predicts it."""
    targets: Tensor
    """int64 [M]: the completion tokens, rows behind each other."""
    target_mask: Tensor
    """bool [B, T_max]: unflattens per-token results, `padded[target_mask] = flat`."""
    spans: Tensor
    """int64 [G + B, 4]: where queries and completion inputs stand, see
    `kernels.cpu.ops.tree_attention`."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.token_ids.shape[0])

    def unflatten(self, flat: Tensor) -> Tensor:
        """[M] per-token values -> [B, T_max], zero where the mask is False."""
        out = flat.new_zeros(self.target_mask.shape)
        return out.masked_scatter(self.target_mask, flat)


def padded_rows(lengths: Sequence[int], starts: Sequence[int]) -> PaddedRows:
    """Rows of `lengths` tokens, packed behind each other, at positions from `starts` on."""
    place = torch.arange(max(lengths))
    length = torch.tensor(lengths)
    offset = torch.cumsum(length, 0) - length
    mask = place[None] < length[:, None]
    index = torch.where(mask, offset[:, None] + place[None], 0)
    positions = torch.tensor(starts)[:, None] + place[None]
    return PaddedRows(index.flatten(), torch.nonzero(mask.flatten()).flatten(), mask, positions)


def build_tree(
    queries: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    prefix_length: int,
    device: torch.device,
) -> TokenTree:
    """Pack G queries with their completions.

    Args:
        queries: the tokens between the slot and the completion, of each group, at least one each.
        completions: the completions' tokens, of each group; may be empty lists (a prefill).
        prefix_length: the number of prefix tokens, P.
        device: where the tensors go.

    Raises:
        ValueError: an empty query or an empty completion.
    """
    rows = [(g, list(row)) for g, group in enumerate(completions) for row in group]
    if any(len(q) == 0 for q in queries) or any(len(row) == 0 for _, row in rows):
        raise ValueError("a tree needs at least one token in every query and completion")
    query_lengths = [len(q) for q in queries]
    row_groups = [g for g, _ in rows]
    input_lengths = [len(row) - 1 for _, row in rows]
    tokens = [t for q in queries for t in q] + [t for _, row in rows for t in row[:-1]]
    query_starts = [prefix_length] * len(queries)
    row_starts = [prefix_length + query_lengths[g] for g in row_groups]
    spans = zip(query_starts + row_starts, query_lengths + input_lengths, strict=True)
    positions = [start + i for start, length in spans for i in range(length)]
    query_rows = padded_rows(query_lengths, query_starts)
    has_inputs = bool(rows) and max(input_lengths) > 0
    row_rows = padded_rows(input_lengths, row_starts) if has_inputs else None
    tree = TokenTree(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        prefix_length=prefix_length,
        queries=query_rows,
        completions=row_rows,
        group_of_row=torch.tensor(row_groups, dtype=torch.int64),
        predictors=_predictors(row_groups, input_lengths, query_lengths),
        targets=torch.tensor([t for _, row in rows for t in row], dtype=torch.int64),
        target_mask=_target_mask([len(row) for _, row in rows]),
        spans=_spans(query_lengths, row_groups, input_lengths),
    )
    return tree if device.type == "cpu" else _to_device(tree, device)


def _predictors(groups: list[int], input_lengths: list[int], query_lengths: list[int]) -> Tensor:
    """The packed place that each completion token is predicted from: the one before it."""
    last_of_query = torch.cumsum(torch.tensor(query_lengths), 0) - 1
    out: list[int] = []
    offset = sum(query_lengths)
    for group, length in zip(groups, input_lengths, strict=True):
        out.append(int(last_of_query[group]))
        out.extend(range(offset, offset + length))
        offset += length
    return torch.tensor(out, dtype=torch.int64)


def _spans(query_lengths: list[int], groups: list[int], input_lengths: list[int]) -> Tensor:
    """First token and length of each run of tokens, and of the query that it follows."""
    starts = [sum(query_lengths[:g]) for g in range(len(query_lengths))]
    table = [[start, n, 0, 0] for start, n in zip(starts, query_lengths, strict=True)]
    first = sum(query_lengths)
    for group, length in zip(groups, input_lengths, strict=True):
        table.append([first, length, starts[group], query_lengths[group]])
        first += length
    return torch.tensor(table, dtype=torch.int64)


def _target_mask(lengths: list[int]) -> Tensor:
    place = torch.arange(max(lengths, default=0))
    return place[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]


def _to_device(tree: TokenTree, device: torch.device) -> TokenTree:
    return TokenTree(
        token_ids=tree.token_ids.to(device),
        positions=tree.positions.to(device),
        prefix_length=tree.prefix_length,
        queries=tree.queries.to(device),
        completions=tree.completions.to(device) if tree.completions is not None else None,
        group_of_row=tree.group_of_row.to(device),
        predictors=tree.predictors.to(device),
        targets=tree.targets.to(device),
        target_mask=tree.target_mask.to(device),
        spans=tree.spans.to(device),
    )


class TreeContext:
    """Attention in a `TokenTree`: queries see [prefix, own], completions [prefix, query, own]."""

    def __init__(
        self,
        tree: TokenTree,
        prefix: PrefixKV,
        keep_queries: bool = False,
        fused: bool | None = None,
        products: ProductRows | None = None,
    ) -> None:
        """Prepare for one forward.

        Args:
            tree: the packed tokens.
            prefix: keys and values of the P shared positions; gradients flow back into them.
            keep_queries: whether each layer's padded query keys and values are kept in
                `query_keys/query_values` ([G, H_kv, Q, D], right padded), for decoding to go on
                from.
            fused: whether attention goes through the Triton kernels; None = as the device suggests.
            products: what a rollout has multiplied of these tokens; None = all is computed.

        Raises:
            ValueError: the prefix or the products belong to another tree.
        """
        if prefix.num_tokens != tree.prefix_length:
            raise ValueError(
                f"tree is built for {tree.prefix_length} prefix tokens, prefix has "
                f"{prefix.num_tokens}"
            )
        if products is not None and products.num_tokens != tree.num_tokens:
            raise ValueError(
                f"tree has {tree.num_tokens} tokens, products are of {products.num_tokens}"
            )
        self.products = products
        self._tree = tree
        self._prefix = prefix
        self._keep_queries = keep_queries
        self._fused = fused
        self._rows: AttentionRows | None = None
        self._biases: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        self.query_keys: list[Tensor] = []
        self.query_values: list[Tensor] = []
        self.cpp_layers: set[int] = set()
        """Layers whose attention runs in the C++ kernels."""

    @property
    def mask(self) -> Tensor:
        """The tokens of each query, bool [G, Q]."""
        return self._tree.queries.mask

    def attend(self, call: LayerCall) -> Tensor:
        """Both levels of the tree, packed again: [1, H, N, D]."""
        if call.cpp:
            return self._attend_cpp(call)
        tree = self._tree
        if self._fused or (self._fused is None and call.is_fused("tree")):
            return self._attend_fused(call)
        query_bias, completion_bias = self._bias(call.window, call.query.dtype)
        queries, keys, values = (self._split(t) for t in (call.query, call.key, call.value))
        key, value = tree.queries.unfold(keys[0]), tree.queries.unfold(values[0])
        if self._keep_queries:
            self.query_keys.append(key)
            self.query_values.append(value)
        shared_key = _after(self._prefix.keys[call.layer], key)
        shared_value = _after(self._prefix.values[call.layer], value)
        attended = call.attend(
            tree.queries.unfold(queries[0]), shared_key, shared_value, query_bias
        )
        packed = [tree.queries.fold(attended)]
        if tree.completions is not None:
            rows, group = tree.completions, tree.group_of_row
            row_key = torch.cat([repeat_rows(shared_key, group), rows.unfold(keys[1])], dim=2)
            row_value = torch.cat([repeat_rows(shared_value, group), rows.unfold(values[1])], dim=2)
            attended = call.attend(rows.unfold(queries[1]), row_key, row_value, completion_bias)
            packed.append(rows.fold(attended))
        return torch.cat(packed, dim=0).transpose(0, 1)[None]

    def _attend_fused(self, call: LayerCall) -> Tensor:
        """Both levels in one launch: a kernel reads rows as ranges of packed tokens."""
        if self._rows is None:
            self._rows = tree_rows(self._tree)
        if self._keep_queries:
            self.query_keys.append(self._tree.queries.unfold(self._split(call.key)[0]))
            self.query_values.append(self._tree.queries.unfold(self._split(call.value)[0]))
        packed = Packed(*(t[0].transpose(0, 1) for t in (call.query, call.key, call.value)))
        prefix = KeyValue(self._prefix.keys[call.layer], self._prefix.values[call.layer])
        out = fused_attention(packed, prefix, self._rows, call.scoring)
        return out.transpose(0, 1)[None]

    def _attend_cpp(self, call: LayerCall) -> Tensor:
        """The same by one kernel, which reads keys and values where they stand."""
        # Not t[0]: its backward fills a tensor with zeros and copies the gradient into it.
        tensors = [dense(t.squeeze(0).transpose(0, 1)) for t in (call.query, call.key, call.value)]
        if self._keep_queries:
            rows = self._tree.queries
            self.cpp_layers.add(call.layer)
            self.query_keys.append(rows.unfold(tensors[1][: rows.num_tokens]))
            self.query_values.append(rows.unfold(tensors[2][: rows.num_tokens]))
        prefix = KeyValue(self._prefix.keys[call.layer], self._prefix.values[call.layer])
        out = tree_attention(Packed(*tensors), prefix, self._tree.spans, call.scaling)
        return out.transpose(0, 1)[None]

    def _split(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """[1, H, N, D] -> query tokens and completion tokens, each [n, H, D]."""
        tokens = packed[0].transpose(0, 1)
        first = self._tree.queries.num_tokens
        of_queries, of_completions = tokens.split([first, tokens.shape[0] - first])
        return of_queries, of_completions

    def _bias(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Masks of both levels as additive biases, made once for all layers."""
        if window not in self._biases:
            queries, completions = _tree_masks(self._tree, window)
            bias = None if completions is None else mask_bias(completions, dtype)
            self._biases[window] = (mask_bias(queries, dtype), bias)
        return self._biases[window]


def tree_rows(tree: TokenTree) -> AttentionRows:
    """The tree as the Triton kernels read it: queries, and completions whose parents they are."""
    rows = tree.completions
    width = tree.queries.mask.shape[1] if rows is None else rows.mask.shape[1]
    return attention_rows(
        tree.queries.mask.sum(1),
        None if rows is None else rows.mask.sum(1),
        tree.group_of_row,
        tree.positions,
        max(width, tree.queries.mask.shape[1]),
    )


def dense(packed: Tensor) -> Tensor:
    """The tensor, copied where its last dimension is strided."""
    return packed if packed.stride(-1) == 1 else packed.contiguous()


def _after(prefix: Tensor, own: Tensor) -> Tensor:
    """[H_kv, P, D] before [G, H_kv, Q, D] -> [G, H_kv, P + Q, D]."""
    shared = prefix.to(own.dtype)[None].expand(own.shape[0], -1, -1, -1)
    return torch.cat([shared, own], dim=2)


def _tree_masks(tree: TokenTree, window: int | None) -> tuple[Tensor, Tensor | None]:
    queries = tree.queries
    groups = queries.mask.shape[0]
    prefix_pos = torch.arange(tree.prefix_length, device=queries.mask.device)
    prefix_pos = prefix_pos[None].expand(groups, -1)
    key_pos = torch.cat([prefix_pos, queries.positions], dim=1)  # [G, P + Q]
    seen = torch.cat([torch.ones_like(prefix_pos, dtype=torch.bool), queries.mask], dim=1)
    query_mask = seen[:, None] & (key_pos[:, None, :] <= queries.positions[:, :, None])
    query_mask = windowed(query_mask, queries.positions, key_pos, window)
    if tree.completions is None:
        return query_mask, None
    rows = tree.completions
    row_pos = torch.cat([key_pos[tree.group_of_row], rows.positions], dim=1)
    width = rows.mask.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=rows.mask.device).tril()
    shared = seen[tree.group_of_row][:, None].expand(-1, width, -1)
    own = causal[None] & rows.mask[:, None]
    completion_mask = torch.cat([shared, own], dim=2)
    return query_mask, windowed(completion_mask, rows.positions, row_pos, window)
