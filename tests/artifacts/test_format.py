"""Artifacts: what is saved is what acts again, and only where it belongs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlprompt.artifacts.format import (
    SCHEMA_VERSION,
    load_artifact,
    read_artifact_info,
    save_artifact,
)
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import freeze
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Group
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.tiny import TEMPLATE, tiny_base, tiny_model, tiny_tokenizer


def trained(policy: Policy) -> Prompt:
    """The policy's prompt, moved away from its start."""
    with torch.no_grad():
        policy.parameters()[0].add_(0.1 * torch.randn_like(policy.parameters()[0]))
    return policy.prompt


def save(folder: Path, policy: Policy, prompt: Prompt, **metrics: Any) -> Path:
    save_artifact(folder, policy, prompt, name="n", recipe={"seed": 1}, metrics=metrics)
    return folder


def completions(policy: Policy, prompt: Prompt) -> tuple[Group, ...]:
    engine = NativeEngine(policy)
    engine.sync(prompt)
    return engine.generate(queries(3), 3, SamplingSettings(max_tokens=12), seed=3).groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_prompt_writes_what_the_saved_one_wrote(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    policy = tiny_policy(dtype=dtype)
    prompt = trained(policy)
    before = completions(policy, prompt)
    save(tmp_path / "a", policy, prompt)
    fresh = tiny_policy(dtype=dtype)
    loaded = load_artifact(tmp_path / "a", fresh)
    assert torch.equal(loaded.state_dict()["embeddings"], prompt.state_dict()["embeddings"])
    assert completions(fresh, loaded) == before
    assert completions(fresh, fresh.prompt) != before


def test_prompt_json_says_where_it_comes_from(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = save(tmp_path / "a", policy, policy.prompt, reward=0.5, unknown=math.nan)
    info = read_artifact_info(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "prompt.json",
        "prompt.safetensors",
    ]
    assert (info.schema_version, info.representation, info.num_virtual_tokens) == (3, "soft", 6)
    assert info.base == "tiny-llama" and info.base_fingerprint == policy.base.fingerprint
    assert info.template_hash == policy.slot.template_hash
    assert info.init_text == "You are " and info.recipe == {"seed": 1}
    assert info.metrics == {"reward": 0.5, "unknown": None} and info.certificate is None


def test_a_text_prompt_is_an_artifact_too(tmp_path: Path) -> None:
    policy = tiny_policy()
    prompt = TextPrompt("the rain and the sun")
    loaded = load_artifact(save(tmp_path / "a", policy, prompt), policy)
    assert isinstance(loaded, TextPrompt)
    assert completions(policy, loaded) == completions(policy, prompt)
    count = len(policy.slot_ids("the rain and the sun"))
    assert read_artifact_info(tmp_path / "a").num_virtual_tokens == count


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none prompt cannot be saved"):
        save(tmp_path / "a", tiny_policy(), NonePrompt())
    assert not (tmp_path / "a").exists()


def another_template() -> Policy:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("Be nice.", "Be kind.")
    base = freeze(tiny_model("llama"), tokenizer, "tiny-llama")
    return Policy(base, ChatSlot.from_tokenizer(tokenizer))


def another_base() -> Policy:
    base = tiny_base("llama", seed=1)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


@pytest.mark.parametrize(
    ("other", "named"),
    [(another_base, r"base tiny-llama \(\w{12}\), not"), (another_template, "chat template")],
)
def test_another_base_or_template_is_refused_unless_forced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: Callable[[], Policy], named: str
) -> None:
    policy = tiny_policy()
    folder = save(tmp_path / "a", policy, policy.prompt)
    with pytest.raises(InputError, match=rf"was made on {named}.*--force"):
        load_artifact(folder, other())
    with caplog.at_level(logging.WARNING):
        forced = load_artifact(folder, other(), force=True)
    assert torch.equal(forced.state_dict()["embeddings"], policy.prompt.state_dict()["embeddings"])
    assert "loaded because it was forced" in caplog.text


def test_force_cannot_make_the_width_fit(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = save(tmp_path / "a", policy, policy.prompt)
    save_file({"embeddings": torch.ones(6, 32)}, folder / "prompt.safetensors")
    with pytest.raises(InputError, match=r"tiny-llama .*shape \(6, 32\), the base needs width 64"):
        load_artifact(folder, policy, force=True)


def damage_tensors(path: Path, what: str) -> None:
    embeddings = load_file(path)["embeddings"]
    poisoned = embeddings.clone()
    poisoned[1, 2] = math.nan
    contents = {
        "other_tensors": {"something": embeddings},
        "fewer_tokens": {"embeddings": embeddings[:2].contiguous()},
        "flat": {"embeddings": embeddings.flatten()},
        "nan": {"embeddings": poisoned},
    }
    if what in contents:
        save_file(contents[what], path)
    elif what == "no_tensors":
        path.unlink()
    elif what == "cut_tensors":
        path.write_bytes(path.read_bytes()[:-9])


def damage_info(path: Path, what: str) -> None:
    content = json.loads(path.read_text())
    texts = {
        "cut_info": path.read_text()[:30],
        "list_info": "[]",
        "no_version": json.dumps({k: v for k, v in content.items() if k != "schema_version"}),
        "newer": json.dumps({**content, "schema_version": SCHEMA_VERSION + 1, "new": 1}),
        "unknown_field": json.dumps({**content, "surprise": 1}),
        "missing_field": json.dumps({k: v for k, v in content.items() if k != "base"}),
        "other_kind": json.dumps({**content, "representation": "hologram"}),
    }
    if what in texts:
        path.write_text(texts[what])
    elif what == "no_info":
        path.unlink()


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no_info", r"is not an artifact \(no prompt.json\)"),
        ("no_tensors", r"prompt.safetensors' cannot be read"),
        ("cut_tensors", r"prompt.safetensors' cannot be read .*copy the artifact again"),
        ("other_tensors", r"cannot be read \('embeddings'\)"),
        ("fewer_tokens", "holds 2 positions, prompt.json says 6"),
        ("flat", "shape .*the base needs width 64"),
        ("nan", "values that are not finite"),
        ("cut_info", r"prompt.json' is damaged"),
        ("list_info", r"prompt.json' is damaged"),
        ("no_version", r"is damaged \('schema_version'\)"),
        ("newer", "schema version 4, this rlprompt reads 1, 2, 3; install"),
        ("unknown_field", "is damaged .surprise"),
        ("missing_field", "is damaged .base: Field required"),
        ("other_kind", "holds a prompt of the kind 'hologram', and known are soft, prefix, text"),
    ],
)
def test_damage_is_one_sentence(tmp_path: Path, what: str, sentence: str) -> None:
    policy = tiny_policy()
    folder = save(tmp_path / "a", policy, policy.prompt)
    damage_tensors(folder / "prompt.safetensors", what)
    damage_info(folder / "prompt.json", what)
    with pytest.raises(InputError, match=sentence) as caught:
        load_artifact(folder, policy)
    assert "\n" not in str(caught.value)


def test_saving_over_an_artifact_replaces_it(tmp_path: Path) -> None:
    policy = tiny_policy()
    folder = save(tmp_path / "a", policy, policy.prompt)
    prompt = trained(policy)
    save(folder, policy, prompt)
    loaded = load_artifact(folder, policy)
    assert torch.equal(loaded.state_dict()["embeddings"], prompt.state_dict()["embeddings"])
    assert len(list(folder.iterdir())) == 3
