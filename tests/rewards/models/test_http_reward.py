"""The HTTP reward against real local servers, good and bad."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import RewardBatch, RewardSettings, build_rewards
from rlprompt.types import Completion, Group, Query
from tests.fixtures.http_server import Answer, Seen, answering

FAST = {"backoff": 0.01, "retries": 2}


def score(tmp_path: Any, timeout: float = 20.0, **options: Any) -> RewardBatch:
    settings = RewardSettings(
        path="builtin:http", name="r", on_error="skip", timeout=timeout, options=options
    )
    runner = build_rewards([settings], tmp_path)
    query = Query(({"role": "user", "content": "one?"},), {"label": 1, "secret": 2})
    texts = ("a", "bb", "ccc")
    group = Group(query, tuple(Completion((2,), (0.0,), text, True) for text in texts))
    try:
        return runner.score([group], step=7)
    finally:
        runner.close()


def lengths(seen: Seen) -> Answer:
    texts = [each[0]["content"] for each in seen.body["completions"]]
    return Answer({"rewards": [len(text) for text in texts]})


def test_sends_what_is_named_and_returns_the_values(tmp_path: Any) -> None:
    with answering(lengths) as (url, seen):
        batch = score(tmp_path, url=f"{url}/score?key=x", columns=["label"])
    assert batch.total.tolist() == [1.0, 2.0, 3.0]
    (request,) = seen
    assert request.path == "/score?key=x"
    assert request.body == {
        "prompts": [[{"role": "user", "content": "one?"}]] * 3,
        "completions": [[{"role": "assistant", "content": t}] for t in ("a", "bb", "ccc")],
        "completion_ids": [[2]] * 3,
        "columns": {"label": [1, 1, 1]},
        "step": 7,
    }
    assert "Authorization" not in request.headers


def test_batches_are_put_together_in_order_whatever_order_they_come_in(tmp_path: Any) -> None:
    def reply(seen: Seen) -> Answer:
        texts = [each[0]["content"] for each in seen.body["completions"]]
        values = [None if text == "bb" else len(text) for text in texts]
        return Answer(
            {"rewards": values, "extras": {"texts": texts}, "metrics": {"n": len(texts)}},
            delay=0.2 if texts[0] == "a" else 0.0,
        )

    with answering(reply) as (url, seen):
        batch = score(tmp_path, url=url, batch_size=2)
    assert len(seen) == 2
    assert batch.total.nan_to_num(-1).tolist() == [1.0, -1.0, 3.0]
    assert batch.extras == {"texts": ["a", "bb", "ccc"]}
    assert batch.metrics["n"] == 1.5


def test_speaks_as_openrlhf_does(tmp_path: Any) -> None:
    def reply(seen: Seen) -> Answer:
        return Answer({"rewards": [len(text) for text in seen.body["query"]]})

    with answering(reply) as (url, seen):
        batch = score(tmp_path, url=url, protocol="openrlhf", label_column="label")
    assert batch.total.tolist() == [5.0, 6.0, 7.0]
    assert seen[0].body == {
        "query": ["one?a", "one?bb", "one?ccc"],
        "prompts": ["one?"] * 3,
        "labels": [1, 1, 1],
    }


def test_failures_that_may_pass_are_tried_again(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([Answer(b"busy", 503, {"Retry-After": "0"}), Answer(hang_up=True), None])

    def reply(seen: Seen) -> Answer:
        return next(answers) or lengths(seen)

    with answering(reply) as (url, seen):
        batch = score(tmp_path, url=url, **FAST)
    assert batch.total.tolist() == [1.0, 2.0, 3.0]
    assert len(seen) == 3
    assert "status 503 (busy); attempt 2 follows in 0.0 s" in caplog.text


@pytest.mark.parametrize(
    ("answer", "requests", "kind", "sentence"),
    [
        (Answer(b"oops", 500), 3, "exception", "status 500 (oops), 3 times"),
        (Answer({"rewards": []}, delay=3.0), 1, "exception", "nothing within 0.5 s"),
        (Answer(hang_up=True), 3, "exception", "no answer from http://127.0.0.1"),
        (Answer(b"who?", 401), 1, "exception", "refused by http://127.0.0.1"),
        (Answer(b"nothing here", 404), 1, "exception", "status 404 from"),
        (Answer(b"", 302, {"Location": "http://x"}), 1, "exception", "status 302 from"),
        (Answer(b"<html>hello"), 1, "exception", "that is not JSON (<html>hello)"),
        (Answer(b"[" * 100_000), 1, "exception", "that is not JSON"),
        (Answer([1, 2, 3]), 1, "values", "not a mapping with a list 'rewards'"),
        (Answer({"rewards": [1]}), 1, "values", "1 values for 3 completions"),
        (Answer({"rewards": [1, 2, "x"]}), 1, "values", "returned 'x' for completion 3 of 3"),
        (Answer(b'{"rewards": [1, 2, NaN]}'), 1, "values", "returned nan for completion 3 of 3"),
        (Answer(b" " * 200_000), 1, "exception", "got more than 0.1 MB"),
    ],
)
def test_a_bad_server_costs_one_batch_and_one_clear_line(
    tmp_path: Any, answer: Answer, requests: int, kind: str, sentence: str
) -> None:
    with answering(lambda seen: answer) as (url, seen):
        patience = {"request_timeout": 0.5, "retries": 0} if answer.delay else {}
        options = {"max_response_mb": 0.1} | FAST | patience
        batch = score(tmp_path, url=f"{url}/?token=secret", **options)
        assert len(seen) == requests
    (failure,) = batch.errors
    assert failure.kind == kind
    assert sentence in failure.message
    assert failure.message.startswith("reward 'r' ")
    assert "secret" not in failure.message
    assert "\n" not in failure.message


def test_a_server_that_is_not_there_and_a_batch_that_is_too_large(tmp_path: Any) -> None:
    with answering(lengths) as (url, _):
        (failure,) = score(tmp_path, url=url, max_request_mb=0.0001).errors
    assert "would send 0.0 MB to" in failure.message
    (failure,) = score(tmp_path, url=url, **FAST).errors
    assert "connection attempts failed, 3 times" in failure.message


def test_the_rewards_timeout_bounds_all_attempts(tmp_path: Any) -> None:
    began = time.monotonic()
    with answering(lambda seen: Answer(b"", 500)) as (url, _):
        (failure,) = score(tmp_path, timeout=0.3, url=url, retries=20, backoff=0.2).errors
    assert failure.kind == "timeout"
    assert time.monotonic() - began < 2.0


def test_the_token_comes_from_the_environment(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    with answering(lengths) as (url, seen):
        score(tmp_path, url=url, token_env="MY_TOKEN")
        score(tmp_path, url=url, token_env="MY_TOKEN", token_header="X-Key")
    assert seen[0].headers["Authorization"] == "Bearer s3cret"
    assert seen[1].headers["X-Key"] == "s3cret"
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "ftp://x"}, "is no address"),
        ({"url": "http://me:pw@x"}, "holds a user name or password"),
        ({"url": "https://x", "token_env": "UNSET_TOKEN"}, "UNSET_TOKEN .* is not set"),
        ({"url": "http://x", "token_env": "SET_TOKEN"}, "would go to http://x unencrypted"),
        ({"url": "https://x", "token_env": "BAD_TOKEN"}, "characters no header may"),
        ({"url": "https://x", "token_header": "X-Key"}, "no effect without token_env"),
        ({"url": "https://x", "ca_file": "missing.pem"}, "'missing.pem' does not exist"),
        ({"url": "https://x", "label_column": "a"}, "no effect with protocol: rlprompt"),
        ({"url": "https://x", "retry": 3}, "did you mean 'retries'"),
        ({"url": "https://x", "retries": -1}, "option 'retries' is wrong"),
    ],
)
def test_wrong_options_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    monkeypatch.setenv("SET_TOKEN", "s3cret")
    monkeypatch.setenv("BAD_TOKEN", "s3\ncret")
    monkeypatch.delenv("UNSET_TOKEN", raising=False)
    with pytest.raises(InputError, match=sentence) as error:
        score(tmp_path, **options)
    assert "s3cret" not in str(error.value)


def test_a_missing_column_stops_the_run(tmp_path: Any) -> None:
    with answering(lengths) as (url, _), pytest.raises(InputError, match="no column 'lable'"):
        score(tmp_path, url=url, columns=["lable"])


def test_survives_pickling() -> None:
    from rlprompt.rewards.models.http_reward import ServerReward

    copy = pickle.loads(pickle.dumps(ServerReward(url="https://x/y", batch_size=3)))
    assert copy.settings.batch_size == 3
