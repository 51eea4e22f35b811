"""Which architectures `PrefixForward` takes, and that it refuses what it would compute wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase, freeze, verify_unchanged
from rlprompt.model.forward.prefix_forward import PrefixForward
from tests.fixtures.tiny import FAMILIES, WINDOW, tiny_base, tiny_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def _base(family: str, **settings: Any) -> FrozenBase:
    config = AutoConfig.for_model(family, **(_SIZES | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # a bias or norm that is forgotten must change the result
                parameter.add_(0.1 * torch.randn_like(parameter))
    return freeze(model, tiny_tokenizer(), f"tiny-{family}")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("smollm3", {}),
        ("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.2}),
        ("cohere", {"logit_scale": 0.3}),
        ("olmo2", {}),
        ("mixtral", {**_EXPERTS, "sliding_window": WINDOW}),
        ("qwen3_moe", _EXPERTS),
        ("starcoder2", {"sliding_window": WINDOW}),
        ("gpt_neox", {}),
    ],
)
def test_other_families_that_run_exactly(family: str, settings: dict[str, Any]) -> None:
    """Construction compares with the model's own forward, so that passing it is the test."""
    forward = PrefixForward(_base(family, **settings))
    assert verify_unchanged(forward.base) == forward.base.fingerprint


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt_oss", {**_EXPERTS, **_MIXED}, "s_aux"),
        ("stablelm", {}, "drops the context"),
        ("phi", {}, "bias"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "keys and values of their own"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "keys and values of their own"),
        # The window is wider than the probe: only the config tells of it.
        ("qwen2_moe", {**_EXPERTS, **_MIXED, "sliding_window": 40}, "sliding_attention"),
        ("phimoe", {**_EXPERTS, "sliding_window": 40}, "sliding_attention"),
    ],
)
def test_families_that_would_be_computed_wrongly_are_refused(
    family: str, settings: dict[str, Any], reason: str
) -> None:
    base = _base(family, **settings)
    for _ in range(2):  # a second attempt must not take the first one's word for it
        with pytest.raises(InputError, match=reason):
            PrefixForward(base)


def test_another_result_is_refused() -> None:
    base = tiny_base("llama")
    base.model.config.final_logit_softcapping = 1.0  # which Llama's own forward does not read
    with pytest.raises(InputError, match="log-probabilities differ"):
        PrefixForward(base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stay_as_they_were(family: str, dtype: torch.dtype) -> None:
    base = tiny_base(family, dtype)
    forward = PrefixForward(base)
    assert verify_unchanged(base) == base.fingerprint
    assert (forward.dtype, forward.device.type) == (dtype, "cpu")
    again = PrefixForward(base)
    ids = torch.arange(9)
    with torch.no_grad():
        first, second = (f.prefill(f.embed(ids)) for f in (forward, again))
    assert all(torch.equal(a, b) for a, b in zip(first.keys, second.keys, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_of_nothing_has_the_shapes_of_a_prefix(family: str) -> None:
    forward = PrefixForward(tiny_base(family))
    none, one = forward.prefill(forward.embed([])), forward.prefill(forward.embed([5]))
    assert none.num_tokens == 0
    assert one.num_tokens == 1
    for empty, full in zip([*none.keys, *none.values], [*one.keys, *one.values], strict=True):
        assert empty.shape == (full.shape[0], 0, full.shape[2])
        assert empty.dtype == full.dtype


def test_embeddings_carry_no_gradient_even_when_recomputing() -> None:
    forward = PrefixForward(tiny_base("llama"))
    forward.gradient_checkpointing = True
    assert not forward.embed([1, 2]).requires_grad
    forward.gradient_checkpointing = False
    assert not forward.embed([1, 2]).requires_grad


def test_layers_with_dropout_of_their_own_are_not_recomputed() -> None:
    forward = PrefixForward(_base("opt", ffn_dim=96, word_embed_proj_dim=64, dropout=0.1))
    with pytest.raises(InputError, match="drop activations"):
        forward.gradient_checkpointing = True
    assert not forward.gradient_checkpointing
    assert not any(module.training for module in forward.base.model.modules())


def test_longrope_is_limited_to_lengths_that_keep_their_frequencies() -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": [2.0] * 8,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
    }
    base = _base("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    assert base.max_positions == 512
    assert PrefixForward(base).max_positions == 64
    assert PrefixForward(tiny_base("gemma3")).max_positions == 512
