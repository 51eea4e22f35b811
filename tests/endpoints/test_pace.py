"""When requests may begin: rate limits, waits between attempts, and what Retry-After says."""

from __future__ import annotations

import datetime
import email.utils
import itertools
import random

import pytest

from rlprompt.endpoints.pace import Pace, backoff, retry_after


def beginnings(pace: Pace, tokens: list[int]) -> list[float]:
    """When attempts begin that are made as soon as they may be."""
    now, found = 0.0, []
    for each in tokens:
        now += pace.wait(now, each)
        assert pace.wait(now, each) == 0.0
        pace.begin(now, each)
        found.append(now)
    return found


def most_within_a_minute(times: list[float], weights: list[int]) -> int:
    """The slow and obvious count."""
    return max(
        sum(w for t, w in zip(times, weights, strict=True) if start <= t < start + 60.0)
        for start in times
    )


def test_requests_of_any_minute_are_limited() -> None:
    times = beginnings(Pace(3, None), [1] * 10)
    assert times == [0, 0, 0, 60, 60, 60, 120, 120, 120, 180]
    assert most_within_a_minute(times, [1] * 10) == 3


def test_tokens_of_any_minute_are_limited() -> None:
    chance = random.Random(0)
    tokens = [chance.randint(1, 60) for _ in range(60)]
    times = beginnings(Pace(None, 100), tokens)
    assert most_within_a_minute(times, tokens) <= 100
    assert times[-1] < 60.0 * sum(tokens) / 40  # and not much slower than it must be


def test_a_request_larger_than_a_minute_begins_when_the_minute_is_empty() -> None:
    assert beginnings(Pace(None, 100), [50, 500, 10]) == [0, 60, 120]


def test_what_an_attempt_has_really_taken_counts() -> None:
    pace = Pace(None, 100)
    entry = pace.begin(0.0, 100)
    assert pace.wait(1.0, 50) == 59.0
    pace.settle(entry, 10)
    assert pace.wait(1.0, 50) == 0.0


def test_without_limits_nothing_waits_but_for_a_server_that_says_so() -> None:
    pace = Pace(None, None)
    assert beginnings(pace, [10**9] * 3) == [0, 0, 0]
    pace.hold(7.0)
    pace.hold(5.0)
    assert pace.wait(1.0, 1) == 6.0


def test_waits_double_up_to_a_minute_and_are_spread() -> None:
    chance = random.Random(1)
    for attempt in itertools.chain(range(1, 12), (80, 10**6)):
        whole = min(60.0, 0.5 * 2.0 ** min(attempt - 1, 60))
        waits = [backoff(attempt, 0.5, chance) for _ in range(50)]
        assert all(0.5 * whole <= wait <= whole for wait in waits)
        assert len(set(waits)) > 40


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 0.5 ", 0.5),
        ("0", 0.0),
        ("-4", 0.0),
        (None, None),
        ("", None),
        ("soon", None),
        ("nan", None),
        ("inf", None),
        ("Wed, 99 Foo 2026 10:00:00 GMT", None),
    ],
)
def test_retry_after_in_seconds(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, 0.0) == seconds


def test_retry_after_as_a_date() -> None:
    now = datetime.datetime(2026, 11, 30, 10, 0, 0, tzinfo=datetime.UTC)
    later = email.utils.format_datetime(now + datetime.timedelta(seconds=90), usegmt=True)
    assert retry_after(later, now.timestamp()) == 90.0
    assert retry_after(later, now.timestamp() + 100.0) == 0.0
