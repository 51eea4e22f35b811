"""Shapes of models, random weights, and a tokenizer: nothing is downloaded.

Weights are random, of the shapes of published models, and the tokenizer has one token per byte.
Speed and memory depend on shapes alone; what a prompt learns is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from benchmarks.peers.worker import CHATML_WITHOUT_DEFAULT

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: LlamaConfig(
        vocab_size=304,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    "llama-3.2-1b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **_TOKENS,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        **_TOKENS,
    ),
}
"""By the name of the published model whose shape it is; `tiny` is for --dry-run."""


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights of a shape; the same ones for the same device, torch and shape."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            SHAPES[name](), dtype=dtype, attn_implementation="sdpa"
        )
    assert isinstance(model, PreTrainedModel)
    model.generation_config = GenerationConfig(**_TOKENS)
    torch.nn.Module.to(model, device=device, dtype=dtype)
    model.eval()
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones, with a ChatML template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        padding_side="left",
        chat_template=CHATML_WITHOUT_DEFAULT,
    )
