"""`rlprompt reward serve`: the server, and a run that uses it as a reward."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.serving.http_server import Limits
from rlprompt.serving.reward_server import RewardServer, ServeOptions
from rlprompt.types import Completion, Group, Query
from tests.cli.runs import rlprompt

REWARD = """
import time
from pathlib import Path

def reward(prompts, completions, completion_ids, label=None, trainer_state=None, log_extra=None):
    assert isinstance(completions, list)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    if "slow" in texts:
        here, deadline = Path(__file__).parent, time.monotonic() + 60
        (here / "started").touch()
        while not (here / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    if "broken" in texts:
        raise ValueError("no number")
    if "nan" in texts:
        log_extra("shaky", [float("nan")] * len(texts))
    if "deep" in texts:
        nested = []
        for _ in range(100_000):
            nested = [nested]
        log_extra("deep", [nested] * len(texts))
    log_extra("steps", [trainer_state.global_step] * len(texts))
    return [None if t == "none" else len(t) + 10 * (label or [0] * len(texts))[i]
            for i, t in enumerate(texts)]
"""


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[RewardServer]:
    (folder / "mine.py").write_text(REWARD)
    runner = build_rewards([RewardSettings(path="mine.py:reward")], folder)
    with RewardServer(runner, ServeOptions(port=0, **options)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
            runner.close()


def post(server: RewardServer, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", "/score", data, headers)
    answer = connection.getresponse()
    status, text = answer.status, answer.read()
    connection.close()
    return status, json.loads(text)


def test_scores_strings_and_messages(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        request = {"prompts": ["q", "q", "r"], "completions": ["a", "bb", "none"], "step": 5}
        assert post(server, request) == (
            200,
            {"rewards": [1.0, 2.0, None], "extras": {"steps": [5, 5, 5]}, "metrics": {}},
        )
        message = [{"role": "user", "content": "q"}]
        request = {
            "prompts": [message],
            "completions": [[{"role": "assistant", "content": "abc"}]],
            "completion_ids": [[4, 5]],
            "columns": {"label": [2]},
        }
        assert post(server, request)[1]["rewards"] == [23.0]
        assert post(server, {"prompts": [], "completions": []})[1]["rewards"] == []


def test_a_run_gets_the_same_values_from_a_server_as_from_the_file(tmp_path: Path) -> None:
    query = Query(({"role": "user", "content": "one?"},), {"label": 1})
    group = Group(query, tuple(Completion((2,), (0.0,), t, True) for t in ("a", "none", "ccc")))
    with serving(tmp_path) as server:
        remote = {"url": server.url, "columns": ["label"]}
        runner = build_rewards(
            [
                RewardSettings(path="mine.py:reward", name="near"),
                RewardSettings(path="builtin:http", name="far", options=remote),
            ],
            tmp_path,
        )
        batch = runner.score([group], step=3)
        runner.close()
    assert batch.values["far"].nan_to_num(-1).tolist() == [11.0, -1.0, 13.0]
    assert batch.values["far"].equal(batch.values["near"]) or (
        batch.values["far"].nan_to_num(-1).equal(batch.values["near"].nan_to_num(-1))
    )
    assert batch.extras == {"steps": [3, 3, 3], "far.steps": [3, 3, 3]}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"{", 400, "the body is not JSON"),
        (b"[" * 100_000, 400, "the body is not JSON"),
        ([], 400, "the request is not an object"),
        ({"prompts": ["q"]}, 400, "completions is missing or not a list"),
        ({"prompts": ["q"], "completions": []}, 400, "completions has 0 entries for 1 prompts"),
        ({"prompts": [3], "completions": ["a"]}, 400, "neither a string nor a list of messages"),
        ({"prompts": ["q"], "completions": [3]}, 400, "neither a string nor a list of one"),
        ({"prompts": ["q"], "completions": ["a"], "queries": []}, 400, "unknown key 'queries'"),
        (
            {"prompts": ["q"], "completions": ["a"], "columns": {"prompts": [1]}},
            400,
            "reserved name",
        ),
        ({"prompts": ["q"], "completions": ["broken"]}, 500, "raised ValueError: no number at"),
        (b" " * 300_000, 413, "at most 200000 are read"),
    ],
)
def test_wrong_requests_get_a_sentence(
    tmp_path: Path, body: Any, status: int, sentence: str
) -> None:
    with serving(tmp_path, max_body_bytes=200_000) as server:
        found, answer = post(server, body)
        assert (found, sentence in answer["error"]) == (status, True), answer
        assert post(server, {"prompts": ["q"], "completions": ["a"]})[0] == 200


def test_a_reward_that_logs_what_json_has_not_is_answered_in_json(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        status, told = post(server, {"prompts": ["q"], "completions": ["nan"]})
        assert (status, told["extras"]["shaky"]) == (200, [None])
        status, told = post(server, {"prompts": ["q"], "completions": ["deep"]})
        assert status == 200  # cut at a depth that JSON and whoever reads it can take
        assert len(json.dumps(told)) < 1000


def test_a_stop_answers_what_is_in_progress(tmp_path: Path) -> None:
    request = {"prompts": ["q"], "completions": ["slow"]}
    answers = []
    with serving(tmp_path) as server:
        asking = threading.Thread(target=lambda: answers.append(post(server, request)))
        asking.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        threading.Timer(0.5, (tmp_path / "go").touch).start()
        server.shutdown()
        asking.join(10)
    assert [status for status, _ in answers] == [200]


def test_a_stop_does_not_wait_for_a_reward_for_ever(tmp_path: Path) -> None:
    request = {"prompts": ["q"], "completions": ["slow"]}
    answers = []
    with serving(tmp_path, limits=Limits(stop_seconds=1)) as server:
        asking = threading.Thread(target=lambda: answers.append(post(server, request)))
        asking.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.shutdown()
        asking.join(10)
        (tmp_path / "go").touch()
    assert answers == [(503, {"error": "the server is stopping; ask again"})]


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    request = {"prompts": ["q"], "completions": ["a"]}
    with serving(tmp_path, token="s3cret") as server:
        assert post(server, request)[0] == 401
        assert post(server, request, Authorization="Bearer s3cre")[0] == 401
        assert post(server, request, Authorization="Bearer s3cret")[0] == 200


def test_too_many_waiting_are_sent_away_and_the_client_comes_back(tmp_path: Path) -> None:
    request = {"prompts": ["q"], "completions": ["slow"]}
    with serving(tmp_path, max_waiting=1) as server:
        first = threading.Thread(target=post, args=(server, request))
        first.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert post(server, request)[0] == 503
        threading.Timer(0.3, (tmp_path / "go").touch).start()
        group = Group(
            Query(({"role": "user", "content": "q"},)), (Completion((2,), (0.0,), "a", True),)
        )
        options = {"url": server.url, "retries": 5, "backoff": 0.1}
        runner = build_rewards([RewardSettings(path="builtin:http", options=options)], tmp_path)
        assert runner.score([group], step=0).total.tolist() == [1.0]
        runner.close()
        first.join()


def test_tls_is_verified(tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    made = subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl to make a certificate")
    certificate.write_text((tmp_path / "cert.pem").read_text() + (tmp_path / "key.pem").read_text())
    group = Group(
        Query(({"role": "user", "content": "q"},)), (Completion((2,), (0.0,), "abc", True),)
    )
    with serving(tmp_path, certificate=certificate) as server:
        assert server.url.startswith("https://")
        for ca_file in (None, str(tmp_path / "cert.pem")):
            options = {"url": server.url, "ca_file": ca_file}
            settings = RewardSettings(path="builtin:http", on_error="skip", options=options)
            runner = build_rewards([settings], tmp_path)
            batch = runner.score([group], step=0)
            runner.close()
            if ca_file is None:
                assert "cannot verify the certificate" in batch.errors[0].message
            else:
                assert batch.total.tolist() == [3.0]


def test_an_address_in_use_is_refused(tmp_path: Path) -> None:
    with (
        serving(tmp_path) as server,
        pytest.raises(InputError, match="cannot listen on"),
    ):
        RewardServer(server.runner, ServeOptions(port=server.server_address[1]))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["builtin:sentence", "--host", "0.0.0.0"], "could call a server on 0.0.0.0 without a"),
        (["builtin:sentence", "--token-env", "UNSET_TOKEN"], "UNSET_TOKEN is not set"),
        (["builtin:sentense"], "did you mean 'sentence'"),
    ],
)
def test_the_command_refuses_what_is_unsafe_or_wrong(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNSET_TOKEN", raising=False)
    shown = rlprompt("reward", "serve", *arguments)
    assert shown.code == 2
    assert sentence in shown.err


def test_the_command_serves_until_a_signal(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from rlprompt.cli.main import main; main()",
            *("reward", "serve", "mine.py", "--isolate", "--port", str(port)),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert server.stdout is not None
    assert f"http://127.0.0.1:{port}/score" in server.stdout.readline()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    body = json.dumps({"prompts": ["q"], "completions": ["abc"]})
    connection.request("POST", "/score", body)
    assert json.loads(connection.getresponse().read())["rewards"] == [3.0]
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["reward"] == "mine"
    connection.close()
    server.send_signal(signal.SIGTERM)
    assert server.wait(20) == 0
    server.stdout.close()
