"""Drawing tokens: the distribution, its truncations, and the edges of the unit interval."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlprompt.engines.sampling import SamplingSettings, next_tokens, truncate

BELOW_ONE = 1 - 2**-24
"""The largest float32 that `torch.rand` draws."""

TRUNCATIONS = [
    SamplingSettings(top_k=1),
    SamplingSettings(top_k=7),
    SamplingSettings(top_k=10_000),
    SamplingSettings(top_p=0.01),
    SamplingSettings(top_p=0.5),
    SamplingSettings(top_p=0.95),
    SamplingSettings(min_p=0.02),
    SamplingSettings(min_p=0.3),
    SamplingSettings(top_k=50, top_p=0.8, min_p=0.05, temperature=0.7),
    SamplingSettings(top_k=5, top_p=0.9, temperature=2.0),
]


def _logits(rows: int = 4, vocab: int = 300, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return scale * torch.randn(rows, vocab, generator=generator)


def _kept_by_transformers(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities [B, V] after the processors that `generate` would build, in its order."""
    ids: Any = torch.zeros(logits.shape[0], 1, dtype=torch.int64)
    scores: Any = TemperatureLogitsWarper(settings.temperature)(ids, logits.clone())
    if settings.top_k is not None:
        scores = TopKLogitsWarper(settings.top_k)(ids, scores)
    if settings.top_p < 1.0:
        scores = TopPLogitsWarper(settings.top_p)(ids, scores)
    if settings.min_p > 0.0:
        scores = MinPLogitsWarper(settings.min_p)(ids, scores)
    kept: Tensor = scores.softmax(-1)
    return kept


@pytest.mark.parametrize("settings", TRUNCATIONS, ids=lambda s: s.model_dump_json())
@pytest.mark.parametrize("vocab", [300, 512, 5])
def test_truncation_keeps_what_transformers_keeps(settings: SamplingSettings, vocab: int) -> None:
    logits = _logits(vocab=vocab)
    kept = truncate((logits / settings.temperature).softmax(-1), settings)
    kept = kept / kept.sum(1, keepdim=True)
    torch.testing.assert_close(kept, _kept_by_transformers(logits, settings), rtol=0, atol=1e-6)


@pytest.mark.parametrize("vocab", [5, 256, 257, 300, 1000])
@pytest.mark.parametrize(
    "settings",
    [SamplingSettings(), SamplingSettings(temperature=0.6), TRUNCATIONS[-2]],
    ids=["plain", "tempered", "truncated"],
)
def test_draws_follow_the_distribution(vocab: int, settings: SamplingSettings) -> None:
    """Pearson's chi-square over cells of at least 5 expected draws; 6 sigma of its distribution."""
    draws = 20_000
    logits = _logits(rows=1, vocab=vocab)
    expected = draws * _kept_by_transformers(logits, settings)[0].double()
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(3))
    counts = torch.zeros(vocab)
    for part in uniform.split(4000):
        tokens, _ = next_tokens(logits.expand(len(part), -1).clone(), part, settings)
        counts += torch.bincount(tokens, minlength=vocab)
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5 + 6


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
def test_a_draw_inverts_the_cumulative_distribution(vocab: int) -> None:
    logits = _logits(rows=1, vocab=vocab).double()
    steps = logits[0].softmax(-1).cumsum(0)
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    tokens, logprobs = next_tokens(logits.repeat(500, 1), uniform, SamplingSettings())
    assert torch.equal(tokens, torch.searchsorted(steps, uniform, right=True))
    torch.testing.assert_close(logprobs, logits[0].log_softmax(-1)[tokens], rtol=0, atol=1e-12)


def test_logprobs_are_of_the_tempered_distribution_before_truncation_and_bans() -> None:
    settings = SamplingSettings(temperature=0.7, top_k=3, top_p=0.9)
    logits = _logits(rows=64)
    tokens, logprobs = next_tokens(
        logits.clone(), torch.rand(64), settings, torch.tensor([1, 2, 299])
    )
    expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)


def test_temperature_zero_is_argmax_with_untempered_logprobs() -> None:
    settings = SamplingSettings(temperature=0.0, top_p=0.1)
    logits = _logits(rows=50)
    tokens, logprobs = next_tokens(logits.clone(), torch.rand(50), settings)
    assert torch.equal(tokens, logits.argmax(1))
    expected = logits.log_softmax(-1).max(1).values
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    banned = logits.argmax(1).unique()
    tokens, _ = next_tokens(logits.clone(), torch.rand(50), settings, banned)
    assert torch.equal(tokens, logits.index_fill(1, banned, -torch.inf).argmax(1))


def test_temperature_zero_tells_logits_apart_that_exp_does_not() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 7] = 1e-8
    tokens, _ = next_tokens(logits, torch.zeros(1), SamplingSettings(temperature=0.0))
    assert tokens.item() == 7


@pytest.mark.parametrize("settings", [SamplingSettings(), *TRUNCATIONS[:2]])
def test_banned_tokens_are_never_drawn(settings: SamplingSettings) -> None:
    logits = _logits(rows=2000)
    banned = torch.tensor([0, 255, 256, 299])
    logits[:, banned] += 5.0
    tokens, _ = next_tokens(logits, torch.rand(2000), settings, banned)
    assert not torch.isin(tokens, banned).any()


@pytest.mark.parametrize("greedy", [True, False])
def test_banned_tokens_may_have_all_the_mass(greedy: bool) -> None:
    logits = _logits(rows=3)
    logits[:, 1] = 500.0
    settings = SamplingSettings(temperature=0.0 if greedy else 1.0)
    uniform = torch.tensor([0.0, 0.5, BELOW_ONE])
    tokens, logprobs = next_tokens(logits.clone(), uniform, settings, torch.tensor([1]))
    assert not (tokens == 1).any()
    assert (tokens < 300).all()
    expected = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected)
    if not greedy:
        rest = logits.index_fill(1, torch.tensor([1]), -torch.inf).softmax(-1)
        torch.testing.assert_close(rest[:1, : tokens[0]].sum(), torch.tensor(0.0))


@pytest.mark.parametrize("vocab", [5, 256, 300, 1000])
@pytest.mark.parametrize("u", [0.0, 2**-24, 0.5, BELOW_ONE])
def test_no_impossible_token_at_the_edges(vocab: int, u: float) -> None:
    """Holes of probability zero at the start, at the end, and around the borders of blocks."""
    for first, last in ((0, vocab), (vocab // 2, vocab), (0, vocab // 2), (vocab - 1, vocab)):
        logits = torch.full((1, vocab), -torch.inf)
        logits[:, first:last] = _logits(1, vocab)[:, first:last]
        logits[:, first:last:3] = -torch.inf if last - first > 3 else 0.0
        tokens, logprobs = next_tokens(logits.clone(), torch.tensor([u]), SamplingSettings())
        assert torch.isfinite(logits[0, tokens]).all()
        assert torch.isfinite(logprobs).all()


def test_no_impossible_token_at_the_borders_of_blocks() -> None:
    """Uniform numbers exactly at the cumulative weights, where rounding may fall to either side."""
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(1, 2048, generator=generator)
    logits[:, torch.rand(2048, generator=generator) < 0.7] = -torch.inf
    logits[:, ::256] = -torch.inf
    logits[:, 255::256] = -torch.inf
    cumulative = logits[0].double().softmax(-1).cumsum(0)
    at = torch.cat([cumulative, cumulative + 1e-16, cumulative - 1e-16]).clamp(0, BELOW_ONE)
    tokens, _ = next_tokens(logits.repeat(len(at), 1), at, SamplingSettings())
    assert torch.isfinite(logits[0, tokens]).all()


def test_no_impossible_token_where_a_block_begins_by_rounding() -> None:
    """Likely, very unlikely, likely: the sum loses the middle block's last bits at the third."""
    rows = 2000
    logits = torch.full((rows, 768), -torch.inf)
    logits[:, 0] = logits[:, 700] = 0.0
    logits[:, 300] = -torch.linspace(16.0, 36.0, rows)
    ends = 1.0 + logits[:, 300].exp().double()  # of the second block
    at = ends / (ends + 1.0)
    for uniform in (at, at.nextafter(at + 1), at.nextafter(at - 1)):
        tokens, _ = next_tokens(logits.clone(), uniform, SamplingSettings())
        assert torch.isin(tokens, torch.tensor([0, 300, 700])).all()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits, uniform = _logits(rows=6), torch.rand(6)
    settings = TRUNCATIONS[-2]
    together, scores = next_tokens(logits.clone(), uniform, settings)
    for row in range(6):
        token, score = next_tokens(logits[row : row + 1].clone(), uniform[row : row + 1], settings)
        assert token.item() == together[row]
        assert score.item() == pytest.approx(float(scores[row]), abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"max_tokens": 0},
        {"temprature": 1.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingSettings.model_validate(wrong)
