"""What the parts of the GPU check share: device, shapes of models, random weights, a tokenizer.

Nothing is downloaded: weights are random, of the shapes of published models, and the tokenizer has
one token per byte. Speed and memory depend on shapes alone; what a prompt learns is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True)
class World:
    """Where and how a part runs."""

    dry_run: bool
    """On the CPU, in Triton's interpreter, with tiny shapes."""
    model: Path | None
    """A folder of SmolLM2-135M; None = random weights of its shape."""
    output: Path
    """Where pictures go."""
    scratch: Path
    """A folder of this part's own, removed afterwards."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry_run else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.dry_run else torch.bfloat16

    def shape(self, name: str) -> str:
        """The shape that stands for a model: itself, or `tiny` in a dry run."""
        return "tiny" if self.dry_run else name

    def random_model(self, name: str) -> PreTrainedModel:
        """A model of a shape, made on the device."""
        return random_model(self.shape(name), self.device, self.dtype)

    def folder(self) -> Path:
        """A folder with SmolLM2: the one given, or one of random weights of its shape."""
        if self.model is not None and not self.dry_run:
            return self.model
        made = self.scratch / "model"
        if not made.exists():
            model = random_model(self.shape("smollm2-135m"), torch.device("cpu"), torch.float32)
            model.save_pretrained(made)
            byte_tokenizer().save_pretrained(made)
        return made

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.dry_run:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall-clock seconds of one call, the device's work included."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def peak_gib(self) -> float | None:
        """Most memory of the device that tensors took since `fresh_memory`; None on a CPU."""
        return None if self.dry_run else torch.cuda.max_memory_allocated() / 2**30

    def fresh_memory(self) -> None:
        """Give back what is cached and start counting anew."""
        if not self.dry_run:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


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
    return model.eval()


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


@contextmanager
def interpreted_attention() -> Iterator[None]:
    """Inside it attention goes through the Triton kernels on a CPU too, in the interpreter."""
    from rlprompt.engines import cache
    from rlprompt.model.forward import forest, tree

    places: list[Any] = [cache, forest, tree]
    before = [place.uses_triton for place in places]
    for place in places:
        place.uses_triton = lambda *_: True
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            place.uses_triton = function


class PartFailedError(Exception):
    """A part ran and found something wrong; it carries what was measured all the same."""

    def __init__(self, reason: str, figures: dict[str, Any]) -> None:
        super().__init__(reason)
        self.figures = figures


def require(figures: dict[str, Any], **conditions: bool) -> dict[str, Any]:
    """The figures, if all conditions hold.

    Raises:
        PartFailedError: some do not; the message names them.
    """
    broken = [name for name, holds in conditions.items() if not holds]
    if broken:
        raise PartFailedError("does not hold: " + ", ".join(broken), figures)
    return figures
