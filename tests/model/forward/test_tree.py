"""The layout of packed tokens: order, positions, predictors, masks."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from rlprompt.model.forward.tree import PaddedRows, TokenTree, TreeContext, build_tree
from rlprompt.types import PrefixKV

CPU = torch.device("cpu")
QUERIES = [[10, 11, 12], [20]]
COMPLETIONS = [[[1, 2, 3], [4]], [[5, 6]]]


def _tree(prefix: int = 7) -> TokenTree:
    return build_tree(QUERIES, COMPLETIONS, prefix, CPU)


def test_tokens_stand_queries_first_without_last_completion_tokens() -> None:
    tree = _tree()
    assert tree.token_ids.tolist() == [10, 11, 12, 20, 1, 2, 5]
    assert tree.positions.tolist() == [7, 8, 9, 7, 10, 11, 8]
    assert tree.num_tokens == 7
    assert tree.group_of_row.tolist() == [0, 0, 1]


def test_every_completion_token_has_its_predictor() -> None:
    tree = _tree()
    assert tree.targets.tolist() == [1, 2, 3, 4, 5, 6]
    # The query's last token for the first one, then the token before.
    assert tree.predictors.tolist() == [2, 4, 5, 2, 3, 6]
    after = tree.positions[tree.predictors] + 1
    assert after.tolist() == [10, 11, 12, 10, 8, 9]


def test_flat_results_return_to_their_rows() -> None:
    tree = _tree()
    padded = tree.unflatten(torch.arange(1.0, 7.0))
    assert padded.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert torch.equal(padded != 0, tree.target_mask)


def test_rows_are_right_padded() -> None:
    tree = _tree()
    assert tree.queries.mask.tolist() == [[True, True, True], [True, False, False]]
    assert tree.completions is not None
    assert tree.completions.mask.tolist() == [[True, True], [False, False], [True, False]]
    packed = torch.arange(3.0)[:, None, None]
    unfolded = tree.completions.unfold(packed)
    assert unfolded.shape == (3, 1, 2, 1)
    assert torch.equal(tree.completions.fold(unfolded), packed)


def test_one_token_completions_need_no_completion_rows() -> None:
    tree = build_tree([[1, 2]], [[[3], [4]]], 0, CPU)
    assert tree.completions is None
    assert tree.token_ids.tolist() == [1, 2]
    assert tree.predictors.tolist() == [1, 1]


def test_a_prefill_has_queries_only() -> None:
    tree = build_tree(QUERIES, [[], []], 7, CPU)
    assert tree.completions is None
    assert tree.token_ids.tolist() == [10, 11, 12, 20]
    assert tree.targets.tolist() == []
    assert tree.unflatten(torch.zeros(0)).shape == (0, 0)


@pytest.mark.parametrize(
    ("queries", "completions"), [([[]], [[[1]]]), ([[1]], [[[]]]), ([[1], []], [[], []])]
)
def test_empty_parts_are_refused(
    queries: list[list[int]], completions: list[list[list[int]]]
) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build_tree(queries, completions, 3, CPU)


def test_a_tree_of_another_prompt_is_refused() -> None:
    prefix = PrefixKV([torch.zeros(2, 6, 4)], [torch.zeros(2, 6, 4)])
    with pytest.raises(ValueError, match="7 prefix tokens"):
        TreeContext(_tree(), prefix)


def test_every_tensor_moves_to_the_device() -> None:
    """`meta` stands for an accelerator."""
    tree = build_tree(QUERIES, COMPLETIONS, 7, torch.device("meta"))
    here = _tree()
    for field in fields(TokenTree):
        moved, stayed = getattr(tree, field.name), getattr(here, field.name)
        if isinstance(moved, torch.Tensor):
            assert moved.device.type == "meta"
            assert (moved.shape, moved.dtype) == (stayed.shape, stayed.dtype)
        elif isinstance(moved, PaddedRows):
            parts = [getattr(moved, part.name) for part in fields(PaddedRows)]
            assert {part.device.type for part in parts} == {"meta"}
        else:
            assert moved == stayed
