"""The base: a frozen language model, its tokenizer, and the proof of which weights it has.

Loading is where most first runs fail, so every way to fail ends in one sentence. A base is never
trained: its parameters want no gradient, and `verify_unchanged` proves it after a run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.model.chat.render import start as start_rendering
from rlprompt.model.device import choose_device, choose_dtype, use_allowed_threads
from rlprompt.model.files.converted import is_converted, read_manifest
from rlprompt.model.files.fetch import EMBEDDED
from rlprompt.model.files.folder import Source, check_folder, locate
from rlprompt.model.fingerprint import weight_digests
from rlprompt.model.load import read_config, read_model, read_tokenizer
from rlprompt.model.sharded.load import read_sharded_model
from rlprompt.model.sharded.shards import Shards, ShardSettings
from rlprompt.settings import Settings

logger = logging.getLogger(__name__)


class ModelSettings(Settings):
    """Which base to load, and where and how precisely it runs."""

    path: str = "smollm2-135m"
    """A model of the cache, embedded or converted (`rlprompt model list`), a local folder (write
    ./name for one that is named like a model of the cache), or a hub id `org/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; none = its main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of weights and activations; auto = bfloat16 where the hardware multiplies it, else
    float32."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto = CUDA when there is a GPU, else CPU."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    template: str | None = None
    """A chat template to use in place of the tokenizer's: `plain` (for a base model that has none),
    the path of a .jinja file relative to the recipe's folder, or the text of a template."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """CPU threads of torch; none = torch's choice, and no more than affinity, the control group's
    quota or the Slurm job give this process."""
    cpu_kernels: Literal["auto", "on", "off"] = "auto"
    """Small C++ kernels for a bfloat16 base on a CPU, built once on this machine: auto = where a
    compiler is there and they pass their check, on = refuse to run without them, off = plain
    torch."""


@dataclass(frozen=True)
class FrozenBase:
    """A frozen language model, ready to be conditioned by a prompt.

    Made by `load_base`, or by `freeze` from a model in memory.
    """

    model: PreTrainedModel
    """In eval mode; no parameter wants a gradient."""
    tokenizer: PreTrainedTokenizerBase
    id: str
    """A name of the cache, `org/name[@revision]`, or the absolute path of the folder."""
    fingerprint: str
    """Names the weights in any dtype; see `rlprompt.model.fingerprint`."""
    dtype: torch.dtype
    device: torch.device
    exact_digests: Mapping[str, str]
    """Tensor name -> digest of its bytes at load; what `verify_unchanged` compares with."""
    shards: Shards | None = None
    """This rank's part, where every rank holds a part of each weight only."""
    cpu_kernels: Literal["auto", "on", "off"] = "auto"
    """See `ModelSettings`."""

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return int(self._text_config.num_hidden_layers)

    @property
    def num_kv_heads(self) -> int:
        """H_kv, the number of key/value heads of a layer."""
        config = self._text_config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """D, the size of one head."""
        config = self._text_config
        stated = getattr(config, "head_dim", None)
        return int(stated or config.hidden_size // config.num_attention_heads)

    @property
    def hidden_size(self) -> int:
        """The size of one embedding."""
        return int(self._text_config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding; at least the size of the tokenizer."""
        return _embedding_rows(self.model)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a completion: generation_config.eos_token_id, else the tokenizer's."""
        generation = self.model.generation_config
        stop = None if generation is None else generation.eos_token_id
        if stop is None:
            stop = self.tokenizer.eos_token_id
        if stop is None:
            return frozenset()
        return frozenset(stop if isinstance(stop, list) else [int(stop)])

    @property
    def max_positions(self) -> int:
        """The longest sequence the model takes; `sys.maxsize` when it states no limit."""
        return int(getattr(self._text_config, "max_position_embeddings", None) or sys.maxsize)

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config(decoder=True)


def longest_sequence(config: PretrainedConfig) -> int:
    """The longest sequence that a model computes exactly; `sys.maxsize` when it states no limit.

    LongRoPE (Phi-3) changes the rotary frequencies of all tokens when a sequence outgrows the
    original length, so keys computed once would no longer be those of the longer sequence.
    """
    text: Any = config.get_text_config(decoder=True)
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    limits = [
        int(part["original_max_position_embeddings"])
        for part in (rope, *(r for r in rope.values() if isinstance(r, dict)))
        if part.get("rope_type") == "longrope"
    ]
    return min([int(getattr(text, "max_position_embeddings", None) or sys.maxsize), *limits])


def load_base(settings: ModelSettings, sharding: ShardSettings | None = None) -> FrozenBase:
    """Loads, checks, freezes and fingerprints the model of `settings`.

    An embedded model that is not in the cache is fetched first; weights are read from safetensors
    only. Sets the number of CPU threads; see `ModelSettings.threads`.

    Args:
        settings: the settings that say which model.
        sharding: how it is cut up among the ranks, which then all call this; None keeps it whole.

    Raises:
        InputError: For every way in which settings, files or machine make this impossible.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    else:
        use_allowed_threads()
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    source = locate(settings.path, settings.revision)
    check_folder(source.folder, settings.trust_remote_code)
    start_rendering()
    config = read_config(source.folder, settings.trust_remote_code)
    tokenizer = read_tokenizer(source.folder, settings.trust_remote_code)
    if sharding is None:
        model = read_model(source.folder, config, dtype, settings.trust_remote_code)
        base = freeze(_move(model, device), tokenizer, source.id)
    else:
        model, shards = read_sharded_model(source.folder, config, dtype, sharding)
        base = replace(freeze(model, tokenizer, source.id), shards=shards, device=device)
    base = replace(base, cpu_kernels=settings.cpu_kernels)
    _check_known(source, base)
    logger.info("base %s: %s on %s, fingerprint %s", base.id, dtype, device, base.fingerprint[:12])
    return base


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_id: str) -> FrozenBase:
    """Makes a base of a loaded model, which is changed in place: eval mode, no gradients.

    Raises:
        InputError: If the tokenizer has ids beyond the embedding, or a weight has no data.
    """
    rows = _embedding_rows(model)
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"The tokenizer of {base_id} has token ids up to {highest}, but its embedding has only "
            f"{rows} rows: take tokenizer and weights from the same model."
        )
    model.requires_grad_(False)
    model.eval()
    digests = weight_digests(model)
    return FrozenBase(
        model=model,
        tokenizer=tokenizer,
        id=base_id,
        fingerprint=digests.fingerprint,
        dtype=model.dtype,
        device=model.device,
        exact_digests=digests.exact,
    )


def verify_unchanged(base: FrozenBase) -> str:
    """Proves that every weight of `base` has the bytes it had at load; returns the fingerprint.

    Raises:
        RuntimeError: If a weight changed, appeared or vanished. That is a defect of rlprompt.
    """
    now = weight_digests(base.model)
    if now.exact != base.exact_digests:
        names = sorted(
            name
            for name in now.exact.keys() | base.exact_digests.keys()
            if now.exact.get(name) != base.exact_digests.get(name)
        )
        raise RuntimeError(
            f"The frozen base {base.id} changed: {len(names)} weight(s) differ, "
            f"among them {', '.join(names[:3])}."
        )
    return now.fingerprint


def _move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    try:
        model.to(device)  # type: ignore[arg-type]
    except torch.cuda.OutOfMemoryError as error:
        gigabytes = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        raise InputError(
            f"The model needs {gigabytes:.1f} GB on {device}, which has no room for it: choose a "
            "smaller model, another dtype or another device."
        ) from error
    return model


def _check_known(source: Source, base: FrozenBase) -> None:
    """Refuses a cached copy whose weights are not those that it was made with."""
    embedded = EMBEDDED.get(source.id)
    manifest = read_manifest(source.id) if is_converted(source.id) else None
    if (embedded is None and manifest is None) or base.dtype == torch.float16:
        return
    expected = embedded.fingerprint if embedded is not None else (manifest or {})["fingerprint"]
    if base.fingerprint != expected:
        again = (
            f"delete that folder and run `rlprompt model fetch {source.id}`"
            if embedded is not None
            else "convert the model again with --force"
        )
        raise InputError(
            f"The cached weights in {source.folder} are damaged (fingerprint "
            f"{base.fingerprint[:12]}, expected {expected[:12]}): {again}."
        )


def _embedding_rows(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    return embedding.num_embeddings
