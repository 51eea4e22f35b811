"""docs/results/certificates.json: how often certificates are false, and how often they come out.

    python experiments/simulate_certificates.py --json docs/results/certificates.json

Worlds are drawn in which the truth is known, and judged by `rlprompt.certify`, by what is usually
done in its place, and by an oracle that knows which candidate is good and how the judge errs. In
the *worst* worlds every candidate has exactly the rate alpha that is to be refuted; in the *mixed*
ones one candidate is good (a fifth of alpha) and all others are at alpha. `false_rate` is the
larger of the two; a cell's `error` is the standard error of a share of that many worlds.

    selection   best of K on n queries: Holm; a fixed sequence in the order of a validation split
    bounded     four completions a query, averaged: betting
    judge       verdicts of a judge with a sensitivity, labels half failures and half others
    labels      the labels are a random part of the answers themselves (peers apply here)
    shift       certified for every distribution within a radius, and met at the radius
    groups      the worst of four groups
    peeking     looked at after every answer, stopped at the first certificate
    alarm       a monitor of a stream that is as bad as allowed: how often it ever alarms

A cell that stands in the file already is not drawn again, so that an interrupted run goes on.
`--peers FOLDER` names a folder with `truescore` and `ppi-python` (`pip install --target FOLDER
truescore ppi-python`); the columns of one that is not there are null. 1 core, about ten minutes.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.certify.bounds import BETS, binomial_p_value
from rlprompt.certify.feasibility import most_failures
from rlprompt.certify.judge import JudgedRate, JudgeLabels
from rlprompt.certify.monitor import start_shares
from rlprompt.certify.shift import Shift
from rlprompt.files import write_atomic

ALPHA, DELTA = 0.1, 0.05
GOOD = ALPHA / 5
CANDIDATES = (1, 10, 50, 200)
QUERIES = (50, 100, 200, 500, 1000)
SPECIFICITY = 0.95
WORLDS, JUDGE_WORLDS, PEER_WORLDS = 20_000, 4_000, 2_000

Counts = NDArray[Any]
Bools = NDArray[np.bool_]
Cell = dict[str, Any]


def rng_of(*parts: object) -> np.random.Generator:
    """A generator that only the cell decides."""
    return np.random.default_rng(zlib.crc32(repr(parts).encode()))


def draw(
    rng: np.random.Generator, n: int, p: NDArray[np.float64], worlds: int
) -> NDArray[np.int64]:
    """[worlds, candidates] failures of n, each a binomial draw, in a Latin hypercube.

    A candidate's draws are spread evenly over its distribution and shuffled over the worlds, which
    leaves each world as it would be and takes most of the noise out of the shares.
    """
    columns, known = [], {}
    for rate in p.tolist():
        if rate not in known:
            known[rate] = np.asarray(special.bdtr(np.arange(n), n, rate))
        even = (rng.permutation(worlds) + rng.random(worlds)) / worlds
        columns.append(np.searchsorted(known[rate], even, side="left"))
    return np.stack(columns, axis=1)


def rates(candidates: int, good: float, bad: float, mixed: bool) -> NDArray[np.float64]:
    """Rates by candidate; in a mixed world the good one stands somewhere, here in the middle."""
    values = np.full(candidates, bad)
    if mixed:
        values[candidates // 2] = good
    return values


def holm(p_values: NDArray[np.float64]) -> Bools:
    """[worlds, candidates] of `selection.passing(method="holm")`, for many worlds at once."""
    order = np.argsort(p_values, axis=1, kind="stable")
    sorted_p = np.take_along_axis(p_values, order, axis=1)
    bars = DELTA / (p_values.shape[1] - np.arange(p_values.shape[1]))
    below = np.logical_and.accumulate(sorted_p <= bars, axis=1)
    result = np.zeros(p_values.shape, dtype=bool)
    np.put_along_axis(result, order, below, axis=1)
    return result


def in_sequence(passes: Bools, order: Counts) -> Bools:
    """[worlds, candidates] of a fixed sequence whose order was drawn elsewhere."""
    sorted_passes = np.take_along_axis(passes, order, axis=1)
    result = np.zeros(passes.shape, dtype=bool)
    np.put_along_axis(result, order, np.logical_and.accumulate(sorted_passes, axis=1), axis=1)
    return result


def cell_of(
    worst: Bools, mixed: Bools, candidates: int, oracle: float, naive: Mapping[str, float | None]
) -> Cell:
    """What both kinds of worlds gave.

    Args:
        worst: [worlds, candidates] certified where all candidates are at alpha.
        mixed: [worlds, candidates] certified where one is good.
        candidates: number of candidates.
        oracle: share of mixed worlds in which the oracle certifies the good one.
        naive: false rates of other methods in the worst worlds.
    """
    good = candidates // 2
    others = np.delete(mixed, good, axis=1)
    in_worst = float(worst.any(axis=1).mean())
    in_mixed = float(others.any(axis=1).mean()) if candidates > 1 else 0.0
    rate, power = max(in_worst, in_mixed), float(mixed[:, good].mean())
    return {
        "worlds": len(worst),
        "false_rate": rate,
        "error": math.sqrt(max(rate * (1 - rate), 1 / len(worst) ** 2) / len(worst)),
        "power": power,
        "oracle_power": oracle,
        "power_vs_oracle": power / oracle if oracle >= 0.05 else None,
        "naive": dict(naive),
    }


def bootstrap_certifies(failures: Counts, n: int) -> Bools:
    """Whether a percentile bootstrap's one-sided upper limit is at most alpha, in closed form."""
    return np.asarray(stats.binom.ppf(1 - DELTA, n, failures / n) / n <= ALPHA)


def naive_selection(failures: Counts, n: int) -> dict[str, float]:
    """How often the best candidate is certified as if it were the only one."""
    best = failures.min(axis=1)
    return {
        "clopper_pearson": float((binomial_p_value(best, n, ALPHA) <= DELTA).mean()),
        "bootstrap": float(bootstrap_certifies(best, n).mean()),
    }


def selection(candidates: int, n: int, method: str) -> Cell:
    rng = rng_of("selection", candidates, n)
    drawn = {}
    for mixed in (False, True):
        p = rates(candidates, GOOD, ALPHA, mixed)
        failures, validation = draw(rng, n, p, WORLDS), draw(rng, n, p, WORLDS)
        p_values = np.asarray(binomial_p_value(failures, n, ALPHA))
        if method == "holm":
            passed = holm(p_values)
        else:
            passed = in_sequence(p_values <= DELTA, np.argsort(validation, axis=1, kind="stable"))
        drawn[mixed] = (failures, passed)
    alone = np.asarray(binomial_p_value(drawn[True][0][:, candidates // 2], n, ALPHA)) <= DELTA
    naive = naive_selection(drawn[False][0], n)
    return cell_of(drawn[False][1], drawn[True][1], candidates, float(alone.mean()), naive)


def bounded(candidates: int, n: int) -> Cell:
    """Losses are means of four completions that are alike: a query's rate is drawn from a beta."""
    rng = rng_of("bounded", candidates, n)
    worlds = WORLDS // 5
    values = np.arange(5) / 4
    log_gains = np.log1p(BETS[None, :] * (ALPHA - values[:, None]) / (1 - ALPHA))  # [5, J]
    passed, naive, oracle = {}, {}, 0.0
    for mixed in (False, True):
        p_values, means, spreads = [], [], []
        for rate in rates(candidates, GOOD, ALPHA, mixed).tolist():
            chance = np.cumsum(stats.betabinom.pmf(np.arange(5), 4, 0.5 * rate, 0.5 * (1 - rate)))
            places = np.searchsorted(chance / chance[-1], rng.random((worlds, n)))
            losses = values[places]
            p_values.append(
                np.concatenate([bet(log_gains[each]) for each in np.array_split(places, 20)])
            )
            means.append(losses.mean(axis=1))
            spreads.append(losses.std(axis=1, ddof=1) / math.sqrt(n))
        table = np.stack(p_values, axis=1)
        passed[mixed] = holm(table)
        oracle = float((table[:, candidates // 2] <= DELTA).mean())
        if not mixed:
            naive = naive_means(np.stack(means, axis=1), np.stack(spreads, axis=1), n)
    return cell_of(passed[False], passed[True], candidates, oracle, naive)


def bet(log_gains: NDArray[np.float64]) -> NDArray[np.float64]:
    """[worlds] of `bounds.betting_p_value` from [worlds, n, J] logs of gains."""
    wealth = special.logsumexp(np.cumsum(log_gains, axis=1), axis=2) - math.log(len(BETS))
    return np.asarray(np.exp(np.minimum(0.0, -wealth.max(axis=1))))


def naive_means(
    means: NDArray[np.float64], errors: NDArray[np.float64], n: int
) -> dict[str, float]:
    """The best mean by Student's t, and as if all completions were independent."""
    best = np.argmin(means, axis=1)[:, None]
    mean, error = (np.take_along_axis(each, best, axis=1)[:, 0] for each in (means, errors))
    failures = np.rint(4 * n * mean).astype(int)
    return {
        "student_t": float((mean + stats.t.ppf(1 - DELTA, n - 1) * error <= ALPHA).mean()),
        "clopper_pearson": float((binomial_p_value(failures, 4 * n, ALPHA) <= DELTA).mean()),
    }


class LabelledJudges:
    """Draws of labels for one judge, and the counts that certify under each."""

    def __init__(self, sensitivity: float, labels: int, n: int) -> None:
        """Draw the labels of every world, half failures and half others.

        Args:
            sensitivity: share of failures that the judge flags.
            labels: number of labelled answers.
            n: number of answers that are judged.
        """
        rng = rng_of("labels", sensitivity, labels)
        half = labels // 2
        self.n, self.half = n, half
        self.flagged_failures = rng.binomial(half, sensitivity, size=JUDGE_WORLDS)
        self.flagged_others = rng.binomial(half, 1 - SPECIFICITY, size=JUDGE_WORLDS)

    def most_flagged(self, limit: float, delta: float) -> Counts:
        """[worlds] the most flagged answers with which the limit is certified."""
        known: dict[tuple[int, int], int] = {}
        pairs = list(zip(self.flagged_failures.tolist(), self.flagged_others.tolist(), strict=True))
        for pair in pairs:
            if pair not in known:
                labels = JudgeLabels(pair[0], self.half, pair[1], self.half)
                known[pair] = JudgedRate(labels, self.n).most_flagged(limit, delta)
        return np.array([known[pair] for pair in pairs])

    def plug_in(self, flagged: Counts) -> Bools:
        """Whether Rogan and Gladen's estimate with its delta-method limit is at most alpha."""
        s, f, q = (
            self.flagged_failures / self.half,
            self.flagged_others / self.half,
            flagged / self.n,
        )
        gain = np.maximum(s - f, 1e-9)
        rate = (q - f) / gain
        variance = (
            q * (1 - q) / self.n
            + (rate**2 * s * (1 - s) + (1 - rate) ** 2 * f * (1 - f)) / self.half
        )
        return np.asarray(rate + 1.6448536 * np.sqrt(variance) / gain <= ALPHA)


def flag_rate(rate: Any, sensitivity: float) -> Any:
    return rate * sensitivity + (1 - rate) * (1 - SPECIFICITY)


def judge(
    sensitivity: float, labels: int, n: int, shift: Shift | None = None
) -> Iterator[Mapping[str, Any]]:
    """One cell for each K; all share the labels, and the sequence is ordered by verdicts."""
    judges = LabelledJudges(sensitivity, labels, n)
    limit = ALPHA if shift is None else shift.base_limit(ALPHA)
    most = judges.most_flagged(limit, DELTA)
    for candidates in CANDIDATES:
        rng = rng_of("judge", sensitivity, labels, n, candidates)
        drawn = {}
        for mixed in (False, True):
            q = flag_rate(rates(candidates, limit / 5, limit, mixed), sensitivity)
            flagged, validation = draw(rng, n, q, JUDGE_WORLDS), draw(rng, n, q, JUDGE_WORLDS)
            order = np.argsort(validation, axis=1, kind="stable")
            drawn[mixed] = (flagged, in_sequence(flagged <= most[:, None], order))
        knows = most_failures(n, float(flag_rate(limit, sensitivity)), DELTA)
        oracle = float((drawn[True][0][:, candidates // 2] <= knows).mean())
        best = drawn[False][0].min(axis=1)
        naive = {
            "clopper_pearson": float((binomial_p_value(best, n, ALPHA) <= DELTA).mean()),
            "rogan_gladen": float(judges.plug_in(best).mean()),
        }
        yield {"K": candidates} | cell_of(
            drawn[False][1], drawn[True][1], candidates, oracle, naive
        )


def from_answers(labelled: int, peers: Path | None) -> Cell:
    """One candidate; of 1,000 answers a random part is labelled by people, and all are judged.

    Ours is the exact bound on the labels alone, which needs no judge.
    """
    n, sensitivity = 1000, 0.85
    rng = rng_of("labels from answers", labelled)
    methods = peers_in(peers)
    passed: dict[bool, Bools] = {}
    others: dict[bool, dict[str, list[bool]]] = {False: {}, True: {}}
    oracle = 0.0
    for mixed in (False, True):
        truth = rng.random((PEER_WORLDS, n)) < (GOOD if mixed else ALPHA)
        verdicts = rng.random((PEER_WORLDS, n)) < np.where(truth, sensitivity, 1 - SPECIFICITY)
        p_values = binomial_p_value(truth[:, :labelled].sum(axis=1), labelled, ALPHA)
        passed[mixed] = (np.asarray(p_values) <= DELTA)[:, None]
        knows = most_failures(n, float(flag_rate(ALPHA, sensitivity)), DELTA)
        oracle = float((verdicts.sum(axis=1) <= knows).mean())
        for true, flagged in zip(truth, verdicts, strict=True):
            for name, high in peer_limits(methods, true, flagged, labelled).items():
                others[mixed].setdefault(name, []).append(high <= ALPHA)
    shares = {k: {n: float(np.mean(v)) for n, v in each.items()} for k, each in others.items()}
    naive = {name: shares[False].get(name) for name in PEERS}
    cell = cell_of(passed[False], passed[True], 1, oracle, naive)
    return cell | {"peer_power": {name: shares[True].get(name) for name in PEERS}}


PEERS = ("truescore_rogan_gladen", "truescore_ppi", "ppi_python")
"""Methods of other packages for labels that are a random part of the answers."""
Peer = Callable[[NDArray[np.float64], NDArray[np.float64], int], float]
"""Human labels, verdicts, and how many labels are known -> one-sided upper limit of the rate."""


def peers_in(folder: Path | None) -> dict[str, Peer]:
    """The methods whose package lies in a folder."""
    if folder is None:
        return {}
    sys.path.append(str(folder))  # behind the packages that are installed
    found: dict[str, Peer] = {}
    with suppress(ImportError):
        correct = importlib.import_module("truescore.correct")
        for name in ("rogan_gladen", "ppi"):
            own = getattr(correct, f"{name}_estimate")
            found[f"truescore_{name}"] = partial(_truescore, own)
    with suppress(ImportError):
        found["ppi_python"] = partial(_ppi_python, importlib.import_module("ppi_py").ppi_mean_ci)
    return found


def _truescore(
    make: Callable[..., Any],
    truth: NDArray[np.float64],
    flagged: NDArray[np.float64],
    labelled: int,
) -> float:
    return float(make(flagged, truth[:labelled], np.arange(labelled), alpha=2 * DELTA).high)


def _ppi_python(
    make: Callable[..., Any],
    truth: NDArray[np.float64],
    flagged: NDArray[np.float64],
    labelled: int,
) -> float:
    """Power-tuned prediction-powered inference (PPI++), the package's default."""
    found = make(truth[:labelled], flagged[:labelled], flagged[labelled:], alpha=2 * DELTA)
    return float(np.asarray(found[1]).reshape(-1)[0])


def peer_limits(
    peers: Mapping[str, Peer], truth: Bools, flagged: Bools, labelled: int
) -> dict[str, float]:
    """One-sided upper limits of each method; a refusal is no certificate."""
    limits = {}
    for name, limit in peers.items():
        try:
            limits[name] = limit(truth.astype(float), flagged.astype(float), labelled)
        except ValueError:
            limits[name] = 1.0
    return limits


def shifted(shift: Shift, candidates: int, n: int) -> Cell:
    """The rate under P is such that the worst Q has exactly alpha."""
    rng = rng_of("shift", str(shift), candidates, n)
    limit = shift.base_limit(ALPHA)
    drawn = {}
    for mixed in (False, True):
        failures = draw(rng, n, rates(candidates, limit / 5, limit, mixed), WORLDS)
        drawn[mixed] = (failures, holm(np.asarray(binomial_p_value(failures, n, limit))))
    alone = np.asarray(binomial_p_value(drawn[True][0][:, candidates // 2], n, limit)) <= DELTA
    naive = naive_selection(drawn[False][0], n)
    return cell_of(drawn[False][1], drawn[True][1], candidates, float(alone.mean()), naive)


def grouped(n: int) -> Cell:
    """Four groups of n / 4 queries: one at alpha and three without failures; all good; pooled."""
    rng = rng_of("groups", n)
    each = n // 4
    results = {}
    for mixed in (False, True):
        p = np.full(4, GOOD) if mixed else np.array([ALPHA, 0.0, 0.0, 0.0])
        failures = draw(rng, each, p, WORLDS)
        results[mixed] = (failures, np.asarray(binomial_p_value(failures, each, ALPHA)))
    passed = {
        mixed: (p_values.max(axis=1) <= DELTA)[:, None] for mixed, (_, p_values) in results.items()
    }
    pooled = results[False][0].sum(axis=1)
    naive = {"clopper_pearson": float((binomial_p_value(pooled, n, ALPHA) <= DELTA).mean())}
    # Its oracle knows which group is the worst, and tests that one.
    oracle = float((results[True][1][:, 0] <= DELTA).mean())
    return cell_of(passed[False], passed[True], 1, oracle, naive)


def wealth_table(n: int, limit: float, side: str) -> NDArray[np.float64]:
    """[n + 1, n + 1] log wealth of the mixture by number of losses, and of those that were 1."""
    one, none = ((1 - limit) / limit, -1.0) if side == "above" else (-1.0, limit / (1 - limit))
    failures = np.arange(n + 1)[None, :, None]
    seen = np.arange(n + 1)[:, None, None]
    table = np.full((n + 1, n + 1), -np.inf)
    for rows in np.array_split(np.arange(n + 1), max(1, n // 100)):
        good = np.maximum(seen[rows] - failures, 0)
        logs = failures * np.log1p(BETS * one) + good * np.log1p(BETS * none)
        table[rows] = special.logsumexp(logs, axis=2) - math.log(len(BETS))
    return table


def peeking(candidates: int, n: int) -> Cell:
    """An e-process against each candidate, at delta / K, looked at after every answer."""
    rng = rng_of("peeking", candidates, n)
    worlds = WORLDS // (5 if candidates == 1 else 10)
    table = wealth_table(n, ALPHA, "below")[1:]
    most = (table >= math.log(candidates / DELTA)).sum(
        axis=1
    ) - 1  # [n]: wealth falls with failures
    plain = np.array([most_failures(t, ALPHA, DELTA) for t in range(1, n + 1)])
    results: dict[bool, Bools] = {}
    naive, oracle = 0.0, 0.0
    for mixed in (False, True):
        p = rates(candidates, GOOD, ALPHA, mixed)
        passed = np.zeros((worlds, candidates), dtype=bool)
        peeked = np.zeros(worlds, dtype=bool)
        for place, rate in enumerate(p):
            failures = np.cumsum(rng.random((worlds, n)) < rate, axis=1)
            passed[:, place] = (failures <= most).any(axis=1)
            peeked |= (failures <= plain).any(axis=1)
            if mixed and place == candidates // 2:
                oracle = float((failures[:, -1] <= plain[-1]).mean())
        results[mixed] = passed
        naive = naive if mixed else float(peeked.mean())
    return cell_of(
        results[False], results[True], candidates, oracle, {"clopper_pearson_each_time": naive}
    )


def alarm(n: int) -> Cell:
    """A monitor's false alarms in a stream at the limit; how soon it sees that the rate trebles."""
    rng = rng_of("alarm", n)
    worlds = WORLDS // 5
    table = wealth_table(n, ALPHA, "above")
    results = {}
    for changed in (False, True):
        rate = np.where(np.arange(n) < n // 2, ALPHA / 2, 3 * ALPHA) if changed else ALPHA
        failures = np.cumsum(rng.random((worlds, n)) < rate, axis=1)
        results[changed] = monitored(failures, table) >= math.log(1 / DELTA)
        if not changed:
            lower = np.array(
                [t - 1 - most_failures(t, 1 - ALPHA, DELTA) for t in range(1, n + 1)]
            )  # as many failures as one binomial test would alarm at
            plain = float((failures > lower).any(axis=1).mean())
    after = results[True][:, n // 2 :]
    delays = np.argmax(after, axis=1)[after.any(axis=1)] + 1
    rate = float(results[False].any(axis=1).mean())
    return {
        "worlds": worlds,
        "false_rate": rate,
        "error": math.sqrt(max(rate * (1 - rate), 1 / worlds**2) / worlds),
        "power": float(after.any(axis=1).mean()),
        "median_delay": float(np.median(delays)) if len(delays) else None,
        "naive": {"binomial_test_each_time": plain},
    }


def monitored(failures: Counts, table: NDArray[np.float64]) -> NDArray[np.float64]:
    """[worlds, times] the log wealth of a monitor with restarts, from a table of single bets."""
    worlds, n = failures.shape
    padded = np.concatenate([np.zeros((worlds, 1), dtype=failures.dtype), failures], axis=1)
    starts = [0, *(2**j for j in range(n.bit_length()) if 2**j < n)]
    shares = start_shares(len(starts))
    wealth = np.ones((worlds, n))
    for start, share in zip(starts, shares, strict=True):
        since = np.arange(start + 1, n + 1)
        logs = table[since - start, padded[:, start + 1 :] - padded[:, start : start + 1]]
        wealth[:, start:] += share * np.expm1(np.minimum(logs, 700.0))
    return np.log(np.maximum(wealth, 1e-300))


SHIFTS = (Shift("tv", 0.05), Shift("ratio", 2.0), Shift("chi2", 0.1), Shift("kl", 0.05))


Blocks = Iterator[tuple[str, Callable[[], list[Mapping[str, Any]]]]]


def one(family: str, keys: Mapping[str, Any], make: Callable[..., Cell], *given: Any) -> Any:
    """A block of one cell: its name, and what draws it."""
    name = " ".join([family, *(f"{key}={value}" for key, value in keys.items())])
    return name, lambda: [{"family": family, **keys, **make(*given)}]


def cells(peers: Path | None) -> Blocks:
    """The name of every block of cells, and what draws it."""
    for k, n, method in itertools.product(CANDIDATES, QUERIES, ("holm", "fixed_sequence")):
        yield one("selection", {"K": k, "n": n, "method": method}, selection, k, n, method)
    for k, n in ((1, 50), (1, 200), (1, 1000), (10, 50), (10, 200)):
        yield one("bounded", {"K": k, "n": n}, bounded, k, n)
    for shift, k, n in itertools.product(SHIFTS, (1, 50), (100, 500, 1000)):
        keys = {"shift": f"{shift.kind}:{shift.radius}", "K": k, "n": n}
        yield one("shift", keys, shifted, shift, k, n)
    for n in (200, 400, 1000):
        yield one("groups", {"K": 1, "n": n}, grouped, n)
    for k, n in itertools.product((1, 10), (100, 300, 1000)):
        yield one("peeking", {"K": k, "n": n}, peeking, k, n)
    for n in (300, 1000):
        yield one("alarm", {"n": n}, alarm, n)
    for labelled in (100, 400):
        keys = {"K": 1, "n": 1000, "labels": labelled}
        yield one("labels", keys, from_answers, labelled, peers)
    yield from judge_blocks()


def judge_blocks() -> Blocks:
    def block(keys: Mapping[str, Any], *given: Any) -> Callable[[], list[Mapping[str, Any]]]:
        return lambda: [dict(keys) | dict(cell) for cell in judge(*given)]

    for labels in (50, 200, 500):
        for sensitivity in (0.76, 0.85, 0.95):
            for n in (100, 300, 1000):
                keys = {"family": "judge", "sensitivity": sensitivity, "labels": labels, "n": n}
                name = f"judge s={sensitivity} labels={labels} n={n}"
                yield name, block(keys, sensitivity, labels, n)
    keys = {"family": "judge", "sensitivity": 0.85, "labels": 200, "n": 1000, "shift": "tv:0.02"}
    yield "judge shifted", block(keys, 0.85, 200, 1000, Shift("tv", 0.02))


def summary(every: list[Cell], seconds: float) -> dict[str, Any]:
    """The numbers of the whole, and every cell."""
    ratios = [cell["power_vs_oracle"] for cell in every if cell.get("power_vs_oracle") is not None]
    worst = max(every, key=lambda cell: cell["false_rate"])
    naive = next(
        (c for c in every if c["family"] == "selection" and c["K"] == 50 and c["n"] == 100), None
    )
    by_family = {
        family: statistics.median(
            c["power_vs_oracle"]
            for c in every
            if c["family"] == family and c.get("power_vs_oracle") is not None
        )
        for family in dict.fromkeys(
            c["family"] for c in every if c.get("power_vs_oracle") is not None
        )
    }
    return {
        "alpha": ALPHA,
        "delta": DELTA,
        "false_rate_max": worst["false_rate"],
        "false_rate_max_error": worst["error"],
        "naive_rate_k50": None if naive is None else naive["naive"]["clopper_pearson"],
        "power_vs_oracle_median": statistics.median(ratios) if ratios else None,
        "power_vs_oracle_by_family": by_family,
        "bound_at_0_of_100": 1 - DELTA ** (1 / 100),
        "bound_at_0_of_100_judged": JudgedRate(JudgeLabels(85, 100, 0, 100), 100).upper(0, DELTA),
        "cpu_seconds": seconds,
        "num_cells": len(every),
        "num_worlds": sum(cell["worlds"] for cell in every),
        "cells_above_delta": sum(c["false_rate"] > DELTA for c in every),
        "cells_above_delta_by_two_errors": sum(
            c["false_rate"] > DELTA + 2 * c["error"] for c in every
        ),
        "cells": every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go, and are")
    parser.add_argument("--peers", type=Path, help="a folder with truescore and ppi-python")
    parser.add_argument("--only", default="", help="blocks whose name begins so")
    options = parser.parse_args()
    stored = json.loads(options.json.read_text()) if options.json.exists() else {}
    found: list[Cell] = stored.get("cells", [])
    seconds = stored.get("cpu_seconds") or 0.0
    for name, make in cells(options.peers):
        if any(cell["block"] == name for cell in found) or not name.startswith(options.only):
            continue
        begun = time.process_time()
        made: list[Cell] = [{"block": name, **cell} for cell in make()]
        found += made
        seconds += time.process_time() - begun
        write_atomic(options.json, json.dumps(summary(found, seconds), indent=1) + "\n")
        worst = max(cell["false_rate"] for cell in made)
        print(f"{name}: false {worst:.4f}, {time.process_time() - begun:.1f} s", flush=True)
    result = summary(found, seconds)
    print(json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=1))


if __name__ == "__main__":
    main()
