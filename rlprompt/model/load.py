"""Reads config, tokenizer and weights of a checked folder through transformers.

Its many exceptions become one sentence each, and what it would only warn of (weights that are
missing and would be random) is refused.
"""

from __future__ import annotations

import logging
import resource
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from rlprompt.errors import InputError, limit_reached
from rlprompt.model.files.folder import first_line

logger = logging.getLogger(__name__)

_ADDRESS_SPACE = 2_000_000_000
"""Bytes. A tiny model trains in 3 GB; in 1.2 GB oneDNN ended in a segmentation fault."""


def read_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a decoder-only language model.

    Raises:
        InputError: If it cannot be read, or belongs to another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if limit_reached(error) is not None:
            raise  # the files are not to blame
        raise InputError(
            f"{folder / 'config.json'} cannot be read ({first_line(error)}): copy the file again."
        ) from error
    assert isinstance(config, PretrainedConfig)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"The model in {folder} ({config.model_type}) is an encoder-decoder, which has no "
            "system slot: choose a decoder-only chat model."
        )
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    stated = list(config.architectures or [])
    if not (remote and trust_remote_code) and (known is None or (stated and known not in stated)):
        raise InputError(
            f"The model in {folder} is a {', '.join(stated) or config.model_type}, not a causal "
            "language model: choose a decoder-only chat model."
        )
    return config


def read_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights.

    Raises:
        InputError: If it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        if limit_reached(error) is not None:
            raise  # the files are not to blame
        raise InputError(
            f"The tokenizer in {folder} cannot be read ({first_line(error)}): copy the tokenizer "
            "files again."
        ) from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def read_model(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel:
    """The model on the CPU, every weight read from safetensors.

    Raises:
        InputError: If transformers cannot load it, or the files lack weights of the model.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 < limit < _ADDRESS_SPACE:
        logger.warning(
            "this process may address %.1f GB (`ulimit -v`): below %.0f, torch's own code crashes "
            "where it gets no memory; raise the limit",
            limit / 1e9,
            _ADDRESS_SPACE / 1e9,
        )
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        if limit_reached(error) is not None:
            raise  # the files are not to blame
        raise InputError(
            f"The model in {folder} cannot be loaded ({first_line(error)}): check that config.json "
            "and weights belong together."
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"The weights in {folder} lack {len(missing)} tensor(s) that its config.json asks for, "
            f"such as {missing[0]}: check that config.json and weights belong together."
        )
    if info["unexpected_keys"]:
        logger.warning("%s: unused weights: %s", folder, sorted(info["unexpected_keys"])[:5])
    assert isinstance(model, PreTrainedModel)
    return model
