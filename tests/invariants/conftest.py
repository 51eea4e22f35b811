"""The real model in float32, untouched by rlprompt: what the `model` tests compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_dir: Path) -> PreTrainedModel:
    """SmolLM2 in float32 under transformers' own attention."""
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    assert isinstance(model, PreTrainedModel)
    model.eval()
    model.requires_grad_(False)
    return model
