"""Packed linear layers: the results and names of nn.Linear, gradients of the input only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlprompt.model.cpu import packed_linear as frozen
from rlprompt.model.cpu.packed_linear import PackedLinear, can_pack, head_of, pack_linears
from tests.fixtures.tiny import tiny_model


def _linear(bias: bool = True, inputs: int = 48, outputs: int = 80) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=bias).bfloat16()
    return linear.requires_grad_(False)


needs_packing = pytest.mark.skipif(
    not can_pack(_linear()), reason="this build of torch does not pack bf16 weights on this CPU"
)


@needs_packing
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 48), (3, 48), (1, 7, 48), (1, 200, 48), (2, 3, 5, 48)])
def test_forward_and_input_gradient_are_those_of_linear(bias: bool, shape: tuple[int, ...]) -> None:
    linear = _linear(bias)
    packed = PackedLinear(linear)
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(*shape[:-1], 80, dtype=torch.bfloat16)
    ours, theirs = packed(x), linear(x)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(ours, x, upstream)
    (expected,) = torch.autograd.grad(theirs, x, upstream)
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2)


@needs_packing
def test_strided_inputs_and_gradients_give_the_same() -> None:
    packed = PackedLinear(_linear())
    x = torch.randn(48, 9, dtype=torch.bfloat16).t().requires_grad_()
    dense = x.detach().contiguous().requires_grad_()
    upstream = torch.randn(80, 9, dtype=torch.bfloat16).t()
    ours, theirs = packed(x), packed(dense)
    assert torch.equal(ours, theirs)
    (grad,) = torch.autograd.grad(ours, x, upstream)
    (expected,) = torch.autograd.grad(theirs, dense, upstream.contiguous())
    assert torch.equal(grad, expected)


@needs_packing
def test_without_a_gradient_the_result_is_the_same() -> None:
    packed = PackedLinear(_linear())
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = packed(x)
    assert not plain.requires_grad
    assert torch.equal(packed(x.clone().requires_grad_()), plain)


@needs_packing
def test_parameters_keep_their_names_and_memory() -> None:
    model = tiny_model("qwen2", torch.bfloat16).requires_grad_(False)
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert pack_linears(model) == 2 * 7 + 1
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == before
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert pack_linears(model) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_other_precisions_are_left_alone(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype)
    assert pack_linears(model) == 0
    assert any(type(m) is nn.Linear for m in model.modules())


def test_a_build_without_the_operators_runs_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: torch.Tensor) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(frozen, "pack_weight", missing)
    assert not can_pack(_linear())


def test_packing_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(_linear()):
        pytest.skip("nothing is packed here")
    exact = frozen.pack_weight
    monkeypatch.setattr(frozen, "pack_weight", lambda weight: exact(weight + 1))
    assert not can_pack(_linear())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_head_maps_in_both_directions(dtype: torch.dtype, scale: float) -> None:
    output = nn.Linear(48, 80, bias=False).to(dtype).requires_grad_(False)
    wrapped = PackedLinear(output) if can_pack(output) else output
    head = head_of(wrapped, softcap=3.0, scale=scale)
    assert (head.vocab_size, head.softcap, head.dtype) == (80, 3.0, dtype)
    hidden, grad = torch.randn(5, 48, dtype=dtype), torch.randn(5, 80, dtype=dtype)
    expected = scale * hidden.float() @ output.weight.float().t()
    torch.testing.assert_close(head.project(hidden).float(), expected, rtol=2e-2, atol=2e-2)
    expected = scale * grad.float() @ output.weight.float()
    torch.testing.assert_close(head.pull_back(grad).float(), expected, rtol=2e-2, atol=2e-2)
