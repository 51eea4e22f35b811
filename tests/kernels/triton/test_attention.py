"""The Triton kernels against attention written out in float64, without a GPU in the interpreter.

The interpreter runs programs one after the other and knows neither races nor shared memory: what
these tests prove is arithmetic, indexing and masks. The same tests run on a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.kernels.oracle import rms_ratio
from tests.fixtures.attention import DEVICE, NAMES, Case, exact, fused, fused_and_exact

pytest.importorskip("triton")
ON_GPU = DEVICE.type == "cuda"

SMALL: dict[str, Any] = {"queries": (6,), "completions": (5,), "groups": (0,), "kv_heads": 1}
ODD = {
    "two levels": Case(),
    "no prefix": Case(prefix=0, **SMALL),
    "one prefix token": Case(prefix=1, **SMALL),
    "whole tiles": Case((16,), (16,), (0,), prefix=32, kv_heads=1, share=1),
    "queries only": Case((1, 21), (), (), kv_heads=1),
    "rows of length one": Case((1, 1), (1, 1, 1), (0, 0, 1)),
    "group without completions": Case((4, 2, 3), (5, 6), (0, 2), kv_heads=1),
    "one key head for all": Case((9,), (3, 8), (0, 0), prefix=5, kv_heads=1, share=4),
    "as many key heads": Case((9,), (3, 8), (0, 0), prefix=5, kv_heads=3, share=1),
    "window": Case(window=6, kv_heads=1),
    "window beyond all": Case(window=1000, **SMALL),
    "window of one": Case(window=1, **SMALL),
    "soft cap": Case(softcap=1.5, **SMALL),
    "window and soft cap": Case((6,), (18,), (0,), window=11, softcap=2.0, kv_heads=1),
    "odd head dim": Case(dim=20, **SMALL),
}

# On a GPU the products of float32 are those of three TF32 numbers; in the interpreter, rounding to
# bfloat16 truncates, which is twice the error.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-5 if ON_GPU else 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 8e-3,
}
# No tile of float64 fits a GPU: there the exact comparisons are made in float32.
EXACT = torch.float32 if ON_GPU else torch.float64


def check(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = fused_and_exact(case, dtype)
    errors = {name: rms_ratio(theirs[name], ours[name]) for name in NAMES}
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors
    assert all(t.dtype == dtype for t in ours.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_output_and_gradients_are_those_of_the_oracle(name: str) -> None:
    check(ODD[name], EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_stays_within_its_rounding(dtype: torch.dtype) -> None:
    check(Case((5, 3), (7, 0, 2), (0, 0, 1), dim=20, kv_heads=1), dtype)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="float64 tiles do not fit a GPU")
@pytest.mark.parametrize("fast", [False, True], ids=["element by element", "all features"])
def test_gradcheck_of_the_triton_path_itself(fast: bool) -> None:
    """Against finite differences, which no formula of ours is part of."""
    if fast:
        case = Case((4, 1), (3, 1), (0, 1), 3, 1, 2, dim=2, softcap=2.0, window=4)
    else:
        case = Case((2,), (1,), (0,), 1, 1, 1, dim=1)

    def run(*inputs: Tensor) -> Tensor:
        return fused(case, list(inputs))

    assert torch.autograd.gradcheck(run, case.tensors(), atol=1e-7, fast_mode=fast)


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return made


def test_every_element_of_every_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(queries=(5, 3), completions=(7, 0, 2), groups=(0, 0, 1), prefix=18)
    for owner, name in [(torch.Tensor, "new_empty"), (torch, "empty_like")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    tensors = case.tensors(torch.float32)
    out = fused(case, tensors)
    grads = torch.autograd.grad(out, tensors, case.upstream(torch.float32))
    assert all(bool(t.isfinite().all()) for t in (out, *grads))


def test_a_row_reads_nothing_that_it_may_not_see() -> None:
    """NaN in one group's tokens stays in that group and, through gradients, in the prefix."""
    case = Case(queries=(5, 3), completions=(4, 6), groups=(0, 1))
    tensors = case.tensors(torch.float32)
    with torch.no_grad():
        for t in tensors[:3]:
            t[5:8] = float("nan")  # the second group's query
    out = fused(case, tensors)
    assert bool(out[:5].isfinite().all()) and bool(out[8:12].isfinite().all())
    assert bool(out[5:8].isnan().all()) and bool(out[12:].isnan().all())


def test_results_are_the_same_bits_every_time() -> None:
    case = Case(queries=(5,), completions=(7, 3), groups=(0, 0))
    tensors, upstream = case.tensors(torch.float32), case.upstream(torch.float32)
    runs = []
    for _ in range(10 if ON_GPU else 2):
        out = fused(case, tensors)
        runs.append([out, *torch.autograd.grad(out, tensors, upstream)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_the_prefix_gradient_does_not_depend_on_the_number_of_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from rlprompt.kernels.triton import attention_launch as launch

    case = Case((10,), (25,), (0,), prefix=5, kv_heads=1, share=2)
    tensors, upstream = case.tensors(EXACT), case.upstream(EXACT)
    grads = []
    for programs in (1, 264):
        monkeypatch.setattr(launch, "SPLIT_PROGRAMS", programs)
        grads.append(torch.autograd.grad(fused(case, tensors), tensors[3:], upstream))
    for one, many in zip(*grads, strict=True):
        assert rms_ratio(one, many) < TOLERANCE[EXACT]


def test_copies_of_a_row_multiply_the_gradient_of_the_prefix() -> None:
    once = Case(queries=(6,), completions=(), groups=(), prefix=5)
    thrice = Case(queries=(6, 6, 6), completions=(), groups=(), prefix=5)
    tensors, upstream = once.tensors(EXACT), once.upstream(EXACT)
    copies = [t.detach().repeat(3, 1, 1).requires_grad_() for t in tensors[:3]] + tensors[3:]
    single = torch.autograd.grad(fused(once, tensors), tensors[3:], upstream)
    triple = torch.autograd.grad(fused(thrice, copies), tensors[3:], upstream.repeat(3, 1, 1))
    for a, b in zip(single, triple, strict=True):
        assert rms_ratio(3 * a, b) < TOLERANCE[EXACT]


def test_tensors_may_be_views_and_the_prefix_of_another_dtype() -> None:
    case = Case(queries=(6,), completions=(5,), groups=(0,), prefix=7)
    plain = case.tensors(torch.float32)
    views = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in plain[:3]]
    last = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in plain[3:]]
    prefix = [t.double().requires_grad_() for t in last]
    out = fused(case, [*views, *prefix])
    assert torch.equal(out, fused(case, plain))
    upstream = case.upstream(torch.float32)
    grads = torch.autograd.grad(out, prefix, upstream)
    wanted = torch.autograd.grad(fused(case, plain), plain[3:], upstream)
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float64
        assert torch.equal(grad.float(), want)


def test_only_wanted_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprompt.kernels.triton import attention_launch as launch

    def unwanted(*args: Any) -> None:
        raise AssertionError("the keys' own gradients are not wanted")

    monkeypatch.setattr(launch, "backward_own", unwanted)
    case = Case(prefix=5, **SMALL)
    tensors = [t.detach() for t in case.tensors(EXACT)]
    tensors[3].requires_grad_()
    upstream = case.upstream(EXACT)
    (ours,) = torch.autograd.grad(fused(case, tensors), [tensors[3]], upstream)
    doubles = [t.detach().double() for t in tensors]
    doubles[3].requires_grad_()
    (want,) = torch.autograd.grad(exact(case, doubles), [doubles[3]], upstream.double())
    assert rms_ratio(want, ours) < TOLERANCE[EXACT]


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_shapes_that_do_not_fit_are_refused(wrong: int) -> None:
    case = Case((4,), (), ())
    tensors = case.tensors()
    shape = list(tensors[wrong].shape)
    shape[1 if wrong < 3 else 0] += 1
    tensors[wrong] = torch.zeros(shape, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"heads|shape"):
        fused(case, tensors)
