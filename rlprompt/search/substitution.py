"""The mathematics of a search among tokens: what completions say of a prompt, to first order.

A prompt is judged between rollouts by what it would make of completions that were drawn and scored
before. Completion i has the length-normalised log-probability l_i under a prompt (mean over its
tokens), l_i' under the prompt that the search stands at, and a weight w_i, its advantage. The value
of a prompt is the mean over i of

    w_i (l_i - l_i')                           where w_i > 0
    w_i max(exp(l_i - l_i') - 1, -c)           where w_i < 0:

what was good is imitated, whoever drew it, and what was bad is made less likely, but nothing is
gained by pushing it below a share 1 - c (tapered off-policy REINFORCE: Le Roux et al., 2025, arXiv
2503.14286; the bound is PPO's, the sequence ratio that of GSPO, arXiv 2507.18071). At the prompt
itself its gradient is the policy gradient, mean_i w_i grad l_i. Given answers have weights of 1.

The token of place j is a one-hot row times the table of embeddings. The derivative of S by that row
is g_j . E^T, where g_j is the gradient of the embedding; what a substitution is worth to first
order is the difference of two of its entries (HotFlip: Ebrahimi et al., 2018, arXiv 1712.06751;
AutoPrompt: Shin et al., 2020, arXiv 2010.15980; GCG: Zou et al., 2023, arXiv 2307.15043, there with
given answers in the place of weights).

Letters: C candidates, Q queries, n completions per query, B completions, N prompts, m slot tokens,
V vocabulary, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pooled_advantages(rewards: Tensor) -> Tensor:
    """How much better a completion is than the query's others, under whatever candidate.

    All candidates of a step answer the same queries, so a query's completions under all of them are
    one group. Differences from its mean are divided by their root mean square over the step.

    Args:
        rewards: [C, Q, n] totals; NaN where unknown.

    Returns:
        [C, Q, n] float64; 0 where unknown, and everywhere if no query's rewards differ.
    """
    wide = rewards.double()
    known = ~wide.isnan()
    gaps = wide - wide.nanmean(dim=(0, 2), keepdim=True)
    gaps = torch.where(known, gaps, 0.0)
    scale = (gaps.square().sum() / known.sum().clamp_min(1)).sqrt()
    # Rounding leaves differences of equal rewards at about 1e-17.
    return gaps / scale if float(scale) > 1e-9 else torch.zeros_like(gaps)


def tapered(weights: Tensor, logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """Weights of completions that another prompt may have drawn.

    A bad one that the present prompt would hardly write says little of it, and its gradient is
    steep: it counts by the ratio of sequence probabilities, length-normalised and cut at 1.

    Args:
        weights: [B] advantages.
        logprobs: [B] mean log-probability per token under the present prompt, in nats.
        sampling_logprobs: [B] the same under the prompt that drew it; NaN = unknown, a ratio of 1.

    Returns:
        [B].
    """
    ratio = (logprobs - sampling_logprobs).exp().clamp_max(1.0).nan_to_num(1.0)
    return torch.where(weights < 0.0, ratio * weights, weights)


def surrogate(logprobs: Tensor, reference: Tensor, weights: Tensor, clip: float) -> Tensor:
    """The value of N prompts; see the module.

    Args:
        logprobs: [N, B] mean log-probability per token of each completion under each prompt.
        reference: [B] the same under the prompt that the search stands at.
        weights: [B] advantages; 1 for given answers.
        clip: the share c by which a bad completion may become less likely.

    Returns:
        [N]; 0 at the prompt itself.
    """
    gap = logprobs - reference
    bad = gap.exp().sub(1.0).clamp_min(-clip)
    return (weights * torch.where(weights > 0.0, gap, bad)).mean(dim=-1)


def surrogate_slope(logprobs: Tensor, reference: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Derivative of B times the value by the log-probability of each completion.

    Arguments as of `surrogate`, with `logprobs` [B].

    Returns:
        [B]; 0 for a bad completion that is unlikely enough.
    """
    ratio = (logprobs - reference).exp()
    bad = torch.where(ratio > 1.0 - clip, ratio, 0.0)
    return weights * torch.where(weights > 0.0, 1.0, bad)


def one_hot_gradient(embedding_gradient: Tensor, embeddings: Tensor) -> Tensor:
    """Derivative by the rows that choose tokens.

    Args:
        embedding_gradient: [m, d] derivative by the embedding at each place.
        embeddings: [V, d] embedding of each token, as the base's first layer gets it.

    Returns:
        [m, V] float32, or float64 of such operands.
    """
    wide = torch.promote_types(embedding_gradient.dtype, torch.float32)
    return embedding_gradient.to(wide) @ embeddings.to(wide).T


def best_tokens(scores: Tensor, allowed: Tensor, present: Tensor, count: int) -> Tensor:
    """The tokens of highest score at each place.

    Args:
        scores: [m, V].
        allowed: bool [V], the tokens to choose from.
        present: int64 [m] token that stands at each place, which is not among them.
        count: how many are wanted.

    Returns:
        int64 [m, k], best first; k is less than `count` where there are not as many.
    """
    masked = scores.masked_fill(~allowed, -torch.inf)
    masked = masked.scatter(1, present[:, None], -torch.inf)
    k = min(count, int(masked.isfinite().sum(dim=1).min()))
    return masked.topk(k, dim=1).indices
