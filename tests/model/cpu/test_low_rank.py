"""LoRA beside packed products: parts side by side, and the gradients of its plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rlprompt.kernels.cpu import ops
from rlprompt.model.cpu.low_rank import low_rank_product, side_by_side
from rlprompt.model.cpu.packed_linear import PackedLinear, PackedWeight
from rlprompt.model.files.fetch import cache_dir
from rlprompt.model.forward.adapter_hooks import attach_low_rank
from rlprompt.types import LowRank

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
needs_kernels = pytest.mark.skipif(not USABLE, reason="the CPU kernels cannot be used here")
SCALE = 0.5


def _linear(inputs: int, outputs: int) -> PackedLinear:
    linear = PackedLinear(nn.Linear(inputs, outputs, bias=False).bfloat16().requires_grad_(False))
    linear.packed.allow_kernel()
    return linear


def _part(inputs: int, outputs: int, rank: int = 3) -> LowRank:
    down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
    return LowRank(down, nn.Parameter(torch.randn(outputs, rank)), SCALE)


def _plain(x: Tensor, layers: list[PackedLinear], parts: list[LowRank | None]) -> Tensor:
    """The same in float32, as autograd sees it."""
    outs = []
    for layer, part in zip(layers, parts, strict=True):
        out = functional.linear(x, layer.weight.float())
        if part is not None:
            out = out + functional.linear(functional.linear(x, part.down) * SCALE, part.up)
        outs.append(out)
    return torch.cat(outs, dim=-1)


@pytest.mark.parametrize(("rank", "even"), [(3, 4), (8, 8)])
def test_parts_stand_side_by_side(rank: int, even: int) -> None:
    parts = [_part(16, 32, rank), None, _part(16, 16, rank)]
    joined = side_by_side([32, 48, 16], parts)
    assert joined.down.shape == (16, 16) and joined.up.shape == (96, even)
    assert joined.starts.tolist() == [0, 0, -1, -1, -1, even // 2] and joined.scale == SCALE
    first, last = (part for part in parts if part is not None)
    for part, row, column in ((first, 0, slice(0, 32)), (last, even, slice(80, 96))):
        assert torch.equal(joined.down[row : row + rank], part.down.bfloat16())
        assert torch.equal(joined.up[column, :rank], part.up.bfloat16())
    used = [*range(rank), *range(even, even + rank)]
    unused = [row for row in range(16) if row not in used]
    assert not joined.down[unused].any()
    assert not joined.up[32:80].any() and not joined.up[:, rank:].any()


@needs_kernels
@pytest.mark.parametrize("rows", [(1, 7), (300,)])
@pytest.mark.parametrize("wants_input", [True, False])
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_gradients_are_those_of_the_plain_form(
    rows: tuple[int, ...], wants_input: bool, rank: int
) -> None:
    layers = [_linear(64, 32), _linear(64, 16), _linear(64, 48)]
    parts: list[LowRank | None] = [_part(64, 32, rank), None, _part(64, 48, rank)]
    x = torch.randn(*rows, 64).bfloat16().requires_grad_(wants_input)
    wide = x.detach().float().requires_grad_(wants_input)
    upstream = torch.randn(*rows, 96)
    leaves = [t for part in parts if part is not None for t in (part.down, part.up)]
    ours = low_rank_product(x, PackedWeight(layers), [32, 16, 48], parts)
    theirs = _plain(wide, layers, parts)
    _assert_near(ours, theirs)
    inputs = ([x], [wide]) if wants_input else ([], [])
    found = torch.autograd.grad(ours, [*inputs[0], *leaves], upstream.bfloat16())
    expected = torch.autograd.grad(theirs, [*inputs[1], *leaves], upstream)
    for gradient, exact in zip(found, expected, strict=True):
        _assert_near(gradient, exact)


@needs_kernels
def test_it_is_beside_the_product_where_a_kernel_can_and_a_hook_elsewhere() -> None:
    odd = PackedLinear(nn.Linear(16, 24, bias=False).bfloat16().requires_grad_(False))
    odd.packed.allow_kernel()
    fits = _linear(16, 32)
    model = nn.ModuleDict({"fits": fits, "odd": odd, "plain": nn.Linear(16, 32)})
    widths = {"fits": 32, "odd": 24, "plain": 32}
    x = torch.randn(4, 16)
    asked = {"fits": x.bfloat16(), "odd": x.bfloat16(), "plain": x}
    before = {name: model[name](asked[name]) for name in widths}
    parts = {name: _part(16, width) for name, width in widths.items()}
    detach = attach_low_rank(model, parts)
    hooked = {name for name in widths if model[name]._forward_hooks}
    assert hooked == {"odd", "plain"} and fits.addition is parts["fits"]
    for name, part in parts.items():
        given = asked[name]
        more = functional.linear(functional.linear(given.float(), part.down) * SCALE, part.up)
        _assert_near(model[name](given), before[name].float() + more)
    detach()
    for name in widths:
        assert torch.equal(model[name](asked[name]), before[name])


@needs_kernels
def test_a_second_adapter_on_top_is_added_too() -> None:
    layer = _linear(16, 32)
    model = nn.ModuleDict({"layer": layer})
    first, second = _part(16, 32), _part(16, 32)
    x = torch.randn(4, 16).bfloat16()
    attach_low_rank(model, {"layer": first})
    detach = attach_low_rank(model, {"layer": second})
    both = _plain(x.float(), [layer], [first]) + _plain(x.float(), [layer], [second])
    _assert_near(layer(x), both - functional.linear(x.float(), layer.weight.float()))
    detach()
    _assert_near(layer(x), _plain(x.float(), [layer], [first]))


def _assert_near(ours: Tensor, exact: Tensor) -> None:
    gap = (ours.float() - exact.float()).square().mean().sqrt()
    assert gap <= 0.01 * exact.float().square().mean().sqrt()
