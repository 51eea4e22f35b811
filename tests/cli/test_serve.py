"""`rlprompt serve` on the command line: what it refuses, and a whole life of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt
from tests.fixtures.server import save, tiny_policy
from tests.fixtures.tiny import save_tiny

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


@pytest.mark.slow
def test_it_serves_until_sigterm_and_ends_with_0(artifact: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    command = [sys.executable, "-m", "rlprompt", "serve", f"mine={artifact}", "--model", str(model)]
    command += ["--port", "0", "--dtype", "float32", "--force"]
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
        url = line.rsplit(" at ", 1)[1].strip()
        with urllib.request.urlopen(f"{url}/models", timeout=120) as got:
            assert [each["id"] for each in json.load(got)["data"]] == ["model", "model@mine"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
