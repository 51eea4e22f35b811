"""SmolLM2 from GGUF to a safetensors folder: what the file format loses is put back.

transformers dequantises the weights, but thinks the result is still quantised, keeps numbers that
went through float32, and knows nothing of the tokenizer's digit splitting. The result is pinned: if
another version of transformers converts differently, the model would not be the one that artifacts
were trained on, and the conversion is refused.

The weights are stored in bfloat16, the dtype that SmolLM2 was published in. Every load, float32
included, then starts from the same weights.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlprompt.errors import InputError
from rlprompt.model.fingerprint import fingerprint

BOS_ID, END_OF_TURN_ID = 1, 2
RMS_NORM_EPS = 1e-5
MAX_POSITIONS = 8192
PROBE = "<|im_start|>user\nIn 2024,\n\n1. it's  5.5%<|im_end|>\n"
PROBE_IDS = [1, 4093, 198, 788, 216, 34, 32, 34, 36, 28, 1116, 33, 30, 357, 506]
PROBE_IDS += [256, 37, 30, 37, 21, 2, 198]
"""SmolLM2's tokens of `PROBE`: no BOS, control tokens whole, digits alone, two newlines as one."""


def convert(gguf: Path, folder: Path, expected_fingerprint: str) -> dict[str, str]:
    """Writes the model in `gguf` to `folder`: config, bfloat16 safetensors, tokenizer, template.

    Takes about 20 seconds and 1 GB of memory for 135M weights.

    Returns:
        The versions of the packages that did it.

    Raises:
        InputError: If the packages cannot convert the file, or convert it to other weights or to
            another tokenizer than expected.
    """
    try:
        versions = {name: version(name) for name in ("transformers", "torch", "tokenizers", "gguf")}
    except PackageNotFoundError as error:
        raise InputError(
            f"Converting {gguf.name} needs the package {error.name}: install it with "
            f"`pip install {error.name}`."
        ) from error
    described = ", ".join(f"{name} {number}" for name, number in versions.items())
    try:
        model = _read_model(gguf)
        tokenizer = _read_tokenizer(gguf)
        actual = fingerprint(model)
        probe_ids = list(tokenizer(PROBE)["input_ids"])
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault; transformers raises OSErrors of its own without a number
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"Converting {gguf.name} with {described} failed ({reason}): install the versions that "
            "the rlprompt README names."
        ) from error
    if actual != expected_fingerprint or probe_ids != PROBE_IDS:
        what = "weights" if actual != expected_fingerprint else "a tokenizer"
        raise InputError(
            f"Converting {gguf.name} with {described} gives {what} that rlprompt does not know "
            f"({actual[:12]}): install the versions that the rlprompt README names."
        )
    return versions


def _read_model(gguf: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    assert isinstance(model, PreTrainedModel)
    # save_pretrained refuses a model that it takes for a quantised one
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.config._model_name_or_path = "SmolLM2-135M-Instruct"
    model.config.rms_norm_eps = RMS_NORM_EPS
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID, eos_token_id=END_OF_TURN_ID, pad_token_id=END_OF_TURN_ID
    )
    torch.nn.Module.to(model, torch.bfloat16)
    return model


def _read_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    # GGUF names the scheme ("smollm": each digit alone, then GPT-2's split) but does not hold it
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = MAX_POSITIONS
    return tokenizer
