"""Guards against reward hacking: they watch a run's metrics and raise an alarm on a stated rule.

A reward is a proxy. Optimised far enough, it rises while what it stands for falls (Gao, Schulman
and Hilton, 2022, arXiv 2210.10760). What it stands for can be watched by a *gold* reward: one with
the role `metric`, slower or better than the proxy and never trained on. `PartingGuard` finds the
point where the two part; `LimitGuard` finds drifts that often come first: length, repetition,
diversity, KL. A guard never looks at the trained prompt, and it changes nothing until it stops.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.settings import Settings

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout"]


class _GuardSettings(Settings):
    """What every guard has."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9_\-]+$")
    """Name in logs, in the metric `guards/{name}`, and in the report."""
    split: Split = "train"
    """Watch every training batch, or every held-out evaluation of the learned prompt."""
    window: int = Field(default=5, ge=2)
    """Batches (or evaluations) that are averaged; no alarm before there are enough."""
    patience: int = Field(default=2, ge=1)
    """The rule must hold this many times in a row."""
    action: Literal["warn", "stop"] = "warn"
    """`warn` logs the alarm; `stop` also ends the run, as early stopping does."""


class PartingGuard(_GuardSettings):
    """Proxy and gold part: since gold was at its best, proxy has risen and gold has fallen.

    With the means over the last `window` batches (now) and over the window in which gold's mean
    was highest (then), and the standard deviations s of the batches in each:

        fall = (gold_then - gold_now) / sqrt((s_then^2 + s_now^2) / window)
        rise = (proxy_now - proxy_then) / the same of the proxy

    The rule holds when fall >= `sigmas` and rise >= `sigmas`. The highest of many windows is partly
    luck, so `sigmas` is larger than for one comparison: on noise without any trend, 1 in 100 runs
    of 100 batches raises an alarm at the defaults (a test measures it).
    """

    type: Literal["parting"] = "parting"
    """Kind of guard."""
    proxy: str = "reward"
    """What is trained on: `reward` (the total), or the name of a reward."""
    gold: str
    """Name of a reward with the role `metric` that is harder to fool."""
    sigmas: float = Field(default=3.0, gt=0.0)
    """Standard errors of each change that count as one."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that it reads."""
        return _mean_of(self.proxy), _mean_of(self.gold)

    def judge(self, history: Sequence[Sequence[float]]) -> str | None:
        """Why the rule holds now, or None.

        Args:
            history: one row per batch so far, `(proxy, gold)`.
        """
        size = self.window
        if len(history) < 2 * size:
            return None
        proxy, gold = ([row[i] for row in history] for i in (0, 1))
        starts = range(len(history) - size)  # windows that end before the last one does
        best = max(starts, key=lambda start: sum(gold[start : start + size]))
        then, now = slice(best, best + size), slice(len(history) - size, None)
        fall = _change(gold[now], gold[then])
        rise = _change(proxy[then], proxy[now])
        if fall < self.sigmas or rise < self.sigmas:
            return None
        return (
            f"{self.proxy} rose from {_mean(proxy[then]):.3f} to {_mean(proxy[now]):.3f} while "
            f"{self.gold} fell from its best, {_mean(gold[then]):.3f}, to {_mean(gold[now]):.3f}"
        )


class LimitGuard(_GuardSettings):
    """A metric leaves its bounds: its mean over the last `window` batches is above or below them.

    For example completion length (`completions/mean_length`), `kl`, `entropy`, or the mean of a
    reward such as `rewards/repetition/mean` and `rewards/diversity/mean`.
    """

    type: Literal["limit"] = "limit"
    """Kind of guard."""
    metric: str
    """Metric to watch, as in metrics.jsonl (`split: train`) or evaluation.jsonl."""
    above: float | None = None
    """Alarm above this."""
    below: float | None = None
    """Alarm below this."""
    relative: bool = False
    """Bounds are multiples of the metric's mean over the first `window` batches."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> LimitGuard:
        if self.above is None and self.below is None:
            raise ValueError("neither above nor below is set, so nothing can be wrong; set one")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics that it reads."""
        return (self.metric,)

    def judge(self, history: Sequence[Sequence[float]]) -> str | None:
        """Why the rule holds now, or None; `history` has one row `(value,)` per batch so far."""
        size = self.window
        if len(history) < (2 * size if self.relative else size):
            return None
        values = [row[0] for row in history]
        now, scale = _mean(values[-size:]), _mean(values[:size]) if self.relative else 1.0
        start = f" (it began at {scale:.3g})" if self.relative else ""
        if self.above is not None and now > self.above * scale:
            return f"{self.metric} is {now:.3g}, above {self.above * scale:.3g}{start}"
        if self.below is not None and now < self.below * scale:
            return f"{self.metric} is {now:.3g}, below {self.below * scale:.3g}{start}"
        return None


Guard = Annotated[PartingGuard | LimitGuard, Field(discriminator="type")]


class Alarm(NamedTuple):
    """One guard's rule holds."""

    step: int
    """Updates made so far."""
    guard: str
    """The guard's name."""
    reason: str
    """What it saw, with figures."""
    stop: bool
    """Whether the run shall end."""


class GuardWatch:
    """The guards of a run.

    What they have seen is kept in a mapping of plain values that the run saves in its checkpoints,
    so that a resumed run raises the alarms of an uninterrupted one.
    """

    def __init__(self, guards: Sequence[PartingGuard | LimitGuard]) -> None:
        """Keep the guards.

        Raises:
            InputError: two share a name.
        """
        names = [guard.name for guard in guards]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{names.count(name)} guards are named '{name}'; rename one")
        self._guards = list(guards)

    def adopt(self, state: dict[str, Any]) -> None:
        """Take over what was seen when guards may have had other rules.

        An alarm ends the run only while the guard that raised it is there and as it was. What a
        guard has seen stays, unless it watches something else now.

        Args:
            state: what was seen so far, as `observe` left it; changed in place.
        """
        unchanged = set()
        for guard in self._guards:
            seen, rule = state.get(guard.name), _rule(guard)
            before = rule if seen is None else seen.get("rule", rule)
            if before == rule:
                unchanged.add(guard.name)
            elif any(before.get(key) != rule.get(key) for key in _WATCHED):
                state[guard.name] = _nothing_seen(guard)
            else:
                state[guard.name] = {**(seen or {}), "rule": rule, "held": 0}
        alarms = alarms_of(state)
        if alarms:
            kept = [a._replace(stop=a.stop and a.guard in unchanged) for a in alarms]
            state[_ALARMS] = [list(alarm) for alarm in kept]

    def place_of(self, name: str) -> int:
        """The index of the guard of that name in the recipe's list."""
        return [guard.name for guard in self._guards].index(name)

    def observe(
        self, step: int, metrics: Mapping[str, Any], state: dict[str, Any], split: Split = "train"
    ) -> dict[str, float]:
        """Take up the metrics of one batch, or of one evaluation, and judge.

        Alarms are logged, and kept in `state`: see `alarms_of` and `stopped_by`.

        Args:
            step: the number of updates made so far.
            metrics: the metrics by name; one that a guard watches may be missing in some batches,
                not always.
            state: what was seen so far, `{}` at first; changed in place, plain values only.
            split: where the metrics come from.

        Returns:
            `guards/{name}` of each guard that watches: 1.0 while its alarm holds, else 0.0.

        Raises:
            InputError: a guard watches a metric that was not logged in its first `window` batches.
        """
        shown: dict[str, float] = {}
        for guard in self._guards:
            if guard.split != split:
                continue
            seen = state.setdefault(guard.name, _nothing_seen(guard))
            values = [metrics.get(name) for name in guard.metrics]
            if any(value is None or not math.isfinite(value) for value in values):
                _miss(guard, seen, metrics)
                continue
            seen["history"].append([float(value) for value in values if value is not None])
            reason = guard.judge(seen["history"])
            seen["held"] = seen["held"] + 1 if reason else 0
            alarm = seen["held"] >= guard.patience
            shown[f"guards/{guard.name}"] = float(alarm)
            if reason and seen["held"] == guard.patience:
                _raise(Alarm(step, guard.name, reason, guard.action == "stop"), state)
        return shown


def alarms_of(state: Mapping[str, Any]) -> list[Alarm]:
    """The alarms raised so far, from the state of a `GuardWatch`."""
    return [Alarm(*row) for row in state.get(_ALARMS, [])]


def stopped_by(state: Mapping[str, Any]) -> str | None:
    """The guard that has ended the run, or None."""
    return next((alarm.guard for alarm in alarms_of(state) if alarm.stop), None)


def require_known_rewards(
    guards: Sequence[PartingGuard | LimitGuard], roles: Mapping[str, str]
) -> None:
    """Refuse guards that name rewards the recipe does not have, or a gold that is trained on.

    Args:
        guards: the guards of a recipe.
        roles: the role of each reward, by its name.

    Raises:
        InputError: see above.
    """
    for guard in guards:
        if isinstance(guard, LimitGuard):
            continue
        for key, name in (("proxy", guard.proxy), ("gold", guard.gold)):
            if name not in roles and not (key == "proxy" and name == "reward"):
                raise InputError(
                    f"guard '{guard.name}': {key} names the reward '{name}', which the recipe does "
                    f"not have; {_nearest(name, roles)}"
                )
        if roles[guard.gold] != "metric":
            raise InputError(
                f"guard '{guard.name}': gold is the reward '{guard.gold}' with role "
                f"'{roles[guard.gold]}'; what is trained on is no gold, name one with role: metric"
            )


_ALARMS = "/alarms"
"""Key in the state that no guard's name can be."""
_WATCHED = ("type", "split", "proxy", "gold", "metric")
"""Settings that say what a guard sees."""


def _rule(guard: PartingGuard | LimitGuard) -> dict[str, Any]:
    return guard.model_dump(mode="json")


def _nothing_seen(guard: PartingGuard | LimitGuard) -> dict[str, Any]:
    return {"history": [], "missed": 0, "held": 0, "rule": _rule(guard)}


def _raise(alarm: Alarm, state: dict[str, Any]) -> None:
    state.setdefault(_ALARMS, []).append(list(alarm))
    ending = "; the run stops (action: stop)" if alarm.stop else ""
    logger.warning("guard '%s', step %d: %s%s", alarm.guard, alarm.step, alarm.reason, ending)


def _miss(
    guard: PartingGuard | LimitGuard, seen: dict[str, Any], metrics: Mapping[str, Any]
) -> None:
    seen["missed"] += 1
    if not seen["history"] and seen["missed"] >= guard.window:
        absent = next(name for name in guard.metrics if metrics.get(name) is None)
        raise InputError(
            f"guard '{guard.name}' watches the metric '{absent}', which this run does not log; "
            f"{_nearest(absent, metrics)}"
        )


def _nearest(wrong: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(sorted(known))}"


def _mean_of(reward: str) -> str:
    return "reward" if reward == "reward" else f"rewards/{reward}/mean"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _change(low: Sequence[float], high: Sequence[float]) -> float:
    """(mean of high - mean of low) in standard errors of that difference."""
    difference = _mean(high) - _mean(low)
    error = math.sqrt((statistics.variance(low) + statistics.variance(high)) / len(low))
    if error == 0.0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error
