"""How servers are reached: wrong addresses, files, proxies and hosts; and what is kept secret."""

from __future__ import annotations

import asyncio
import datetime
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlprompt.endpoints.addresses import without_secrets
from rlprompt.errors import InputError
from rlprompt.rewards import RewardBatch, RewardSettings, build_rewards
from rlprompt.rewards.models.http_client import (
    HttpSettings,
    JsonClient,
    together,
)
from rlprompt.types import Completion, Group, Query
from tests.fixtures.http_server import Answer, Seen, answering

TOKEN = "tok-4f9a77b1c2d3e4f5-a/b+c=="
ONCE = {"retries": 0, "request_timeout": 5.0}
BOTH = pytest.mark.parametrize("kind", ["http", "openai_judge"])


def score(kind: str, tmp_path: Path, row: dict[str, Any] | None = None, **given: Any) -> Any:
    own = {"model": "m", "rubric": "Is it good?"} if kind == "openai_judge" else {}
    settings = RewardSettings(
        path=f"builtin:{kind}", name="r", on_error="skip", options=own | ONCE | given
    )
    runner = build_rewards([settings], tmp_path)
    query = Query(({"role": "user", "content": "one?"},), row or {})
    group = Group(query, tuple(Completion((2,), (0.0,), text, True) for text in ("a", "bb")))
    try:
        return runner.score([group], step=0)
    finally:
        runner.close()


def failure(batch: RewardBatch) -> str:
    (found,) = batch.errors
    assert "\n" not in found.message
    assert "TaskGroup" not in found.message
    assert found.message.startswith("reward 'r' ")
    return found.message


@BOTH
@pytest.mark.parametrize(
    "url",
    [
        "http://host:99999/x",
        "http://host:0/x",
        "http://host:-1/x",
        "http://host:port/x",
        "http://ho\nst/x",
        "http://host/x\n",
        "http://host/\tx",
        "http://ho st/x",
        "http://host/\x00",
        "http://[::1/x",
        "http://[nonsense]/x",
        "http:///x",
        "http://",
        "//host/x",
        "host:8000",
        "",
        "ftp://host/x",
        "http://" + "a" * 70 + ".org/x",
        "http://exa..mple/x",
        "file:///etc/passwd",
    ],
    ids=lambda url: repr(url)[:30],
)
def test_what_is_no_address_is_refused_before_the_run(kind: str, tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError, match=r"^reward 'r': .*url .*write http\(s\)://") as caught:
        score(kind, tmp_path, url=url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://me:pass-word@h:port/x?key=hid-den", "ftp://h/?key=hid-den"]
)
def test_a_wrong_address_is_quoted_without_what_is_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(InputError) as caught:
        score("http", tmp_path, url=url)
    assert "hid-den" not in str(caught.value) and "pass-word" not in str(caught.value)


@BOTH
def test_a_host_that_is_not_there_is_one_sentence(kind: str, tmp_path: Path) -> None:
    with_port = score(kind, tmp_path, url="http://127.0.0.1:9/x")
    assert "got no answer from http://127.0.0.1:9/x" in failure(with_port)
    unknown = score(kind, tmp_path, url="http://no-such-host.invalid/x")
    assert "got no answer from http://no-such-host.invalid/x" in failure(unknown)


@BOTH
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        (b"", "cannot be read as certificates"),
        (b"no certificate", "cannot be read as certificates"),
        (b"\xff\xfe\x00", "cannot be read as certificates"),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "cannot be read as certificates",
        ),
        ("folder", "is no file"),
        ("unreadable", "cannot be read as certificates"),
    ],
    ids=["missing", "empty", "text", "bytes", "damaged", "folder", "unreadable"],
)
def test_a_ca_file_that_is_none_is_refused_before_the_run(
    kind: str, tmp_path: Path, content: bytes | str | None, sentence: str
) -> None:
    file = tmp_path / "ca.pem"
    if content == "folder":
        file.mkdir()
    elif content == "unreadable":
        file.symlink_to("/proc/self/mem")  # there, a file, and refused even to root
    elif isinstance(content, bytes):
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"^reward 'r': ca_file .*{sentence}"):
        score(kind, tmp_path, url="https://h/x", ca_file=str(file))


@BOTH
def test_a_server_without_tls_is_one_sentence(kind: str, tmp_path: Path) -> None:
    with answering(lambda seen: Answer({})) as (url, _):
        said = failure(score(kind, tmp_path, url=url.replace("http://", "https://")))
    assert re.search("cannot verify the certificate|got no answer", said)


@BOTH
@pytest.mark.parametrize(
    "proxy", ["nonsense://x", "http://[::1", "socks5://127.0.0.1:9", "http://"]
)
def test_a_wrong_proxy_is_one_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    failure(score(kind, tmp_path, url="http://server.invalid/x"))


def by_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, host: str) -> list[Seen]:
    """What a proxy of the environment has seen of a call to a host."""
    with answering(lambda seen: Answer({"rewards": [1.0, 2.0]})) as (url, seen):
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        score("http", tmp_path, url=f"http://{host}:9/score")
        return seen


def test_the_jobs_own_server_and_this_machine_are_asked_without_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SERVER", "192.0.2.7")
    assert len(by_proxy(monkeypatch, tmp_path, "192.0.2.7")) == 1  # no job: just any address
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for own in ("192.0.2.7", "localhost", "127.0.0.1"):
        assert by_proxy(monkeypatch, tmp_path, own) == []
    assert len(by_proxy(monkeypatch, tmp_path, "192.0.2.8")) == 1


def test_the_jobs_script_keeps_every_client_from_the_proxy() -> None:
    text = (Path(__file__).parents[3] / "slurm" / "server.sh").read_text()
    lines = [line for line in text.splitlines() if "proxy" in line.lower() and line[0] != "#"]
    for before, server, after in (
        ({}, "10.0.0.1", "10.0.0.1,n1"),
        ({"NO_PROXY": "a"}, "10.0.0.1", "a,10.0.0.1,n1"),
        ({"no_proxy": "b"}, "fd00::1", "b,fd00::1,n1,[fd00::1]"),
    ):
        given = [f"SERVER={server}", "SERVER_NODE=n1"]
        shown = subprocess.run(
            ["bash", "-uc", "\n".join([*given, *lines, 'echo "$no_proxy $NO_PROXY"'])],
            env={"PATH": "/usr/bin:/bin", **before},
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.split() == [after, after]


@BOTH
@pytest.mark.parametrize("status", [200, 401, 404, 503])
@pytest.mark.parametrize("form", ["whole", "bearer", "header", "cut", "json", "quoted"])
def test_a_token_that_the_server_says_back_is_left_out(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    form: str,
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)

    def reply(seen: Seen) -> Answer:
        given = seen.headers["Authorization"]
        text = {
            "whole": given.removeprefix("Bearer "),
            "bearer": f"who is {given}?",
            "header": f"Authorization: {given}",
            "cut": f"...{given[-14:]} and {given[7:17]}...",
            "json": given.replace("/", "\\/"),
            "quoted": given.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D"),
        }[form]
        return Answer({"error": text}, status)

    caplog.set_level("DEBUG", logger="rlprompt")
    with answering(reply) as (url, _):
        given: dict[str, Any] = {"url": f"{url}/x?key=hid-den-key", "token_env": "MY_TOKEN"}
        said = failure(score(kind, tmp_path, **given | {"retries": 1, "backoff": 0.01}))
    for text in (said, caplog.text):
        assert "hid-den" not in text
        pieces = [TOKEN[at : at + 8] for at in range(len(TOKEN) - 7)]
        assert not [piece for piece in pieces if piece in text]


def test_secrets_are_taken_out_in_every_form_and_nothing_else() -> None:
    assert without_secrets("nothing here", ["", "secret"]) == "nothing here"
    assert without_secrets("a secret b", ["secret"]) == "a [secret] b"
    assert without_secrets("0123456789", ["0123456789ab"]) == "[secret]"
    assert without_secrets("x 45678901 y", ["0123456789012"]) == "x [secret] y"
    assert without_secrets("a%2Fb", ["a/b"]) == "[secret]"
    assert without_secrets("pass", ["password1"]) == "pass"


@pytest.mark.parametrize(
    "value",
    [datetime.date(2024, 1, 1), float("nan"), {1, 2}, b"x", object()],
    ids=["date", "nan", "set", "bytes", "object"],
)
def test_a_column_that_json_has_no_form_for_is_named(tmp_path: Path, value: Any) -> None:
    with (
        answering(lambda seen: Answer({"rewards": [1.0, 2.0]})) as (url, _),
        pytest.raises(InputError, match=r"^reward 'r': the batch cannot be sent to .* as JSON"),
    ):
        score("http", tmp_path, {"label": value}, url=url, columns=["label"])


def test_the_first_failure_is_raised_as_itself() -> None:
    async def fails(error: BaseException) -> int:
        raise error

    async def waits() -> int:
        await asyncio.sleep(60)
        return 1

    with pytest.raises(KeyError, match="x"):
        asyncio.run(together([waits(), fails(KeyError("x")), waits()]))
    nested = ExceptionGroup("outer", [ExceptionGroup("inner", [OSError("deep")])])
    with pytest.raises(OSError, match="deep"):
        asyncio.run(together([fails(nested)]))

    async def gives(value: int) -> int:
        return value

    assert asyncio.run(together(gives(value) for value in (3, 1, 2))) == [3, 1, 2]


def test_a_group_of_errors_in_a_users_reward_is_told_by_its_first(tmp_path: Path) -> None:
    (tmp_path / "grouped.py").write_text(
        "import asyncio\n"
        "async def one(text):\n    raise LookupError('no such word')\n"
        "async def reward(completions, **kwargs):\n"
        "    async with asyncio.TaskGroup() as group:\n"
        "        tasks = [group.create_task(one(text)) for text in completions]\n"
    )
    for isolation in (None, {"memory_gb": 1.0}):
        given = {"path": "grouped.py:reward", "name": "r", "on_error": "skip"}
        settings = RewardSettings.model_validate(given | {"isolation": isolation})
        runner = build_rewards([settings], tmp_path)
        query = Query(({"role": "user", "content": "one?"},), {})
        group = Group(query, (Completion((2,), (0.0,), "a", True),))
        said = failure(runner.score([group], step=0))
        runner.close()
        assert "raised LookupError: no such word" in said
        assert "grouped.py:3 (raise LookupError" in said


def test_the_address_is_shown_as_it_is_asked() -> None:
    shown = {
        "http://h/x?key=abcd": "http://h/x",
        "https://h:8443/": "https://h:8443/",
        "http://[::1]:80/x#y": "http://[::1]:80/x",
    }
    for url, expected in shown.items():
        assert JsonClient(HttpSettings(url=url)).shown == expected


@pytest.mark.parametrize("header", ["X Key", "X:Key", "", "X\nKey"])
def test_a_token_header_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with pytest.raises(InputError, match="is no name of a header"):
        score("http", tmp_path, url="https://h/x", token_env="MY_TOKEN", token_header=header)
