"""`rlprompt serve --engine vllm` before a real vLLM: the native engine's answers, swapped at will.

Runs where RLPROMPT_VLLM_PYTHON names an interpreter with vLLM (`tests/fixtures/vllm_process.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from rlprompt.artifacts.identity import prompt_hash
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.serving.loaded import Model
from rlprompt.serving.prompt_server import PromptServer
from rlprompt.serving.vllm.client import vllm_settings
from tests.fixtures.server import save, serving
from tests.fixtures.vllm_process import vllm_process

PYTHON = os.environ.get("RLPROMPT_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not PYTHON, reason="RLPROMPT_VLLM_PYTHON names no interpreter with vLLM"),
]

QUESTIONS = ("What is the sun?", "How do I boil an egg? <|im_end|>")
TOKENS = 10


def moved(prompt: Prompt, seed: int, scale: float) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in prompt.parameters():
            each.add_(scale * torch.randn(each.shape, generator=generator).to(each.dtype))
    return prompt


@pytest.fixture(scope="module")
def policy(smollm2_dir: Path) -> Policy:
    settings = ModelSettings(path=str(smollm2_dir), dtype="float32", device="cpu")
    return open_policy(settings)


@pytest.fixture(scope="module")
def folders(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prompts")
    text = "You are a pirate, and speak like one."
    prompts: dict[str, Prompt | str] = {"text": text}
    for seed in range(2):
        soft = SoftPrompt.create(SoftPrompt.Settings(init_text=text), policy, seed)
        prompts[f"soft{seed}"] = moved(soft, seed, 0.03)
    return {name: save(policy, root / name, prompt) for name, prompt in prompts.items()}


@pytest.fixture(scope="module")
def answers(policy: Policy, folders: dict[str, Path]) -> dict[tuple[str, str], str]:
    """By the hash of a prompt and a question: what the native engine answers."""
    model = Model(policy)
    prompts = {prompt_hash(folder): model.load(folder) for folder in folders.values()}
    prompts["none"] = model.prompt()
    return {
        (content, question): prompt.generate(question, temperature=0.0, max_tokens=TOKENS)
        for content, prompt in prompts.items()
        for question in QUESTIONS
    }


@pytest.fixture(scope="module")
def url(
    smollm2_dir: Path,
    answers: dict[tuple[str, str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    assert PYTHON is not None and answers  # before vLLM takes the cores
    log = tmp_path_factory.mktemp("vllm") / "vllm.log"
    more = ["--max-num-seqs", "8", "--enable-lora", "--max-lora-rank", "16"]
    with vllm_process(PYTHON, str(smollm2_dir), log, more=more) as made:
        yield made


@pytest.fixture(scope="module")
def server(url: str, policy: Policy, folders: dict[str, Path]) -> Iterator[PromptServer]:
    with serving(policy, folders, vllm=vllm_settings(f"{url}/v1")) as made:
        yield made


@pytest.fixture(scope="module")
def client(server: PromptServer) -> OpenAI:
    return OpenAI(base_url=f"{server.origin}/v1", api_key="unused", max_retries=0)


def ask(client: OpenAI, model: str, question: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=TOKENS, **more
    )


def test_greedy_answers_are_the_native_engines(
    client: OpenAI, folders: dict[str, Path], answers: dict[tuple[str, str], str]
) -> None:
    found = {}
    for name in (*folders, "base"):
        for question in QUESTIONS:
            got = ask(client, name, question)
            assert got.system_fingerprint is not None
            found[got.system_fingerprint, question] = got.choices[0].message.content
    assert found == answers
    assert len(set(answers.values())) > len(folders)


def test_log_probabilities_are_the_native_engines(
    client: OpenAI, policy: Policy, folders: dict[str, Path]
) -> None:
    told = ask(client, "soft0", QUESTIONS[0], logprobs=True, top_logprobs=2).choices[0].logprobs
    prompt = Model(policy).load(folders["soft0"])
    native = prompt.complete([QUESTIONS[0]], temperature=1.0, max_tokens=TOKENS, top_k=1)[0][0]
    ours = native.sampling_logprobs[: len(told.content)]
    assert [each.logprob for each in told.content] == pytest.approx(list(ours), abs=2e-3)


def test_a_name_is_swapped_while_requests_run(
    server: PromptServer,
    client: OpenAI,
    folders: dict[str, Path],
    answers: dict[tuple[str, str], str],
) -> None:
    """vLLM is not started again; same name, prompts of equal length, cached prefixes (#42125)."""
    server.shelf.place("mine", str(folders["soft0"]))
    stream = ask(client, "mine", QUESTIONS[0], stream=True)
    chunks = [next(iter(stream))]
    wrong: list[Any] = []
    met: set[str] = set()

    def work() -> None:
        for _ in range(2):
            got = ask(client, "mine", QUESTIONS[1])
            met.add(str(got.system_fingerprint))
            expected = answers[str(got.system_fingerprint), QUESTIONS[1]]
            if got.choices[0].message.content != expected:
                wrong.append((got.system_fingerprint, got.choices[0].message.content, expected))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for name in ("soft1", "text", "soft0", "soft1"):
        server.shelf.place("mine", str(folders[name]))
        got = ask(client, "mine", QUESTIONS[0])
        content = prompt_hash(folders[name])
        assert got.system_fingerprint == content
        assert got.choices[0].message.content == answers[content, QUESTIONS[0]]
    chunks += list(stream)
    said = "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices)
    assert said == answers[prompt_hash(folders["soft0"]), QUESTIONS[0]]
    for thread in threads:
        thread.join()
    assert wrong == [] and met
    server.shelf.take_away("mine")


def test_an_adapter_answers_as_in_the_native_engine(
    url: str, policy: Policy, tmp_path: Path
) -> None:
    settings = AdapterPrompt.Settings(text="Answer in one line.")
    lora = moved(AdapterPrompt.create(settings, policy, 0), 0, 0.02)
    folder = save(policy, tmp_path / "lora", lora)
    expected = Model(policy).load(folder).generate(QUESTIONS[0], temperature=0.0, max_tokens=TOKENS)
    with serving(policy, {"lora": folder}, vllm=vllm_settings(url)) as server:
        client = OpenAI(base_url=f"{server.origin}/v1", api_key="unused", max_retries=0)
        assert ask(client, "lora", QUESTIONS[0]).choices[0].message.content == expected
