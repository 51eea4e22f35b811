"""A sequence classifier and its logits: any `AutoModelForSequenceClassification`, frozen.

Letters: B conversations, K labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from rlprompt.errors import InputError
from rlprompt.model.chat.template import read_template
from rlprompt.model.device import choose_device, choose_dtype
from rlprompt.model.files.folder import check_folder, first_line, locate
from rlprompt.model.load import read_tokenizer
from rlprompt.model.sharded.load import read_sharded_classifier
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.rewards.models.conversation import (
    PAIR,
    ConversationEncoder,
    Encoded,
    Keep,
)
from rlprompt.settings import Settings
from rlprompt.types import Message

logger = logging.getLogger(__name__)

CARD_FILE = "rlprompt_reward.json"
"""Written beside a model by `rlprompt reward train`: how it is to be asked and calibrated."""


class ClassifierSettings(Settings):
    """Which classifier to load, and how it is asked."""

    path: str
    """A folder (relative to the recipe's folder, then to the working directory), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """cpu, cuda or cuda:N: the base's device or another; auto = CUDA when there is a GPU."""
    sharded: bool = False
    """With several ranks: each holds its part of every weight (DeepSpeed ZeRO-3) and all score
    together, for a model that no device holds whole. Set the reward's timeout to null then."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto = bfloat16 where the hardware multiplies it, else float32."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    template: str | None = None
    """How a conversation is written: null = the model's own chat template; `pair` = question and
    answer as the two segments of a BERT-like model; `plain`; a .jinja file's path; or Jinja."""
    max_tokens: PositiveInt | None = None
    """Longest conversation; its longest text is shortened to fit. Null = as the model was trained,
    or its positions."""
    keep: Keep | None = None
    """Which end of a text that is too long stays; null = as the model was trained, or `start`."""
    batch_tokens: PositiveInt = 16_384
    """Tokens per forward pass, padding included; conversations of like length go together."""


def resolve_model(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """Options of a model, not yet checked, with the paths in them found below `base_dir`."""
    found = dict(options)
    path, template = options.get("path"), options.get("template")
    if isinstance(path, str) and (base_dir / path).is_dir():
        found["path"] = str((base_dir / path).resolve())
    if isinstance(template, str) and template != PAIR:
        found["template"] = read_template(template, base_dir)
    return found


class Classifier:
    """A loaded classifier.

    Attributes:
        labels: K names of the outputs.
        card: what `rlprompt reward train` left beside the model; empty for other models.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ClassifierSettings,
        card: Mapping[str, Any],
        body: nn.Module | None = None,
    ) -> None:
        self._model = model.requires_grad_(False).eval()
        self._body: nn.Module = model if body is None else body
        self._settings = settings
        self.card = card
        self._has_padding = model.config.get_text_config().pad_token_id is not None
        names: Mapping[Any, Any] = model.config.id2label or {}
        self.labels = [str(names.get(i, i)) for i in range(int(model.config.num_labels or 1))]
        positions = getattr(model.config, "max_position_embeddings", None) or 2048
        limit = settings.max_tokens or card.get("max_tokens") or min(positions, 8192)
        keep = settings.keep or card.get("keep") or "start"
        self.encoder = ConversationEncoder(
            tokenizer, settings.template, min(limit, _usable(model, positions)), keep
        )

    @classmethod
    def load(cls, settings: ClassifierSettings) -> Classifier:
        """Read a classifier from safetensors.

        Raises:
            InputError: there is no such model, it has no trained head, or it cannot run as set.
        """
        try:
            device = choose_device(settings.device)
            dtype = choose_dtype(settings.dtype, device)
            folder = locate(settings.path, settings.revision).folder
            check_folder(folder, settings.trust_remote_code)
            tokenizer = read_tokenizer(folder, settings.trust_remote_code)
        except InputError as error:
            text = str(error).replace("model.", "")
            if text.endswith("; correct it."):  # a folder that is not there, unlike any that is
                text = text[:-11] + "make it with `rlprompt reward train`, or correct it"
            raise InputError(text) from error
        card_path = folder / CARD_FILE
        card = _read_card(card_path) if card_path.is_file() else {}
        if settings.sharded:
            model, body = _read_shards(folder, dtype, settings.trust_remote_code)
            return cls(model, tokenizer, settings, card, body)
        model = _read(folder, dtype, settings.trust_remote_code)
        torch.nn.Module.to(model, device)
        logger.info("preference model %s: %s on %s", folder, dtype, device)
        return cls(model, tokenizer, settings, card)

    def logits(self, conversations: Sequence[Sequence[Message]]) -> tuple[Tensor, float]:
        """[B, K] float32 on the CPU, and the share of conversations that had to be shortened."""
        encoded = [self.encoder.encode(messages) for messages in conversations]
        return self.logits_of(encoded), sum(e.is_cut for e in encoded) / max(1, len(encoded))

    @torch.no_grad()
    def logits_of(self, encoded: Sequence[Encoded]) -> Tensor:
        """[B, K] float32 on the CPU, in batches of like length."""
        logits = torch.empty(len(encoded), len(self.labels))
        for rows in _batches([len(e.ids) for e in encoded], self._settings.batch_tokens):
            logits[rows] = self._forward([encoded[row] for row in rows])
        return logits

    def _forward(self, batch: Sequence[Encoded]) -> Tensor:
        width = max(len(each.ids) for each in batch)
        pad = self._pad_id(batch)
        ids = torch.tensor([each.ids + [pad] * (width - len(each.ids)) for each in batch])
        lengths = torch.tensor([len(each.ids) for each in batch])
        mask = torch.arange(width) < lengths[:, None]  # [B, T]
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if batch[0].segments is not None and self._takes_segments:
            rows = [each.segments or [] for each in batch]
            inputs["token_type_ids"] = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        device = self._model.device
        out = self._body(**{name: tensor.to(device) for name, tensor in inputs.items()})
        found: Tensor = out.logits.float().cpu()
        return found

    @property
    def _takes_segments(self) -> bool:
        return getattr(self._model.config, "type_vocab_size", 0) > 1

    def _pad_id(self, batch: Sequence[Encoded]) -> int:
        """The model's padding token; of a model without one, a token that no row holds.

        Decoder models read their score at the last token that is not padding, and a model that was
        trained without padding at the very last token, whatever that is.
        """
        config = self._model.config.get_text_config()
        if self._has_padding:
            return int(config.pad_token_id)
        used = {token for each in batch for token in each.ids}
        pad = next(i for i in range(len(used) + 1) if i not in used)
        config.pad_token_id = pad
        return pad


def _usable(model: PreTrainedModel, positions: int) -> int:
    """RoBERTa-like models start counting positions behind their padding token."""
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return positions if padding is None else positions - padding - 1


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` tokens or of one row."""
    batch: list[int] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        width = max(lengths[row], width if batch else 0)
        batch.append(row)
    if batch:
        yield batch


def _read_shards(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, nn.Module]:
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        raise InputError(
            "sharded has no effect in a process of its own; start several ranks with torchrun, or "
            "set sharded: false"
        )
    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    return read_sharded_classifier(folder, config, dtype)


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card = json_text.loads(read_bytes(path))
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}); copy the model again"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); copy the model again") from error
    if not isinstance(card, dict):
        raise InputError(f"{path} is no JSON object; copy the model again")
    return card


def _read(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise InputError(
            f"the preference model in {folder} cannot be loaded ({first_line(error)}); check that "
            f"it is a sequence classifier"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the model in {folder} lacks {len(missing)} tensor(s) of a classifier, such as "
            f"{missing[0]}, which would be random; name a trained preference model, or train one "
            f"with rlprompt reward train"
        )
    assert isinstance(model, PreTrainedModel)
    return model
