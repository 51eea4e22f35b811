"""Artifacts from a stranger: what is wrong with them is one sentence, and nothing waits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fuzzing.folders import INVALID_JSON, INVALID_TENSORS
from rlprompt.artifacts.format import load_artifact, save_artifact
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.make import make_prompt
from rlprompt.prompts.text import TextPrompt
from tests.fixtures.runs import tiny_policy


@pytest.fixture
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture
def soft(policy: Policy, tmp_path: Path) -> Path:
    folder = tmp_path / "soft"
    save_artifact(folder, policy, policy.prompt, name="n", recipe={}, metrics={})
    return folder


def refused(folder: Path, policy: Policy) -> str:
    with pytest.raises(InputError) as caught:
        load_artifact(folder, policy)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 1500
    return text


@pytest.mark.parametrize("name", sorted(INVALID_TENSORS))
def test_tensors_are_refused(policy: Policy, soft: Path, name: str) -> None:
    (soft / "prompt.safetensors").write_bytes(INVALID_TENSORS[name])
    refused(soft, policy)


@pytest.mark.parametrize("name", sorted(INVALID_JSON))
def test_descriptions_are_refused(policy: Policy, soft: Path, name: str) -> None:
    (soft / "prompt.json").write_bytes(INVALID_JSON[name])
    assert "prompt.json" in refused(soft, policy)


@pytest.mark.parametrize("name", ["prompt.json", "prompt.safetensors"])
def test_a_pipe_is_not_waited_for(policy: Policy, soft: Path, name: str) -> None:
    (soft / name).unlink()
    os.mkfifo(soft / name)
    assert "named pipe" in refused(soft, policy)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
def test_a_soft_prompt_is_of_floats(policy: Policy, soft: Path, dtype: torch.dtype) -> None:
    shape = policy.prompt.state_dict()["embeddings"].shape
    save_file({"embeddings": torch.ones(shape, dtype=dtype)}, soft / "prompt.safetensors")
    assert "is of the type" in refused(soft, policy)


@pytest.mark.parametrize("value", [3e38, 1e20, float("inf"), float("nan")], ids=str)
def test_values_must_stay_finite_on_the_base(policy: Policy, soft: Path, value: float) -> None:
    embeddings = policy.prompt.state_dict()["embeddings"]
    embeddings[0, 0] = value
    save_file({"embeddings": embeddings}, soft / "prompt.safetensors")
    assert "finite" in refused(soft, policy)


def test_values_must_stay_finite_in_the_dtype_of_the_base(tmp_path: Path) -> None:
    policy = tiny_policy(dtype=torch.float16)
    save_artifact(tmp_path / "a", policy, policy.prompt, name="n", recipe={}, metrics={})
    embeddings = policy.prompt.state_dict()["embeddings"].float()
    embeddings[0, 0] = 1e5
    save_file({"embeddings": embeddings}, tmp_path / "a" / "prompt.safetensors")
    assert "torch.float16" in refused(tmp_path / "a", policy)


def test_a_text_longer_than_the_base_is_refused_before_it_is_computed(
    policy: Policy, tmp_path: Path
) -> None:
    folder = tmp_path / "text"
    save_artifact(folder, policy, TextPrompt("rain"), name="n", recipe={}, metrics={})
    info = json.loads((folder / "prompt.json").read_text())
    info["init_text"] = "the rain and the sun " * 5000
    (folder / "prompt.json").write_text(json.dumps(info))
    assert "has 512" in refused(folder, policy)


CONFIGS: dict[str, Callable[[dict[str, object]], object]] = {
    "no rank": lambda c: c.pop("r"),
    "no alpha": lambda c: c.pop("lora_alpha"),
    "a rank of text": lambda c: c.update(r="8"),
    "a true rank": lambda c: c.update(r=True),
    "a rank below 1": lambda c: c.update(r=0),
    "another rank": lambda c: c.update(r=3),
    "an alpha below 0": lambda c: c.update(lora_alpha=-1),
    "a bias": lambda c: c.update(bias="all"),
    "saved modules": lambda c: c.update(modules_to_save=["lm_head"]),
    "ranks by layer": lambda c: c.update(rank_pattern={"q_proj": 4}),
    "alphas by layer": lambda c: c.update(alpha_pattern={"q_proj": 4}),
    "another method": lambda c: c.update(peft_type="VERA"),
    "no method": lambda c: c.pop("peft_type"),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_an_adapter_says_what_it_needs(policy: Policy, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "adapter"
    prompt = make_prompt(AdapterSettings(), policy, 0, None)  # type: ignore[arg-type]
    save_artifact(folder, policy, prompt, name="n", recipe={}, metrics={})
    load_artifact(folder, policy)
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    CONFIGS[name](config)
    path.write_text(json.dumps(config))
    refused(folder, policy)
