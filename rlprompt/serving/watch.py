"""Rewards beside a server: scores for the playground, and the anytime monitor of served answers.

What the monitor promises is in docs/guarantees.md: while the rate of failures stays at or below the
limit, the probability that it ever alarms is at most delta. Which answers are scored is decided
before they are drawn.
"""

from __future__ import annotations

import logging
import math
import queue
import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlprompt.artifacts.certificate import CertifiedRisk
from rlprompt.certify.monitor import Monitor
from rlprompt.errors import InputError, choices, describe_error
from rlprompt.rewards.runner import RewardRunner
from rlprompt.serving.metrics import Metrics
from rlprompt.serving.shelf import ServedPrompt, Shelf
from rlprompt.types import Completion, Group, Message, Query

logger = logging.getLogger(__name__)

_MOST_WAITING = 1000


@dataclass(frozen=True)
class WatchSettings:
    """What is watched, and what an alarm does."""

    reward: str
    """Name of the reward."""
    limit: float | None = None
    """Rate that is promised; None = that of each prompt's certificate."""
    delta: float = 0.05
    """Probability of an alarm without a reason, ever."""
    share: float = 1.0
    """Share of the answers that are scored."""
    fails_above: float | None = None
    """A failure is a value above it."""
    fails_below: float | None = None
    """A failure is a value below it; with neither, the certificate's rule, or the value itself."""
    roll_back: bool = False
    """Whether an alarm moves the name back, or takes it away."""


@dataclass(frozen=True)
class Answered:
    """An answer that was served."""

    name: str
    """Of the prompt, as the request named it."""
    served: ServedPrompt
    messages: tuple[Message, ...]
    text: str
    token_ids: tuple[int, ...]


class Scorer:
    """The rewards that a server was started with; one call at a time."""

    def __init__(self, runner: RewardRunner) -> None:
        """Keep the rewards.

        Args:
            runner: the rewards.
        """
        self._runner = runner
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The names of the rewards."""
        return [each.name for each in self._runner.settings]

    def score(
        self, messages: Sequence[Message], text: str, token_ids: Sequence[int] = (0,)
    ) -> dict[str, float | None]:
        """Each reward's value of an answer; None where it says nothing.

        Args:
            messages: the conversation.
            text: the answer.
            token_ids: its tokens.

        Raises:
            InputError: a reward fails.
        """
        ids = tuple(token_ids) or (0,)
        completion = Completion(ids, (0.0,) * len(ids), text, True)
        group = Group(Query(tuple(messages)), (completion,))
        with self._lock:
            values = self._runner.score([group], step=0).values
        found = {name: float(each[0]) for name, each in values.items()}
        return {name: None if math.isnan(value) else value for name, value in found.items()}

    def close(self) -> None:
        """End the rewards' processes."""
        self._runner.close()


class Watch:
    """Scores a sample of the answers in a thread of its own, and acts on an alarm."""

    def __init__(
        self, scorer: Scorer, settings: WatchSettings, shelf: Shelf, metrics: Metrics
    ) -> None:
        """Start without answers.

        Args:
            scorer: the rewards.
            settings: what is watched.
            shelf: the prompts, which an alarm may move back.
            metrics: where scores and alarms are counted.

        Raises:
            InputError: there is no such reward, or a number is out of its range.
        """
        _check(settings, scorer.names)
        self._scorer, self._settings = scorer, settings
        self._shelf, self._metrics = shelf, metrics
        self._monitors: dict[tuple[str, str], Monitor] = {}
        self._unlimited: set[str] = set()
        self._waiting: queue.Queue[Answered | None] = queue.Queue(_MOST_WAITING)
        self._random = random.Random()
        self._thread = threading.Thread(target=self._run, name="rlprompt-watch", daemon=True)
        self._thread.start()

    def wants(self) -> bool:
        """Whether the answer to a request that has just come will be scored."""
        return self._random.random() < self._settings.share

    def offer(self, answered: Answered) -> None:
        """Score an answer some time, or leave it out where too many wait."""
        try:
            self._waiting.put_nowait(answered)
        except queue.Full:
            self._metrics.add("rlprompt_monitor_left_out_total")

    def close(self) -> None:
        """Score what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (answered := self._waiting.get()) is not None:
            try:
                self._observe(answered)
            except Exception as error:
                logger.error("an answer could not be watched: %s", describe_error(error))

    def _observe(self, answered: Answered) -> None:
        risk = _certified(answered.served, self._settings.reward)
        limit = self._limit(answered)
        if limit is None:
            return
        key = (answered.name, answered.served.hash)
        monitor = self._monitors.setdefault(key, Monitor(limit, self._settings.delta))
        already = monitor.alarmed_at is not None
        monitor.observe(self._loss(answered, risk))
        self._metrics.add("rlprompt_monitor_scored_total", prompt=answered.name)
        if monitor.alarmed_at is not None and not already:
            self._alarm(answered, monitor)

    def _limit(self, answered: Answered) -> float | None:
        certificate = answered.served.certificate
        if self._settings.limit is not None:
            return self._settings.limit
        if certificate is not None and _certified(answered.served, self._settings.reward):
            return certificate.alpha
        if answered.served.hash not in self._unlimited:
            self._unlimited.add(answered.served.hash)
            logger.warning(
                "'%s' is not watched: it has no certificate for %s, and --monitor-limit is not set",
                answered.name,
                self._settings.reward,
            )
        return None

    def _loss(self, answered: Answered, risk: CertifiedRisk | None) -> float:
        """1 for a failure; an answer that the reward cannot score counts as one."""
        try:
            scores = self._scorer.score(answered.messages, answered.text, answered.token_ids)
        except InputError as error:
            logger.warning("the watched reward failed, which counts as a failure: %s", error)
            return 1.0
        value = scores[self._settings.reward]
        if value is None:
            return 1.0
        above, below = self._settings.fails_above, self._settings.fails_below
        if above is None and below is None and risk is not None:
            above = risk.threshold if risk.rule == "above" else None
            below = risk.threshold if risk.rule == "below" else None
        if above is not None:
            return float(value > above)
        if below is not None:
            return float(value < below)
        if not 0.0 <= value <= 1.0:
            logger.warning("a loss of %g is not in [0, 1] and counts as 1", value)
            return 1.0
        return value

    def _alarm(self, answered: Answered, monitor: Monitor) -> None:
        self._metrics.set("rlprompt_monitor_alarm", 1.0, prompt=answered.name)
        logger.error(
            "ALARM: the rate of failures of '%s' (%s) in %s is above %g, after %d answers",
            answered.name,
            answered.served.hash[:12],
            self._settings.reward,
            monitor.limit,
            monitor.alarmed_at,
        )
        if not self._settings.roll_back:
            return
        if answered.served.hash not in [each.hash for each in self._shelf.served(answered.name)]:
            logger.error("'%s' stands for another prompt already", answered.name)
            return
        why = f"monitor: {self._settings.reward} above {monitor.limit:g}"
        name = self._shelf.name_of(answered.name)
        logger.error("'%s': %s", name, self._shelf.roll_back(name, why))


def _check(settings: WatchSettings, names: Sequence[str]) -> None:
    if settings.reward not in names:
        raise InputError(
            f"--monitor names the reward '{settings.reward}', which no --reward gives; "
            f"{choices(settings.reward, names)}"
        )
    ranges: Mapping[str, tuple[float | None, bool]] = {
        "limit": (settings.limit, True),
        "delta": (settings.delta, True),
        "share": (settings.share, False),
    }
    for name, (value, is_open) in ranges.items():
        if value is not None and not (0.0 < value < 1.0 or (value == 1.0 and not is_open)):
            end = "below 1" if is_open else "at most 1"
            raise InputError(f"--monitor-{name} is {value:g}; choose it above 0 and {end}")
    if settings.fails_above is not None and settings.fails_below is not None:
        raise InputError("--fails-above and --fails-below contradict each other; give one")


def _certified(served: ServedPrompt, reward: str) -> CertifiedRisk | None:
    certificate = served.certificate
    risks = () if certificate is None else certificate.risks
    return next((risk for risk in risks if risk.name == reward), None)
