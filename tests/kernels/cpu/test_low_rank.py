"""What an adapter of low rank adds: the three operations it stands for, whatever the rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from rlprompt.kernels.cpu import ops
from rlprompt.kernels.cpu.cache_layout import LANES
from rlprompt.kernels.cpu.low_rank import (
    input_pairs,
    low_rank_add_,
    low_rank_backward,
    low_rank_inner,
    serves_widths,
)
from rlprompt.model.files.fetch import cache_dir

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@needs_kernels
def test_pairs_stand_along_the_inputs() -> None:
    weight = randn(32, 10)
    pairs = input_pairs(weight).view(torch.bfloat16).view(5, 32, 2)
    assert torch.equal(pairs.permute(1, 0, 2).reshape(32, 10), weight)


def starts_of(outputs: int, rank: int) -> torch.Tensor:
    """Three layers, of which the second gets nothing; the last one is a third of the outputs."""
    thirds = outputs // LANES // 3
    rest = outputs // LANES - 2 * thirds
    return torch.tensor([0] * rest + [-1] * thirds + [rank // 2] * thirds, dtype=torch.int32)


def blocks(up: torch.Tensor, starts: torch.Tensor, states: int) -> torch.Tensor:
    """[O, R]: what `starts` says of up [O, r], written out."""
    whole = up.new_zeros(len(up), states)
    for row in range(len(up)):
        start = int(starts[row // LANES])
        if start >= 0:
            whole[row, 2 * start : 2 * start + up.shape[1]] = up[row]
    return whole


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 24, 61])
@pytest.mark.parametrize(
    ("inputs", "outputs", "states", "rank"),
    [(48, 16, 16, 16), (50, 80, 32, 8), (576, 960, 16, 4), (64, 96, 48, 22)],
)
def test_it_adds_up_of_down(rows: int, inputs: int, outputs: int, states: int, rank: int) -> None:
    x, out = randn(rows, inputs), randn(rows, outputs)
    down, up, starts = randn(states, inputs), randn(outputs, rank), starts_of(outputs, rank)
    before = out.clone()
    inner = low_rank_inner(x, input_pairs(down), 0.5)
    low_rank_add_(out, inner, input_pairs(up), starts)
    near = {"rtol": 2e-2, "atol": 2e-2 * inputs**0.5}
    expected = functional.linear(x, down) * 0.5
    torch.testing.assert_close(inner, expected, **near)
    # From our own inner states on: one rounding of the product, one of the sum.
    exact = before.double() + inner.double() @ blocks(up.double(), starts, states).t()
    assert (out.double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()
    untouched = starts.repeat_interleave(LANES) < 0
    assert torch.equal(out[:, untouched], before[:, untouched])


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_depend_on_neither_rows_nor_threads(threads: int) -> None:
    x, out, down, up = randn(61, 576), randn(61, 192), randn(16, 576), randn(192, 8)
    down, up, starts = input_pairs(down), input_pairs(up), starts_of(192, 8)
    whole = out.clone()
    inner = low_rank_inner(x, down, 2.0)
    low_rank_add_(whole, inner, up, starts)
    with threads_of(threads):
        for row in (0, 17, 60):
            one = out[row : row + 1].clone()
            alone = low_rank_inner(x[row : row + 1], down, 2.0)
            low_rank_add_(one, alone, up, starts)
            assert torch.equal(alone[0], inner[row]) and torch.equal(one[0], whole[row])
        again = out.clone()
        low_rank_add_(again, low_rank_inner(x, down, 2.0), up, starts)
        assert torch.equal(again, whole)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 61, 300])
@pytest.mark.parametrize(("outputs", "states", "rank"), [(80, 16, 8), (176, 32, 10), (96, 48, 22)])
def test_gradients(rows: int, outputs: int, states: int, rank: int) -> None:
    x, grad, d_x = randn(rows, 64), randn(rows, outputs), randn(rows, 64)
    down, up, starts = randn(states, 64), randn(outputs, rank), starts_of(outputs, rank)
    down[2 * int(starts.max()) + rank :] = 0
    inner = low_rank_inner(x, input_pairs(down), 0.5)
    given = (grad, x, inner, down, up, starts, 0.5)
    whole = blocks(up.double(), starts, states)
    d_inner = grad.double() @ whole * 0.5
    expected = d_x.double() + d_inner @ down.double()
    added = d_x.clone()
    d_down, d_up = low_rank_backward(*given, added)
    used = 2 * int(starts.max()) + rank
    near(added, expected)
    near(d_down[:used], d_inner.t()[:used] @ x.double())
    assert not d_down[used:].any()
    taken = grad.double().t() @ inner.double()
    near(d_up, unblocked(taken, starts, rank))
    with threads_of(3):
        again = d_x.clone()
        down_again, up_again = low_rank_backward(*given, again)
    assert torch.equal(again, added)
    assert torch.equal(down_again, d_down) and torch.equal(up_again, d_up)
    # Without x's gradient the others are the same.
    alone = low_rank_backward(*given, x.new_empty(0))
    assert torch.equal(alone[0], d_down) and torch.equal(alone[1], d_up)


def unblocked(whole: torch.Tensor, starts: torch.Tensor, rank: int) -> torch.Tensor:
    """The inverse of `blocks`."""
    out = whole.new_zeros(len(whole), rank)
    for row in range(len(whole)):
        start = int(starts[row // LANES])
        if start >= 0:
            out[row] = whole[row, 2 * start : 2 * start + rank]
    return out


def near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    gap = (ours.double() - exact).square().mean().sqrt()
    assert gap <= 0.01 * exact.square().mean().sqrt()


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_parts_that_do_not_fit_are_refused() -> None:
    x, out, down, up = randn(3, 48), randn(3, 32), randn(16, 48), randn(32, 16)
    starts = torch.zeros(2, dtype=torch.int32)
    inner = low_rank_inner(x, input_pairs(down), 1.0)
    with pytest.raises(RuntimeError, match="other shapes"):
        low_rank_inner(randn(3, 46), input_pairs(down), 1.0)
    with pytest.raises(RuntimeError, match="dense"):
        low_rank_inner(randn(48, 3).t(), input_pairs(down), 1.0)
    with pytest.raises(RuntimeError, match="another shape"):
        input_pairs(randn(12, 48))
    with pytest.raises(RuntimeError, match="other shapes"):
        low_rank_add_(out, inner, input_pairs(up), starts[:1])
    with pytest.raises(RuntimeError, match="other shapes"):
        low_rank_backward(out, x, inner, down, up, starts[:1], 1.0, x.new_empty(0))
    nothing = torch.full((2,), -1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="no layer"):
        low_rank_backward(out, x, inner, down, up, nothing, 1.0, x.new_empty(0))
    assert serves_widths(48, 32) and not serves_widths(40, 32) and not serves_widths(48, 24)
