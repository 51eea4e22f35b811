"""`rlprompt serve` on the command line: what it refuses, and a whole life of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlprompt.serving.loaded import Model
from tests.cli.runs import rlprompt
from tests.fixtures.server import save, tiny_policy
from tests.fixtures.tiny import save_tiny
from tests.fixtures.vllm_upstream import vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "mine"
    return save(tiny_policy(), folder, "Answer in one line.")


VLLM = ["a={artifact}", "--engine", "vllm", "--vllm-url"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing is to be served"),
        (["mine"], "write NAME=ARTIFACT"),
        (["mine=nowhere"], "holds no artifact"),
        (["mine=nowhere@prod"], "is no registry"),
        (["My Name={artifact}"], "cannot be used"),
        (["a={artifact}", "a={artifact}"], "two prompts are named 'a'"),
        (["a={artifact}", "--host", "0.0.0.0"], "give --keys"),
        (["a={artifact}", "--keys", "nowhere.json"], "cannot be read"),
        (["a={artifact}", "--rollback"], "--rollback has no effect without --monitor"),
        (["a={artifact}", "--fails-below", "0.5"], "--fails-below has no effect without"),
        (["a={artifact}", "--monitor", "x"], "--monitor has no effect without --reward"),
        (["a={artifact}", "--registry", "nowhere"], "'nowhere' is no registry"),
        (["a={artifact}", "--log-requests", "/nowhere/x"], "cannot be written to '/nowhere/x'"),
        (["a={artifact}", "--dtype", "int3"], "--dtype is 'int3'"),
        (["a={artifact}", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["a={artifact}", "--engine", "vlm"], "--engine is 'vlm'"),
        (["a={artifact}", "--engine", "vllm"], "add --vllm-url"),
        (["a={artifact}", "--vllm-url", "http://127.0.0.1:1"], "no effect without --engine vllm"),
        (["a={artifact}", "--vllm-wait", "5"], "--vllm-wait has no effect without"),
        ([*VLLM, "127.0.0.1:8000"], "is no address"),
        ([*VLLM, "http://me:secret@127.0.0.1:8000"], "use VLLM_API_KEY instead"),
        ([*VLLM, "http://gpu7:8000"], "let vLLM listen on 127.0.0.1, or use https"),
        ([*VLLM, "http://127.0.0.1:8000/v1?x=1"], "holds more than an address"),
    ],
)
def test_what_cannot_be_served_is_told_in_a_sentence(
    artifact: Path, arguments: list[str], sentence: str
) -> None:
    done = rlprompt("serve", *(each.format(artifact=artifact) for each in arguments))
    assert done.code == 2
    assert sentence in done.err
    assert done.err.count("\n") == 1


@contextmanager
def started(artifact: Path, model: Path, *more: str) -> Iterator[str]:
    """`rlprompt serve` in a process of its own, and its address; SIGTERM ends it with 0."""
    command = [sys.executable, "-m", "rlprompt", "serve", f"mine={artifact}", "--model", str(model)]
    command += ["--port", "0", "--dtype", "float32", "--force", *more]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving model, model@mine at http://127.0.0.1:"), line
        yield line.rsplit(" at ", 1)[1].strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_it_serves_until_sigterm_and_ends_with_0(artifact: Path, tmp_path: Path) -> None:
    with (
        started(artifact, save_tiny(tmp_path / "model")) as url,
        urllib.request.urlopen(f"{url}/models", timeout=120) as got,
    ):
        assert [each["id"] for each in json.load(got)["data"]] == ["model", "model@mine"]


@pytest.mark.slow
def test_it_serves_before_vllm(artifact: Path, tmp_path: Path) -> None:
    policy = tiny_policy()
    model = save_tiny(tmp_path / "model")
    question = {"model": "mine", "messages": [{"role": "user", "content": "the sea"}]}
    data = json.dumps({**question, "temperature": 0, "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json"}
    with (
        vllm(policy) as upstream,
        started(artifact, model, "--engine", "vllm", "--vllm-url", upstream.url) as url,
    ):
        request = urllib.request.Request(f"{url}/chat/completions", data, headers)
        with urllib.request.urlopen(request, timeout=120) as got:
            said = json.load(got)["choices"][0]["message"]["content"]
    prompt = Model(tiny_policy()).load(artifact)
    assert said == prompt.generate("the sea", temperature=0.0, max_tokens=8)
    assert len(upstream.completions) == 1
