"""The kernels as PyTorch operators: schema, fake outputs, autograd registration, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fixtures.attention import DEVICE, Case, fused

pytest.importorskip("triton")

SMALL = Case((4,), (3,), (0,), prefix=5, kv_heads=1, share=2, softcap=2.0, window=5)


def _arguments(case: Case, tensors: list[Tensor]) -> tuple[Any, ...]:
    rows = case.rows()
    scaling, softcap, window = case.scoring
    scalars = (rows.max_length, scaling, softcap or 0.0, window or 0)
    return (*tensors, rows.table, rows.positions, *scalars)


def test_the_forward_is_a_sound_operator() -> None:
    from rlprompt.kernels.triton import attention as _  # noqa: F401 - registers

    arguments = _arguments(SMALL, SMALL.tensors(torch.float32))
    torch.library.opcheck(torch.ops.rlprompt.prefix_attention.default, arguments)


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_the_backward_is_a_sound_operator(wants: tuple[bool, bool]) -> None:
    from rlprompt.kernels.triton import attention as _  # noqa: F401 - registers

    tensors = [t.detach() for t in SMALL.tensors(torch.float32)]
    tensors[3:] = [t.double() for t in tensors[3:]]
    first, *rest = _arguments(SMALL, tensors)
    out, lse = torch.ops.rlprompt.prefix_attention(first, *rest)
    upstream = SMALL.upstream(torch.float32)
    arguments = (upstream, first, *rest[:6], out, lse, *rest[6:], *wants)
    torch.library.opcheck(torch.ops.rlprompt.prefix_attention_backward.default, arguments)


def test_decoding_is_a_sound_operator() -> None:
    from rlprompt.kernels.triton import attention as _  # noqa: F401 - registers

    query = torch.randn(3, 4, 16, device=DEVICE)
    key, value = torch.randn(2, 3, 2, 9, 16, device=DEVICE).unbind()
    prefix = torch.randn(2, 2, 5, 16, device=DEVICE).unbind()
    firsts = torch.tensor([0, 2, 8], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([9, 4, 1], dtype=torch.int32, device=DEVICE)
    arguments = (query, key, value, *prefix, firsts, lengths, 0.25, 0.0, 0)
    torch.library.opcheck(torch.ops.rlprompt.prefix_decode.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_takes_it_without_a_graph_break(backend: str) -> None:
    tensors, upstream = SMALL.tensors(torch.float32), SMALL.upstream(torch.float32)

    def step(*inputs: Tensor) -> Tensor:
        return torch.tanh(fused(SMALL, [2 * inputs[0], *inputs[1:]]))

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ours, eager = compiled(*tensors), step(*tensors)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, upstream),
        torch.autograd.grad(eager, tensors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
