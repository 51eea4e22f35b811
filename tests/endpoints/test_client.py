"""How a model behind an endpoint is asked: faults, waits, keys, limits, and stop signals."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlprompt.endpoints.answers import Question
from rlprompt.endpoints.client import EndpointClient
from rlprompt.endpoints.ledger import BudgetSpentError, Ledger
from rlprompt.endpoints.pace import Clock
from rlprompt.endpoints.settings import BudgetSettings, EndpointSettings
from rlprompt.errors import InputError
from tests.fixtures.http_server import Answer, Seen, answering

SECRET = "key-4f9a77b1c2d3e4f5-abcdef"
GOOD = {
    "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 6, "completion_tokens": 4},
}


class Quick(Clock):
    """A clock that does not wait, and remembers what it was asked to."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.slept: list[float] = []

    def now(self) -> float:
        return self.time

    def date(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


def question(number: int = 0, text: str = "hello", tokens: int = 10) -> Question:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    return Question(body, f"0/{number}/0", tokens)


def client(url: str, ledger: Ledger | None = None, **settings: Any) -> EndpointClient:
    known = {"base_url": f"{url}/v1", "model": "m", "request_timeout": 20.0, "template_tokens": 0}
    return EndpointClient(EndpointSettings(**{**known, **settings}), ledger, Quick())


def slept(asked: EndpointClient) -> list[float]:
    clock = asked._clock
    assert isinstance(clock, Quick)
    return clock.slept


def in_turn(*answers: Answer) -> Callable[[Seen], Answer]:
    """The given answers, then good ones."""
    left = list(answers)
    return lambda seen: left.pop(0) if left else Answer(GOOD)


PASSING = {
    "429": Answer({"error": "slow down"}, status=429),
    "408": Answer({}, status=408),
    "409": Answer({}, status=409),
    "500": Answer("oops", status=500),
    "503": Answer(b"<html>", status=503),
    "599": Answer({}, status=599),
    "hang up": Answer(hang_up=True),
    "torn": Answer(json.dumps(GOOD).encode()[:40]),
    "no JSON": Answer(b"<html>hello</html>"),
    "bytes": Answer(b"\xff\xfe\x00"),
    "empty": Answer(b""),
    "no choices": Answer({"choices": []}),
    "null": Answer(None),
    "error with 200": Answer({"error": {"message": "overloaded", "code": 503}}),
    "deep": Answer(b"[" * 100_000),
}
FREE = ("429", "408", "409", "500", "503", "599", "error with 200")


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_asked_again(name: str) -> None:
    with answering(in_turn(PASSING[name], PASSING[name])) as (url, seen):
        asked = client(url)
        (answer,) = asked.ask([question()])
    assert answer.choices[0].text == "yes"
    assert len(seen) == 3
    assert [each.body for each in seen] == [question().body] * 3
    first, second = slept(asked)
    assert 0.25 <= first <= 0.5 <= second <= 1.0
    most = len("hello") + 16 + 10
    paid = 10 + (0 if name in FREE else 2 * most)
    assert asked.ledger.spent.tokens == paid
    assert asked.ledger.requests == 3


def test_a_time_out_may_pass_and_may_be_billed() -> None:
    with answering(in_turn(Answer(GOOD, delay=1.0))) as (url, _):
        asked = client(url, request_timeout=0.3, retries=20)
        (answer,) = asked.ask([question()])
    assert answer.choices[0].text == "yes"
    assert asked.ledger.lost.tokens >= 31


def test_an_unusable_answer_with_a_usage_is_billed_by_it() -> None:
    with answering(in_turn(Answer({**GOOD, "choices": []}))) as (url, _):
        asked = client(url)
        asked.ask([question()])
    assert (asked.ledger.spent.tokens, asked.ledger.lost.tokens) == (20, 10)


@pytest.mark.parametrize(("status", "after", "wait"), [(429, "7", 7.0), (503, "0.25", 0.25)])
def test_a_server_that_says_when_is_believed(status: int, after: str, wait: float) -> None:
    busy = Answer({}, status=status, headers={"Retry-After": after})
    with answering(in_turn(busy)) as (url, _):
        asked = client(url)
        asked.ask([question()])
    assert slept(asked) == [wait]


def test_a_date_in_retry_after_is_believed() -> None:
    date = "Thu, 01 Jan 1970 00:16:50 GMT"  # ten seconds after the clock's 1000
    busy = Answer({}, status=429, headers={"Retry-After": date})
    with answering(in_turn(busy)) as (url, _):
        asked = client(url)
        asked.ask([question()])
    assert slept(asked) == [10.0]


def test_a_wait_beyond_the_deadline_ends_it() -> None:
    busy = Answer({}, status=429, headers={"Retry-After": "3600"})
    told = r"3600 s more are longer than engine\.deadline"
    with answering(in_turn(busy)) as (url, seen), pytest.raises(InputError, match=told):
        client(url).ask([question()])
    assert len(seen) == 1


def test_retries_end() -> None:
    down, told = Answer("down", status=502), r"status 502 \(\"down\"\), 3 times; .*--resume"
    with answering(lambda _: down) as (url, seen), pytest.raises(InputError, match=told):
        client(url, retries=2).ask([question()])
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Answer({"error": "bad key"}, status=401), r"bad key.*engine\.api_key \(\$\{EP_KEY\}\)"),
        (Answer({"error": "no"}, status=403), r"engine\.api_key \(\$\{EP_KEY\}\)"),
        (Answer({"error": "no model"}, status=404), r"engine\.base_url, which mostly ends in /v1"),
        (Answer({"error": "max_tokens"}, status=400), r"max_tokens.*engine or sampling"),
        (Answer({}, status=422), r"status 422"),
        (Answer({}, status=301, headers={"Location": "http://other/"}), r"redirects are not fo"),
        (Answer({"error": {"code": "insufficient_quota"}}, status=429), r"pay in more"),
        (Answer({"error": {"message": "bad", "code": 400}}), r"status 400"),
    ],
    ids=["401", "403", "404", "400", "422", "301", "quota", "400 with 200"],
)
def test_what_the_user_must_mend_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, answer: Answer, sentence: str
) -> None:
    monkeypatch.setenv("EP_KEY", SECRET)
    with answering(lambda _: answer) as (url, seen):
        asked = client(url, api_key="${EP_KEY}", concurrency=1)
        with pytest.raises(InputError, match=sentence) as caught:
            asked.ask([question(number) for number in range(5)])
    assert len(seen) == 1
    assert asked.ledger.spent.tokens == 0
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_the_key_is_sent_and_never_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("EP_KEY", SECRET)
    caplog.set_level(logging.DEBUG, "rlprompt")

    def parrot(seen: Seen) -> Answer:
        return Answer({"error": {"message": f"you sent {seen.headers}"}}, status=500)

    with answering(parrot) as (url, seen):
        asked = client(url, Ledger(None, tmp_path), api_key="${EP_KEY}", retries=1)
        with pytest.raises(InputError) as caught:
            asked.ask([question()])
    assert seen[0].headers["Authorization"] == f"Bearer {SECRET}"
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    for text in (str(caught.value), caplog.text, written, repr(asked.settings)):
        assert SECRET not in text and SECRET[4:16] not in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"base_url": "127.0.0.1/v1"}, r"engine\.base_url .* is no address"),
        ({"base_url": "http://h/v1?key=1"}, r"behind the path"),
        ({"base_url": "http://me:pw@h/v1"}, r"use engine\.api_key instead"),
        ({"base_url": "${EP_NONE}"}, r"variable EP_NONE \(engine\.base_url\) is not set"),
        ({"api_key": "${EP_NONE}"}, r"variable EP_NONE \(engine\.api_key\) is not set"),
        ({"base_url": "http://example.com/v1", "api_key": "${EP_KEY}"}, r"unencrypted"),
        ({"api_key": "${EP_ODD}"}, r"holds characters that no header may"),
        ({"ca_file": "/no/such/file"}, r"does not exist"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_asked_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setenv("EP_KEY", SECRET)
    monkeypatch.setenv("EP_ODD", "a\u00e9\r\nb")
    monkeypatch.delenv("EP_NONE", raising=False)
    with pytest.raises(InputError, match=sentence) as caught:
        client("http://127.0.0.1:9", **settings)
    assert SECRET not in str(caught.value)


def test_the_address_may_be_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(lambda _: Answer(GOOD)) as (url, seen):
        monkeypatch.setenv("EP_URL", f"{url}/v1/")
        asked = client(url, base_url="${EP_URL}")
        asked.ask([question()])
    assert seen[0].path == "/v1/chat/completions"
    assert asked.shown == "${EP_URL}"


def test_nobody_there_costs_nothing() -> None:
    asked = client("http://127.0.0.1:9", retries=2)
    with pytest.raises(InputError, match=r"no answer from http://127\.0\.0\.1:9/v1"):
        asked.ask([question()])
    assert asked.ledger.spent.tokens == 0


def test_an_answer_that_is_too_large_is_not_read_twice() -> None:
    large, told = Answer(b"x" * 200_000), r"more than 0\.1 MB \(engine\.max_response_mb\)"
    with answering(lambda _: large) as (url, seen), pytest.raises(InputError, match=told):
        client(url, max_response_mb=0.1).ask([question()])
    assert len(seen) == 1


def test_so_many_are_asked_at_a_time() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def reply(_: Seen) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return Answer(GOOD)

    with answering(reply) as (url, seen):
        answers = client(url, concurrency=3).ask([question(n) for n in range(12)])
    assert len(answers) == len(seen) == 12
    assert most[0] == 3


def test_equal_questions_are_paid_for_once(tmp_path: Path) -> None:
    with answering(lambda _: Answer(GOOD)) as (url, seen):
        ledger = Ledger(None, tmp_path)
        asked = client(url, ledger)
        answers = asked.ask([question(0), question(1), question(0)])
        assert len(answers) == 3 and len(seen) == 2
        asked.ask([question(1)])
        client(url, Ledger(None, tmp_path)).ask([question(0), question(1)])
    assert len(seen) == 2


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("limit", [30, 31, 40, 41, 100])
def test_a_budget_is_never_exceeded_and_pays_for_the_same_requests(
    tmp_path: Path, concurrency: int, limit: int
) -> None:
    """Each can cost 31 at most and costs 10: one begins while 31 of the limit are left."""
    ledger = Ledger(BudgetSettings(max_tokens=limit), tmp_path)
    expected = max(0, (limit - 31) // 10 + 1)
    with answering(lambda _: Answer(GOOD)) as (url, seen):
        asked = client(url, ledger, concurrency=concurrency)
        with pytest.raises(BudgetSpentError, match="may not fit"):
            asked.ask([question(number) for number in range(20)])
        assert len(seen) == expected
        assert ledger.spent.tokens == 10 * expected <= limit
        with pytest.raises(BudgetSpentError):
            asked.ask([question(number) for number in range(20)])
        assert len(seen) == expected
        if expected:
            assert len(asked.ask([question(number) for number in range(expected)])) == expected
        more = client(url, Ledger(BudgetSettings(max_tokens=10_000), tmp_path))
        assert len(more.ask([question(number) for number in range(20)])) == 20
        assert len(seen) == 20


def test_a_budget_in_money_ends_too() -> None:
    ledger = Ledger(BudgetSettings(max_cost=0.001))
    prices = {"price_in": 1.0, "price_out": 10.0}  # 121 millionths at most, 46 in the end
    with answering(lambda _: Answer(GOOD)) as (url, seen):
        asked = client(url, ledger, **prices)
        with pytest.raises(BudgetSpentError, match=r"0\.001"):
            asked.ask([question(number) for number in range(100)])
    assert float(ledger.spent.cost) == len(seen) * 46e-6
    assert len(seen) == (1000 - 121) // 46 + 1


def test_a_lost_answer_counts_for_the_budget() -> None:
    """Two attempts that may be billed leave no room for a third."""
    with answering(lambda _: Answer(b"{")) as (url, seen):
        ledger = Ledger(BudgetSettings(max_tokens=75))
        with pytest.raises(BudgetSpentError):
            client(url, ledger, concurrency=4).ask([question(0), question(1), question(2)])
    assert len(seen) == 2
    assert ledger.spent.tokens == 62


def test_a_server_without_usage_is_counted_at_its_most() -> None:
    with answering(lambda _: Answer({"choices": GOOD["choices"]})) as (url, seen):
        ledger = Ledger(BudgetSettings(max_tokens=100))
        with pytest.raises(BudgetSpentError):
            client(url, ledger).ask([question(number) for number in range(9)])
    assert (len(seen), ledger.spent.tokens) == (3, 93)


def test_a_server_that_takes_more_than_it_may_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = {"prompt_tokens": 1000, "completion_tokens": 4}
    with answering(lambda _: Answer({**GOOD, "usage": usage})) as (url, _):
        asked = client(url)
        asked.ask([question()])
    assert asked.ledger.spent.tokens == 1004
    assert "took 1004 tokens, which could be 31 at most" in caplog.text


def test_rate_limits_hold() -> None:
    with answering(lambda _: Answer(GOOD)) as (url, seen):
        asked = client(url, requests_per_minute=2)
        asked.ask([question(number) for number in range(5)])
    assert len(seen) == 5
    assert slept(asked) == [60.0, 60.0]


def test_it_works_inside_of_a_running_loop() -> None:
    async def within(url: str) -> str:
        return client(url).ask([question()])[0].choices[0].text

    with answering(lambda _: Answer(GOOD)) as (url, _):
        assert asyncio.run(within(url)) == "yes"


def test_a_stop_signal_waits_for_what_is_paid_for_and_begins_nothing(tmp_path: Path) -> None:
    class Stopped(KeyboardInterrupt):
        pass

    def stop(number: int, frame: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGUSR2, stop)

    def reply(_: Seen) -> Answer:
        if len(seen) == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR2)
        return Answer(GOOD, delay=0.5)

    try:
        with answering(reply) as (url, seen):
            asked = client(url, Ledger(None, tmp_path), concurrency=3)
            with pytest.raises(Stopped):
                asked.ask([question(number) for number in range(30)])
            assert len(seen) == 3
            assert asked.ledger.under_way == 0
            client(url, Ledger(None, tmp_path)).ask([question(number) for number in range(3)])
            assert len(seen) == 3
    finally:
        signal.signal(signal.SIGUSR2, before)
