"""What the rewards of a generation say of its candidates: scores, places, what is noise.

Rewards are used by their order only, so a strategy takes the same path under any increasing
transform of the candidates' scores.

Letters: C candidates, Q queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def candidate_scores(rewards: Tensor) -> Tensor:
    """The mean reward of each candidate, as fair as missing rewards allow.

    Where a reward is missing, each query's mean over candidates is taken off first: a candidate is
    then not better for having missed the hard queries.

    Args:
        rewards: [C, Q], mean reward of each candidate on each query; NaN = unknown.

    Returns:
        float64 [C], NaN for a candidate without any known reward.
    """
    values = rewards.double()
    if not bool(values.isnan().any()):
        return values.mean(dim=1)
    finite = values.masked_fill(~values.isfinite(), math.nan)
    return (values - finite.nanmean(dim=0).nan_to_num(0.0)).nanmean(dim=1)


def places(scores: Tensor) -> Tensor:
    """The place of each score, 0 the best; equal scores share the mean of their places.

    A score of NaN says nothing, and stands in the middle.

    Args:
        scores: [C], higher is better.

    Returns:
        float64 [C], of sum C * (C - 1) / 2.
    """
    known = ~scores.isnan()
    middle = (int(known.sum()) - 1) / 2
    filled = torch.full(scores.shape, middle, dtype=torch.float64)
    filled[known] = _mean_places(scores[known].double())
    return _mean_places(-filled)


def _mean_places(scores: Tensor) -> Tensor:
    """[n] without NaN -> [n] places, 0 the highest, equal ones by their mean."""
    better = (scores[None, :] > scores[:, None]).sum(dim=1)
    equal = (scores[None, :] == scores[:, None]).sum(dim=1)
    return better.double() + (equal.double() - 1) / 2


def utilities(place: Tensor) -> Tensor:
    """What each candidate counts in a natural gradient, by its place.

    Wierstra et al., "Natural evolution strategies", 2014 (JMLR 15), section 3.1: max(0,
    ln(C / 2 + 1) - ln(k)) of the k-th best, k from 1, divided by their sum, minus 1 / C. Those that
    share a place share the mean of their utilities.

    Args:
        place: [C], as `places` gives it.

    Returns:
        float64 [C], of sum 0; all 0 where all share one place.
    """
    count = len(place)
    order = torch.arange(1, count + 1, dtype=torch.float64)
    raw = (math.log(count / 2 + 1) - order.log()).clamp_min(0.0)
    whole = raw / raw.sum() - 1.0 / count  # [C] of places 0, 1, ...
    given = torch.zeros(count, dtype=torch.float64)
    ranked = place.argsort(stable=True)
    for value in place.unique().tolist():
        shared = place[ranked] == value
        given[ranked[shared]] = whole[shared].mean()
    return given if len(place.unique()) > 1 else torch.zeros_like(given)


def reliability(rewards: Tensor) -> float:
    """The share of the variance of candidates' mean rewards that is not noise.

    Of a two-way table without repetition: 1 - 1 / F, where F is the mean square between candidates
    over that of the residual (candidate times query, with the draw in it). With common random
    numbers what all candidates share on a query is no noise and is left out. It is the correlation
    that is expected between these means and those on as many other queries (Cronbach's alpha;
    Hoyt, "Test reliability estimated by analysis of variance", Psychometrika 1941).

    Args:
        rewards: [C, Q], mean reward of each candidate on each query; NaN = unknown. Candidates
            without any, and then queries that are not known of all, are left out.

    Returns:
        From 0 to 1, NaN where two candidates on two queries are not left.
    """
    values = rewards.double()
    values = values[(~values.isnan()).any(dim=1)]
    values = values[:, values.isfinite().all(dim=0)]
    candidates, queries = values.shape
    if candidates < 2 or queries < 2:
        return math.nan
    means = values.mean(dim=1)
    between = queries * float(means.var())
    rest = values - means[:, None] - values.mean(dim=0) + values.mean()
    noise = float(rest.square().sum()) / ((candidates - 1) * (queries - 1))
    return max(0.0, 1.0 - noise / between) if between > 0.0 else 0.0
