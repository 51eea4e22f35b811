"""The adapter: PEFT loads its artifact, acts alike, and hooks leave the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlprompt.artifacts.format import load_artifact, save_artifact
from rlprompt.errors import InputError
from rlprompt.model.forward.adapter_hooks import linear_shapes
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.layer_adapters import IA3Settings
from tests.fixtures.prompts import TEXT, make
from tests.fixtures.tiny import FAMILIES, tiny_model
from tests.invariants.oracle import (
    QUERIES,
    completion,
    context_ids,
    flat,
    own_logprobs,
    policy_of,
    scores,
)

TOKENS = (40, 50, 60, 70)


def _saved(kind: str, family: str, folder: Path, **method: Any) -> AdapterPrompt:
    changes: dict[str, Any] = {"method": method} if method else {}
    prompt = make(kind, policy_of(family), noise=5.0, **changes)
    assert isinstance(prompt, AdapterPrompt)
    save_artifact(folder, policy_of(family), prompt, name="n", recipe={}, metrics={})
    return prompt


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "phi3"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_peft_loads_the_artifact_and_says_the_same(kind: str, family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    prompt = _saved(kind, family, tmp_path)
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    plain = own_logprobs(model, context_ids(policy, TEXT, QUERIES[0]), TOKENS)
    wrapped: Any = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    theirs = own_logprobs(wrapped, context_ids(policy, TEXT, QUERIES[0]), TOKENS)
    ours = flat(scores(policy, prompt, QUERIES[:1], [[completion(TOKENS)]]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert float((theirs - plain).abs().max()) > 0.01


def test_a_family_with_fused_layers_has_other_names(tmp_path: Path) -> None:
    prompt = _saved("lora", "phi3", tmp_path)
    names = {name.rpartition(".")[2] for name in prompt.adapter.layers}
    assert names == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with pytest.raises(InputError, match=r"names k_proj, .*linear layers are down_proj, gate_up"):
        make("ia3", policy_of("phi3"))
    targets = {"target_modules": ["qkv_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    make("ia3", policy_of("phi3"), method={"type": "ia3", **targets})


def test_only_named_layers_are_changed(tmp_path: Path) -> None:
    method = {"type": "lora", "rank": 3, "target_modules": ["self_attn.q_proj", "v_proj"]}
    prompt = _saved("lora", "llama", tmp_path, **method)
    names = {name.rpartition(".")[2] for name in prompt.adapter.layers}
    assert names == {"q_proj", "v_proj"}
    assert {p.shape[0] for p in prompt.parameters()[::2]} == {3}


def test_the_head_of_the_model_is_not_a_target() -> None:
    shapes = linear_shapes(tiny_model("qwen2"))
    assert len(shapes) == 2 * 7
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
    assert not any("lm_head" in name for name in shapes)


def test_hooks_go_and_leave_nothing() -> None:
    policy = policy_of("llama")
    prompt = make("lora", policy, noise=1.0)
    assert isinstance(prompt, AdapterPrompt)
    forward = policy.forward

    def hooks() -> int:
        modules = policy.base.model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    before = hooks()
    with forward.adapted(prompt.adapter):
        assert hooks() == before + len(prompt.adapter.layers)
        with forward.adapted(None):
            assert hooks() == before
        other = make("ia3", policy)
        assert isinstance(other, AdapterPrompt)
        with pytest.raises(ZeroDivisionError), forward.adapted(other.adapter):
            raise ZeroDivisionError
        assert hooks() == before + len(prompt.adapter.layers)
    assert hooks() == before


def test_the_reference_is_scored_without_it_though_it_was_on() -> None:
    policy = policy_of("llama")
    prompt, text = make("lora", policy, noise=5.0), make("text", policy)
    group = [[completion(TOKENS)]]
    expected = flat(scores(policy, text, QUERIES[:1], group))
    assert isinstance(prompt, AdapterPrompt)
    with policy.forward.adapted(prompt.adapter):
        assert torch.equal(flat(scores(policy, text, QUERIES[:1], group)), expected)
    assert not torch.equal(flat(scores(policy, prompt, QUERIES[:1], group)), expected)


def _break(folder: Path, what: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    if what == "gone":
        weights.unlink()
    elif what == "method":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "VERA"}))
    elif what == "dora":
        config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    elif what == "half":
        save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif what == "shape":
        save_file({**tensors, first: torch.ones(2, 8)}, weights)
    elif what == "layer":
        save_file({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}, weights)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("gone", "cannot be read"),
        ("method", "VERA is not one of LORA, IA3"),
        ("dora", "use_dora, which rlprompt does not have"),
        ("half", "not pairs of lora_A and lora_B"),
        ("shape", r"lora_A.weight of shape \(2, 8\), the base needs \(2, 96\)"),
        ("layer", "layers.7.* which the base does not have"),
    ],
)
def test_a_damaged_adapter_is_one_sentence(tmp_path: Path, what: str, sentence: str) -> None:
    _saved("lora", "llama", tmp_path)
    _break(tmp_path / "adapter", what)
    with pytest.raises(InputError, match=sentence) as caught:
        load_artifact(tmp_path, policy_of("llama"))
    assert "\n" not in str(caught.value)


def test_feedforward_modules_are_targets() -> None:
    with pytest.raises(ValueError, match="target_modules does not"):
        IA3Settings(target_modules=("k_proj",))
