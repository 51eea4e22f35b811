"""The guard at load: rounding passes, and every mistake that a prefix invites does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase, ModelSettings, freeze, load_base
from rlprompt.model.forward import prefix_forward
from rlprompt.model.forward.comparison import (
    PROBE_TOKENS,
    Expected,
    gap,
    probes,
    roughened,
    tolerance,
)
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.model.forward.tree import TokenTree, build_tree
from tests.fixtures.tiny import FAMILIES, tiny_base, tiny_model, tiny_tokenizer

DTYPES = (torch.float32, torch.bfloat16)


def shifted(*arguments: Any) -> TokenTree:
    """A tree whose tokens behind the prefix stand one position too far."""
    tree = build_tree(*arguments)
    tree.positions.add_(1)
    return tree


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_off_by_one_are_noticed(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrefixForward(tiny_base(family, dtype))
    monkeypatch.setattr(prefix_forward, "build_tree", shifted)
    with pytest.raises(InputError, match="log-probabilities differ") as caught:
        PrefixForward(tiny_base(family, dtype))
    assert "family" not in str(caught.value)
    assert ("float32" in str(caught.value)) == (dtype == torch.bfloat16)


@pytest.mark.model
def test_positions_off_by_one_are_noticed_on_the_real_model(
    smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base() -> FrozenBase:
        return load_base(ModelSettings(path=str(smollm2_dir), dtype="bfloat16", device="cpu"))

    PrefixForward(base())
    monkeypatch.setattr(prefix_forward, "build_tree", shifted)
    with pytest.raises(InputError, match="log-probabilities differ"):
        PrefixForward(base())


def with_window(family: str, dtype: torch.dtype, window: int) -> FrozenBase:
    """A tiny base whose window is longer than the plain probe."""
    model = tiny_model(family, dtype)
    model.config.sliding_window = window
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = window  # type: ignore[assignment]
    return freeze(model, tiny_tokenizer(), f"tiny-{family}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_beyond_the_plain_probe_is_looked_through(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    PrefixForward(with_window(family, dtype, 40))

    def too_wide(mask: Tensor, query_pos: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
        distance = query_pos[:, :, None] - key_pos[:, None, :]
        return mask if window is None else mask & (distance < window + 8)

    import rlprompt.model.forward.attention as attention
    import rlprompt.model.forward.tree as tree

    for module in (attention, tree):
        if hasattr(module, "windowed"):
            monkeypatch.setattr(module, "windowed", too_wide)
    with pytest.raises(InputError, match="log-probabilities differ"):
        PrefixForward(with_window(family, dtype, 40))


def test_probes_are_as_long_as_they_must_be() -> None:
    device = torch.device("cpu")
    lengths: Callable[[int | None], list[int]] = lambda window: [  # noqa: E731
        len(probe.token_ids) for probe in probes(100, window, device)
    ]
    assert lengths(None) == [PROBE_TOKENS]
    assert lengths(512) == [PROBE_TOKENS, PROBE_TOKENS + 512]
    assert lengths(4096) == [PROBE_TOKENS]
    (_, long) = probes(100, 512, device)
    assert torch.equal(long.token_ids, torch.arange(536) * 7 % 100)
    assert len(long.query) == len(long.completion) == PROBE_TOKENS // 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_roughened_numbers_are_their_neighbours(dtype: torch.dtype) -> None:
    x = torch.randn(50, 8).to(dtype)
    rough = roughened(x)
    off = ((rough.double() - x.double()) / x.double()).abs()
    eps = torch.finfo(dtype).eps
    assert rough.dtype == dtype and off.max() <= 1.5 * eps
    assert (off > 0).float().mean() > 0.9
    assert torch.equal(rough, roughened(x))


def test_the_tolerance_is_three_times_what_rounding_does() -> None:
    own = torch.randn(8, 50).bfloat16()
    again = (own.float() + 0.05 * torch.randn(8, 50)).bfloat16()
    rounding = gap(own, again)
    assert tolerance(own, again) == pytest.approx(9 * rounding.divergence)
    assert tolerance(own, own) == 2e-4
    assert tolerance(own, torch.randn(8, 50).bfloat16()) == 0.25
    three = own.float() + 3 * (again.float() - own.float())
    assert gap(own, three).divergence == pytest.approx(9 * rounding.divergence, rel=0.2)
    wrong = gap(own, own * float("nan"), 1.0)
    assert not wrong.is_fine


def large_scores(dtype: torch.dtype) -> FrozenBase:
    """A base whose keys and queries have large biases, as those of Qwen2.5 do."""
    model = tiny_model("qwen2", dtype)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            generator = torch.Generator().manual_seed(number)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                noise = torch.randn(projection.bias.shape, generator=generator)
                projection.bias.add_((20.0 * noise).to(dtype))
    return freeze(model, tiny_tokenizer(), "tiny-qwen2")


def test_a_base_with_large_scores_is_taken_and_its_attention_put_back() -> None:
    forward = PrefixForward(large_scores(torch.bfloat16))
    assert forward.base.model.config._attn_implementation == "rlprompt"


def test_a_forward_may_be_near_to_either_of_the_models_own() -> None:
    generator = torch.Generator().manual_seed(0)
    fused, plain, other = (torch.randn(16, 50, generator=generator) for _ in range(3))
    (probe,) = probes(50, None, torch.device("cpu"))
    both = Expected(probe, fused, 1e-3, plain)
    assert both.gap(fused).is_fine and both.gap(plain).is_fine
    assert not both.gap(other).is_fine and not both.gap((fused + plain) / 2).is_fine
    assert both.gap(other) == gap(fused, other, 1e-3)  # what an error tells of
    assert not Expected(probe, fused, 1e-3).gap(plain).is_fine


def test_positions_off_by_one_are_noticed_under_large_scores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_forward, "build_tree", shifted)
    with pytest.raises(InputError, match="log-probabilities differ"):
        PrefixForward(large_scores(torch.bfloat16))
