"""Whether prompts can help here at all, from a few rewards drawn before anything is trained.

Several prompts answer the same queries, each a few times. The rewards then fall into what the query
makes of them, what the prompt does on all queries, what it does on this one, and what is left to
chance: a random model of two crossed factors, whose components are estimated from mean squares
(Searle, Casella and McCulloch, "Variance Components", 1992, chapter 4; below zero is cut at zero).

The idea is that of "p1" (arXiv 2604.08801): the variance of rewards lies among responses of one
prompt and among prompts, and learning a prompt works where the second part is large. There the
second part is what the mean over the queries in use keeps of the prompts' differences, so it falls
with more queries that favour different prompts, and a few queries on which prompts differ most are
worth more than many. Here the two kinds of difference are told apart: `prompt_share` stays however
many queries are averaged, `query_prompt_share` is divided by their number, as `chance_share` is by
that of all completions (`between_share`). `prompt_signal` says on which queries prompts differ.

Assumed: queries are an independent sample, every prompt met all of them equally often, and draws
are independent given prompt and query. The F test of the prompts is exact for normal effects and
close for means over many queries. What breaks it: few prompts say little about all prompts that
there could be, and learned prompts may reach what no prompt tried here did. So "no difference seen"
is not "there is none": `queries_needed` says what could have been seen.

Letters: P prompts, Q queries, n completions per query.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rlprompt.certify.bounds import clopper_pearson_upper

Rewards = NDArray[np.float64]
"""[P, Q, n]; NaN = could not be scored. Prompt 0 is where training starts."""

Outlook = Literal["yes", "unclear", "no"]
"""Whether prompts can help. `no`: nothing that was drawn differs but by the reward's own noise."""

_LEVEL = 0.05
_POWER = 0.8


@dataclass(frozen=True)
class Forecast:
    """What a small table of rewards says; every number is over queries that were scored in full."""

    num_queries: int
    """Q without those that have a missing reward."""
    num_dropped: int
    """Queries that were left out for that."""
    means: tuple[float, ...]
    """[P] mean reward of each prompt."""
    prompt_share: float
    """Of the variance of rewards of one query: what lies between prompts, alike on all queries."""
    query_prompt_share: float
    """What lies between prompts and differs from query to query."""
    chance_share: float
    """What lies between completions of one prompt for one query; the three sum to 1."""
    p_value: float
    """Of "all prompts have the same mean"."""
    group_spread: float
    """Mean standard deviation of a group of n completions under prompt 0: what a policy gradient
    learns from."""
    flat_groups: float
    """Share of those groups in which all rewards are equal: they teach nothing."""
    best_of_n: float
    """Mean of the best of n completions under prompt 0: about what choosing among its own answers
    could reach."""
    noise: float
    """Standard deviation of the reward of one and the same completion, scored twice; NaN where it
    was scored once."""
    difference_sd: float
    """Standard deviation over queries of the difference to prompt 0, of the prompt with the highest
    mean of the others."""
    is_flat: bool
    """Whether all rewards of each query are equal, whatever the prompt and the completion."""
    outlook: Outlook
    """Whether prompts can help."""

    @property
    def gain(self) -> float:
        """Mean of the best other prompt less that of prompt 0; the best of several is flattered."""
        return max(self.means[1:]) - self.means[0]

    def between_share(self, num_queries: int, completions: int) -> float:
        """Of the variance of a prompt's mean reward over a batch, what lies between prompts.

        This is the share of arXiv 2604.08801, for a batch of any size; 0 where nothing varies.

        Args:
            num_queries: number of queries that the mean is over.
            completions: number of completions of each.
        """
        between = self.prompt_share + self.query_prompt_share / num_queries
        whole = between + self.chance_share / (num_queries * completions)
        return between / whole if whole > 0.0 else 0.0

    def queries_needed(self, difference: float) -> int:
        """Queries on which a paired test (5%, two-sided) sees a difference with probability 0.8.

        Args:
            difference: mean difference of two prompts, above 0, in units of the reward.

        Raises:
            ValueError: the difference is not above 0.
        """
        if not difference > 0.0:
            raise ValueError(f"the difference is {difference:g}; give one above 0")
        z = float(stats.norm.ppf(1 - _LEVEL / 2) + stats.norm.ppf(_POWER))
        return max(2, math.ceil((z * self.difference_sd / difference) ** 2))

    @property
    def sentence(self) -> str:
        """The outlook in words."""
        if self.outlook == "no":
            return "nothing to learn from: rewards differ by no more than the reward's own noise"
        if self.is_flat:
            unseen = clopper_pearson_upper(0, self.num_queries, _LEVEL)
            return (
                "unclear: nothing to learn from was drawn, for all completions of each query got "
                "the same reward under every prompt; with 95% confidence rewards differ on at most "
                f"{unseen:.0%} of queries: draw more, or give the reward a slope"
            )
        if self.outlook == "yes":
            return (
                f"prompts can help: they differ by more than chance (p = {self.p_value:.2g}), and "
                f"the best other one is {self.gain:+.3f} from the start"
            )
        return (
            f"unclear: these prompts do not differ by more than chance on {self.num_queries} "
            f"queries (p = {self.p_value:.2g}), but completions of one query do"
        )


def forecast(rewards: Rewards, again: Rewards | None = None) -> Forecast:
    """Say what a table of rewards tells of what training can reach.

    Args:
        rewards: [P, Q, n] with P, Q and n at least 2.
        again: [Q, n] rewards of prompt 0's completions, scored a second time.

    Raises:
        ValueError: the table is too small, or fewer than two queries were scored in full.
    """
    if rewards.ndim != 3 or min(rewards.shape) < 2:
        raise ValueError(
            f"the table of rewards is {rewards.shape}; give two prompts, queries and completions "
            "at least"
        )
    is_known: NDArray[np.bool_] = np.asarray(~np.isnan(rewards).any(axis=(0, 2)))  # [Q]
    table = rewards[:, is_known]
    if table.shape[1] < 2:
        raise ValueError(
            f"{int(is_known.sum())} of {len(is_known)} queries were scored in full; give a reward "
            "that scores them, or more queries"
        )
    noise = math.nan if again is None else _noise(rewards[0], again)
    shares, p_value = _components(table)
    groups = table.std(axis=2, ddof=1)  # [P, Q]
    means = table.mean(axis=(1, 2))  # [P]
    best = 1 + int(means[1:].argmax())
    differences = (table[best] - table[0]).mean(axis=1)  # [Q]
    return Forecast(
        num_queries=table.shape[1],
        num_dropped=int((~is_known).sum()),
        means=tuple(float(mean) for mean in means),
        prompt_share=shares[0],
        query_prompt_share=shares[1],
        chance_share=shares[2],
        p_value=p_value,
        group_spread=float(groups[0].mean()),
        flat_groups=float(_is_flat(table[0]).mean()),
        best_of_n=float(table[0].max(axis=1).mean()),
        noise=noise,
        difference_sd=float(differences.std(ddof=1)),
        is_flat=bool((table == table[:1, :, :1]).all()),
        outlook=_outlook(table, p_value, noise),
    )


def signal(rewards: Rewards) -> NDArray[np.float64]:
    """How much each query can teach: [Q] standard deviation within its group of completions.

    Args:
        rewards: [Q, n] under the prompt that training starts from; NaN = not scored.

    Returns:
        0 for a query on which all completions score the same, NaN for one with fewer than two
        rewards.
    """
    counts = (~np.isnan(rewards)).sum(axis=1)
    spread = np.full(len(rewards), np.nan)
    for row in np.flatnonzero(counts >= 2):
        spread[row] = np.nanstd(rewards[row], ddof=1)
    return spread


def prompt_signal(rewards: Rewards) -> NDArray[np.float64]:
    """How far prompts differ on each query: [Q] standard deviation beyond that of chance.

    By the sum of squares between prompts less what the completions' own variance makes of it, cut
    at zero; the queries with the highest values are those that arXiv 2604.08801 keeps.

    Args:
        rewards: [P, Q, n] with P and n at least 2; NaN = not scored, its query has NaN.
    """
    between = rewards.mean(axis=2).var(axis=0, ddof=1)  # [Q]
    chance = rewards.var(axis=2, ddof=1).mean(axis=0) / rewards.shape[2]
    return np.asarray(np.sqrt(np.maximum(0.0, between - chance)))


def _components(table: Rewards) -> tuple[Sequence[float], float]:
    """Shares of prompt, prompt by query, and chance; the p-value of the prompts."""
    prompts, queries, draws = table.shape
    cells = table.mean(axis=2)  # [P, Q]
    overall = cells.mean()
    by_prompt, by_query = cells.mean(axis=1), cells.mean(axis=0)
    rest = cells - by_prompt[:, None] - by_query[None, :] + overall
    of_chance = float(table.var(axis=2, ddof=1).mean())
    of_both = draws * float((rest**2).sum()) / ((prompts - 1) * (queries - 1))
    of_prompts = draws * queries * float(((by_prompt - overall) ** 2).sum()) / (prompts - 1)
    both = max(0.0, (of_both - of_chance) / draws)
    prompt = max(0.0, (of_prompts - of_both) / (draws * queries))
    total = prompt + both + of_chance
    if total <= 0.0:
        return (0.0, 0.0, 1.0), 1.0
    if of_both > 0.0:
        freedom = (prompts - 1, (prompts - 1) * (queries - 1))
        p_value = float(stats.f.sf(of_prompts / of_both, *freedom))
    else:
        p_value = 0.0 if of_prompts > 0.0 else 1.0
    return (prompt / total, both / total, of_chance / total), p_value


def _noise(once: Rewards, again: Rewards) -> float:
    """Standard deviation of one completion's reward, from two scorings [Q, n]."""
    differences = (once - again)[~np.isnan(once - again)]
    if not differences.size:
        return math.nan
    return float(np.sqrt(np.mean(differences**2) / 2))


def _is_flat(rewards: Rewards) -> NDArray[np.bool_]:
    """[..., n] -> [...]: whether all rewards of a group are equal."""
    return np.asarray(rewards.max(axis=-1) == rewards.min(axis=-1))


def _outlook(table: Rewards, p_value: float, noise: float) -> Outlook:
    if p_value < _LEVEL:
        return "yes"
    if bool(_is_flat(table).all()):
        return "unclear"  # a sparse reward looks so before training, and may be learned yet
    chance = float(table.var(axis=2, ddof=1).mean())
    # Half as much again: both are estimates, and what is said must hold where they are close.
    if noise > 0.0 and chance <= 1.5 * noise**2:
        return "no"
    return "unclear"
