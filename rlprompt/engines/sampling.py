"""Drawing next tokens: temperature, top-k, top-p, min-p, one uniform number per token.

Letters: B rows, V vocabulary. Pure functions of tensors.
"""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from rlprompt.kernels.cpu.ops import draw
from rlprompt.kernels.lm_head import Head, head_logits
from rlprompt.settings import Settings

_BLOCK = 256


class SamplingSettings(Settings):
    """How completions are drawn. Truncations apply in the order top_k, top_p, min_p."""

    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    """Logits are divided by it; 0 = always the most likely token."""
    top_k: int | None = Field(default=None, ge=1)
    """Keep the k most likely tokens; null = all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the fewest most likely tokens whose probabilities reach it (Holtzman et al., 2020)."""
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Drop tokens less likely than this share of the most likely one (Nguyen et al., 2024)."""
    max_tokens: int = Field(default=64, ge=1, le=2**20)
    """Longest completion."""
    min_tokens: int = Field(default=0, ge=0)
    """Stop tokens cannot be drawn before this many tokens."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Tokens that end a completion, beside the template's and the base's own."""


class Drawer:
    """Hidden states to logits to tokens, by the C++ kernels where they can."""

    def __init__(self, head: Head, sampling: SamplingSettings) -> None:
        """Draw from `head` as `sampling` says."""
        self.sampling = sampling
        self._head = head
        self._cpp = head.cpp and sampling.temperature > 0.0 and not _truncates(sampling)

    def logits(self, states: Tensor) -> Tensor:
        """What `draw` takes, [B, V], of final hidden states [B, d]."""
        if self._cpp:
            return self._head.project(states.contiguous())
        return head_logits(states, self._head)

    def draw(self, logits: Tensor, uniform: Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and log-probabilities; see `next_tokens`. Logits may change."""
        if self._cpp:
            return draw(logits, uniform.double(), self.sampling.temperature, banned)
        return next_tokens(logits, uniform, self.sampling, banned)


def next_tokens(
    logits: Tensor, uniform: Tensor, settings: SamplingSettings, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: float32 or float64 [B, V]; changed in place.
        uniform: [B] in [0, 1), float32 or float64: the only randomness, so a row's draw does not
            depend on the rows beside it.
        settings: temperature and truncations.
        banned: int64 ids that cannot be drawn now (stop tokens before `min_tokens`).

    Returns:
        Token ids int64 [B], and their log-probabilities [B] under the tempered distribution
        before truncation and banning: what `Policy.logprobs` gives for the same token.
    """
    greedy = settings.temperature == 0.0
    if not greedy and settings.temperature != 1.0:
        logits.div_(settings.temperature)
    top = logits.amax(dim=1, keepdim=True)
    weights = torch.exp(logits - top)
    sums = _block_sums(weights)
    log_total = sums.sum(1).log()
    allowed = logits
    if banned is not None:
        allowed = logits.index_fill(1, banned, -torch.inf)
        # Relative to the most likely token that is left: the banned ones may have all the mass.
        weights = torch.exp(allowed - allowed.amax(dim=1, keepdim=True))
    if greedy:
        tokens = allowed.argmax(1)
    else:
        if banned is not None or _truncates(settings):
            weights = truncate(weights, settings)
            sums = _block_sums(weights)
        tokens = _invert(weights, sums, uniform)
    return tokens, _gathered(logits, tokens) - top.squeeze(1) - log_total


def _gathered(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None]).squeeze(1)


def _truncates(settings: SamplingSettings) -> bool:
    return settings.top_k is not None or settings.top_p < 1.0 or settings.min_p > 0.0


def truncate(weights: Tensor, settings: SamplingSettings) -> Tensor:
    """Set the weights of truncated tokens to zero.

    Args:
        weights: unnormalised probabilities [B, V], non-negative, at least one positive per row.
        settings: top_k, top_p and min_p, each renormalised before the next.

    Returns:
        A new [B, V]; the most likely token always stays. Ties at the border are kept.
    """
    out = weights
    if settings.top_k is not None and settings.top_k < weights.shape[1]:
        least = out.topk(settings.top_k, dim=1).values[:, -1:]
        out = out * (out >= least)
    if settings.top_p < 1.0:
        ordered = out.sort(dim=1, descending=True).values
        share = ordered.cumsum(1) / ordered.sum(1, keepdim=True)
        before = share - ordered / ordered.sum(1, keepdim=True)
        inside = before < settings.top_p
        last = inside.sum(1, keepdim=True) - 1
        out = out * (out >= ordered.gather(1, last))
    if settings.min_p > 0.0:
        out = out * (out >= settings.min_p * out.max(1, keepdim=True).values)
    return out


def _block_sums(weights: Tensor) -> Tensor:
    """Sums over blocks of 256 tokens, [B, ceil(V / 256)]."""
    rows, vocab = weights.shape
    whole = vocab // _BLOCK * _BLOCK
    sums = weights[:, :whole].reshape(rows, -1, _BLOCK).sum(2)
    if whole == vocab:
        return sums
    return torch.cat([sums, weights[:, whole:].sum(1, keepdim=True)], dim=1)


def _invert(weights: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative weight passes uniform * total, in two levels.

    A full cumulative sum over V is ten times slower than one over blocks and one inside a block.
    float64 keeps the two levels consistent.
    """
    vocab = weights.shape[1]
    cumulative = sums.double().cumsum(1)
    goal = uniform.double()[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, goal, right=True).clamp_max_(sums.shape[1] - 1)
    before = cumulative.gather(1, block) - sums.double().gather(1, block)
    column = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)[None]
    inside = weights.gather(1, column.clamp_max(vocab - 1)) * (column < vocab)
    steps = inside.double().cumsum(1)
    # Rounding may make the rest negative, for which the block's first token would be found even
    # when it is impossible.
    offset = torch.searchsorted(steps, (goal - before).clamp_min_(0.0), right=True)
    # Rounding may point past the block's last possible token: step back to it.
    last = _BLOCK - 1 - (inside > 0).flip(1).int().argmax(1, keepdim=True)
    token = block * _BLOCK + torch.minimum(offset, last)
    return token.squeeze(1)
