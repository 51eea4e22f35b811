"""The product of a few rows: oneDNN's bits, for every number of rows, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.kernels.cpu import ops
from rlprompt.kernels.cpu.product import MOST_ROWS, packed_product, product_chunk
from rlprompt.model.cpu.packed_linear import PackedLinear, pack_weight
from rlprompt.model.files.fetch import cache_dir

USABLE = ops.choose("auto", cache_dir() / "kernels", torch.bfloat16, torch.device("cpu"))
pytestmark = pytest.mark.skipif(
    not USABLE or not torch.ops.rlprompt_cpu.has_packed_product(),
    reason="the CPU kernels cannot be used here, or the processor has no bfloat16 products",
)


def theirs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (192, 576), (128, 1536), (64, 4864)])
def test_the_bits_are_those_of_onednn(outputs: int, inputs: int, biased: bool) -> None:
    packed = pack_weight(torch.randn(outputs, inputs).bfloat16())
    bias = torch.randn(outputs).bfloat16() if biased else None
    chunk = product_chunk(packed, bias)
    if chunk == 0:
        pytest.skip("this oneDNN packs or sums in another way")
    for rows in (1, 2, 3, 7, 8, 11, 23, 32, 65):
        x = torch.randn(rows, inputs).bfloat16() * 10
        assert torch.equal(packed_product(x, packed, bias, chunk), theirs(x, packed, bias)), rows


def test_a_wrong_chunk_is_noticed() -> None:
    packed = pack_weight(torch.randn(576, 1536).bfloat16())
    right = product_chunk(packed, None)
    if right == 0:
        pytest.skip("this oneDNN packs or sums in another way")
    x = torch.randn(1000, 1536).bfloat16()
    wrong = 32
    assert not torch.equal(packed_product(x, packed, None, wrong), theirs(x, packed, None))


@pytest.mark.parametrize("shape", [(63, 32), (96, 32), (64, 40)])
def test_other_shapes_stay_with_onednn(shape: tuple[int, int]) -> None:
    packed = pack_weight(torch.randn(shape).bfloat16())
    assert product_chunk(packed, None) == 0


def test_wrong_rows_are_refused() -> None:
    packed = pack_weight(torch.randn(64, 32).bfloat16())
    for x in (torch.randn(3, 64).bfloat16(), torch.randn(32, 3).bfloat16().t()):
        with pytest.raises(RuntimeError, match="rows want"):
            packed_product(x, packed, None, 32)


@pytest.mark.parametrize("biased", [False, True])
def test_a_frozen_layer_uses_it_for_few_rows_only(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PackedLinear(torch.nn.Linear(64, 128, bias=biased).bfloat16().requires_grad_(False))
    few, many = torch.randn(2, 3, 64).bfloat16(), torch.randn(MOST_ROWS + 1, 64).bfloat16()
    before = [layer(few), layer(many)]
    layer.packed.allow_kernel()
    calls: list[int] = []

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Tensor:
        calls.append(len(x))
        return packed_product(x, weight, bias, chunk)

    monkeypatch.setattr("rlprompt.model.cpu.packed_linear.packed_product", counted)
    after = [layer(few), layer(many)]
    assert calls == ([6] if layer.packed.chunk else [])
    assert all(map(torch.equal, before, after))
