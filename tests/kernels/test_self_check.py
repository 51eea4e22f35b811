"""The kernels' check at first use: it passes what is right, and finds what is wrong or breaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlprompt.kernels.operands import Heads, Scoring
from rlprompt.kernels.self_check import Kind, attention_fault, head_fault
from tests.fixtures.attention import DEVICE

pytest.importorskip("triton")

HEADS = Heads(4, 2, 16)
SCORINGS = (Scoring(0.25), Scoring(0.25, 1.5, 4))


@pytest.mark.parametrize("scoring", SCORINGS, ids=["plain", "capped window"])
@pytest.mark.parametrize("kind", ["tree", "decode"])
def test_kernels_that_are_right_pass(kind: Kind, scoring: Scoring) -> None:
    assert attention_fault(kind, DEVICE, torch.float32, HEADS, scoring) is None


def test_in_half_precision_and_inference_mode() -> None:
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        assert attention_fault("tree", DEVICE, torch.float16, Heads(2, 2, 16), SCORINGS[0]) is None
        assert attention_fault("decode", DEVICE, torch.bfloat16, HEADS, SCORINGS[0]) is None
        for softcap in (None, 3.0):
            assert head_fault(DEVICE, torch.float16, 53, softcap) is None
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["tree", "decode"])
def test_a_wrong_scale_is_found(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprompt.kernels.triton import attention_launch as launch

    constants = launch.constants

    def wrong(*given: Any) -> Any:
        tile, made = constants(*given)
        return tile, {**made, "SCALE": made["SCALE"] * 1.1}

    monkeypatch.setattr(launch, "constants", wrong)
    fault = attention_fault(kind, DEVICE, torch.float32, HEADS, SCORINGS[0])
    assert fault is not None and "differ from attention written out (outputs by 0." in fault


def test_a_gradient_that_is_wrong_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprompt.kernels.triton import attention_launch as launch

    right = launch.backward_prefix

    def wrong(*given: Any) -> Any:
        key, value = right(*given)
        return key, torch.full_like(value, torch.nan)

    monkeypatch.setattr(launch, "backward_prefix", wrong)
    fault = attention_fault("tree", DEVICE, torch.float32, HEADS, SCORINGS[0])
    assert fault == (
        "their results differ from attention written out (gradients of the prefix's values by nan, "
        "relative RMS)"
    )


def test_what_a_compiler_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlprompt.kernels.triton import attention_launch as launch
    from rlprompt.kernels.triton import head_rows

    def broken(*_: Any) -> Any:
        raise OSError("PTX was compiled with\nan unsupported toolchain")

    monkeypatch.setattr(launch, "decode", broken)
    monkeypatch.setattr(head_rows, "head_rows", broken)
    said = "their first use here failed (OSError: PTX was compiled with an unsupported toolchain)"
    assert attention_fault("decode", DEVICE, torch.float32, HEADS, SCORINGS[0]) == said
    assert head_fault(DEVICE, torch.float32, 53, None) == said
