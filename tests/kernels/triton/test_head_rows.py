"""The head's Triton kernel against the head in PyTorch, through the function that both serve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlprompt.kernels import lm_head
from rlprompt.kernels.lm_head import Head, head_scores
from tests.fixtures.attention import DEVICE

pytest.importorskip("triton")
WIDTH, VOCAB, TOKENS = 6, 37, 7
ON_GPU = DEVICE.type == "cuda"


def _scores(
    fused: bool, softcap: float | None, temperature: float, entropy_grad: bool, scale: float
) -> list[Tensor]:
    torch.manual_seed(0)
    dtype = torch.float32 if ON_GPU else torch.float64
    weight = scale * torch.randn(VOCAB, WIDTH, dtype=dtype, device=DEVICE)
    head = Head(lambda h: h @ weight.t(), lambda g: g @ weight, dtype, VOCAB, softcap)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, device=DEVICE, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    upstream = torch.randn(2, TOKENS, dtype=dtype, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_head, "uses_triton_head", lambda *_: fused)
        patch.setattr(lm_head, "CHUNK_TOKENS", 4)
        patch.setattr(lm_head, "FUSED_CHUNK_TOKENS", 4)
        out = head_scores(hidden, targets, head, temperature, entropy_grad)
    loss = (out.logprobs * upstream[0]).sum()
    if entropy_grad:
        loss = loss + (out.entropy * upstream[1]).sum()
    return [out.logprobs, out.entropy, *torch.autograd.grad(loss, hidden)]


@pytest.mark.parametrize(("softcap", "temperature"), [(None, 1.0), (None, 0.7), (5.0, 0.7)])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("scale", [1.0, 60.0])  # 60: one token has all the probability
def test_scores_and_gradients_are_those_of_the_plain_head(
    softcap: float | None, temperature: float, entropy_grad: bool, scale: float
) -> None:
    plain = _scores(False, softcap, temperature, entropy_grad, scale)
    fused = _scores(True, softcap, temperature, entropy_grad, scale)
    for a, b in zip(plain, fused, strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(
            b, a, rtol=1e-4 if ON_GPU else 1e-11, atol=2e-4 if ON_GPU else 1e-11
        )


def test_without_gradients_the_logits_stay() -> None:
    from rlprompt.kernels.triton.head_rows import head_rows

    logits = torch.randn(3, VOCAB, device=DEVICE)
    before = logits.clone()
    logprobs, _ = head_rows(logits, torch.tensor([0, 36, 5], device=DEVICE), 1.0, None, False, None)
    assert torch.equal(logits, before)
    wanted = before.log_softmax(-1)[torch.arange(3), [0, 36, 5]]
    torch.testing.assert_close(logprobs, wanted)
