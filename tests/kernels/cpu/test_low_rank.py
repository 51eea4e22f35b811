"""What an adapter of low rank adds: the three operations it stands for, whatever the rows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlprompt.kernels.cpu import ops
from rlprompt.kernels.cpu.low_rank import input_pairs, low_rank_add_, serves_widths
from rlprompt.model.fetch import cache_dir

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@needs_kernels
def test_pairs_stand_along_the_inputs() -> None:
    weight = randn(32, 10)
    pairs = input_pairs(weight).view(torch.bfloat16).view(5, 32, 2)
    assert torch.equal(pairs.permute(1, 0, 2).reshape(32, 10), weight)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 24, 61])
@pytest.mark.parametrize(
    ("inputs", "outputs", "rank"), [(48, 16, 16), (50, 80, 32), (576, 960, 16)]
)
def test_it_adds_up_of_down(rows: int, inputs: int, outputs: int, rank: int) -> None:
    x, out = randn(rows, inputs), randn(rows, outputs)
    down, up = randn(rank, inputs), randn(outputs, rank)
    before = out.clone()
    inner = low_rank_add_(out, x, input_pairs(down), input_pairs(up), 0.5)
    near = {"rtol": 2e-2, "atol": 2e-2 * inputs**0.5}
    expected = functional.linear(x, down) * 0.5
    torch.testing.assert_close(inner, expected, **near)
    # From our own inner states on: one rounding of the product, one of the sum.
    exact = before.double() + (inner.double() @ up.double().t())
    assert (out.double() - exact).abs().max() <= 2.0**-7 * exact.abs().max()


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_depend_on_neither_rows_nor_threads(threads: int) -> None:
    x, out, down, up = randn(61, 576), randn(61, 192), randn(16, 576), randn(192, 16)
    pairs = (input_pairs(down), input_pairs(up))
    whole = out.clone()
    inner = low_rank_add_(whole, x, *pairs, 2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for row in (0, 17, 60):
            one = out[row : row + 1].clone()
            assert torch.equal(low_rank_add_(one, x[row : row + 1], *pairs, 2.0)[0], inner[row])
            assert torch.equal(one[0], whole[row])
        again = out.clone()
        low_rank_add_(again, x, *pairs, 2.0)
        assert torch.equal(again, whole)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_parts_that_do_not_fit_are_refused() -> None:
    out, down, up = randn(3, 32), randn(16, 48), randn(32, 16)
    pairs = (input_pairs(down), input_pairs(up))
    with pytest.raises(RuntimeError, match="other shapes"):
        low_rank_add_(out, randn(3, 46), *pairs, 1.0)
    with pytest.raises(RuntimeError, match="dense"):
        low_rank_add_(out, randn(48, 3).t(), *pairs, 1.0)
    with pytest.raises(RuntimeError, match="another shape"):
        input_pairs(randn(12, 48))
    assert serves_widths(48, 32) and not serves_widths(47, 32) and not serves_widths(48, 24)
