"""`rlprompt model convert`: a GGUF file becomes a folder of the cache that any tool can load.

The file's values and tensors are read within limits, made into what transformers has, written
beside the final place, loaded from there and tried. Only then does the folder get its name, so that
a name never stands for half a model.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlprompt import __version__
from rlprompt.errors import InputError, limit_reached
from rlprompt.files import replace_folder, to_json, write_atomic
from rlprompt.model.files.converted import read_manifest, require_name
from rlprompt.model.files.fetch import MANIFEST, cache_dir, lock, model_dir
from rlprompt.model.files.folder import check_folder, first_line
from rlprompt.model.files.wheel import Progress
from rlprompt.model.fingerprint import fingerprint
from rlprompt.model.gguf.families import Conversion, conversion
from rlprompt.model.gguf.tokenizer import make_tokenizer, vocabulary
from rlprompt.model.gguf.weights import require_shapes, write_weights
from rlprompt.model.load import read_config, read_model, read_tokenizer
from rlprompt.reading.files import expanded, in_words, reason
from rlprompt.reading.gguf_file import GgufError, GgufFile

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""What weights can be stored in."""
_TRIAL_TOKENS = 8
_TRIAL_TEXT = "What is the capital of France?"
_SPARE_BYTES = 64 << 20
"""Room for tokenizer and settings beside the weights."""


@dataclass(frozen=True)
class _Made:
    """What a file has become before its weights are read."""

    conversion: Conversion
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    shapes: Mapping[str, tuple[int, ...]]


def convert_gguf(
    file: str | Path,
    name: str,
    *,
    dtype: str = "bfloat16",
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """The folder of the cache that the model of a GGUF file has been converted to.

    Args:
        file: path of the GGUF file.
        name: name that `model.path` gets for it.
        dtype: type that weights are stored in, `bfloat16` or `float32`.
        force: whether a converted model of that name is replaced.
        progress: what is told a line of text at each step that takes time; None = the log.

    Raises:
        InputError: the name cannot be used or is taken, the file is damaged or of a kind that is
            not converted, the result cannot be loaded, or the cache cannot be written.
    """
    require_name(name)
    if dtype not in DTYPES:
        raise InputError(f"--dtype is {dtype[:40]!r}: use {' or '.join(DTYPES)}.")
    path = expanded(str(file), "FILE.gguf")
    target = model_dir(name)
    _require_free(name, target, force)
    say = progress or logger.info
    try:
        with GgufFile(path) as opened:
            made = _understood(opened)
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                with lock(target.parent / f".{name}.lock", say):
                    _require_free(name, target, force)
                    _build(opened, made, name, DTYPES[dtype], say)
            except OSError as error:
                raise _cannot_write(error) from error
    except GgufError as error:
        raise InputError(
            f"{path} cannot be converted: {error}; take another file of the model, or its folder "
            "with safetensors."
        ) from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}): give the path of a GGUF file."
        ) from error
    say(f"{name} is ready: model.path: {name}")
    return target


def _require_free(name: str, target: Path, force: bool) -> None:
    """Refuse a name that is taken, and with `force` one that no conversion has made."""
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise InputError(
            f"There is a model {name} in {target} already: give another name, or --force to "
            "replace it."
        )
    if read_manifest(name) is None:
        raise InputError(
            f"{target} was not made by `rlprompt model convert`, so --force does not replace it: "
            "give another name, or move that folder away."
        )


def _cannot_write(error: OSError) -> InputError:
    return InputError(
        f"The model cache {cache_dir()} cannot be written ({error.strerror or error}): make room "
        "or permissions there, or set RLPROMPT_CACHE to another folder."
    )


def _understood(file: GgufFile) -> _Made:
    """What the file says, before a weight is read.

    Raises:
        GgufError: it does not hold together, or is of a kind that is not converted.
    """
    found = conversion(file)
    words = vocabulary(file.values, int(found.config["vocab_size"]))
    ids = {name: words.special.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    settings = found.config | {f"{name}_token_id": number for name, number in ids.items()}
    try:
        config = AutoConfig.for_model(**settings)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tied = set(getattr(model, "_tied_weights_keys", None) or ())
        tied = tied if config.tie_word_embeddings else set()
        shapes = {n: tuple(w.shape) for n, w in model.state_dict().items() if n not in tied}
        require_shapes(file, found, shapes)
        tokenizer = make_tokenizer(
            words, config.max_position_embeddings, ordered=config.model_type == "gemma3_text"
        )
    except GgufError:
        raise
    except Exception as error:
        if limit_reached(error) is not None:
            raise
        raise GgufError(f"what it says makes no model ({first_line(error)})") from error
    return _Made(found, config, tokenizer, words.stop_ids, shapes)


def _build(file: GgufFile, made: _Made, name: str, dtype: torch.dtype, say: Progress) -> None:
    """Makes the folder beside its final place and moves it there; the caller holds the lock."""
    target = model_dir(name)
    prefix = f".{name}.part-"
    for left_over in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed
    numbers = sum(torch.Size(shape).numel() for shape in made.shapes.values())
    needed = numbers * dtype.itemsize + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise InputError(
            f"The model cache {cache_dir()} has {in_words(free)} free, and {name} needs "
            f"{in_words(needed)}: make room, or set RLPROMPT_CACHE to another folder."
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work:
        folder = Path(work) / name
        folder.mkdir()
        source = _source(file, say)
        say(f"converting {numbers / 1e6:.0f}M weights of {source['architecture']}")
        kinds = write_weights(file, made.conversion, dtype, folder, say)
        _write_settings(made, dtype, folder)
        say("trying the result")
        mark = _tried(folder, dtype, say)
        weights = f"{', '.join(kinds)}, dequantised to float32"
        if dtype != torch.float32:
            weights += f", rounded to {str(dtype).removeprefix('torch.')}"
        _describe(folder, name, source, weights, mark)
        replace_folder(folder, target)


def _source(file: GgufFile, say: Progress) -> dict[str, Any]:
    """What the model is made from."""
    say(f"reading {file.path.name} ({in_words(file.size)})")
    digest = hashlib.file_digest(file.digest_source(), "sha256").hexdigest()
    say(f"sha256 {digest}")
    described = {
        "file": file.path.name,
        "sha256": digest,
        "bytes": file.size,
        "architecture": file.values["general.architecture"],
    }
    for key in ("name", "license", "file_type", "quantization_version"):
        value = file.values.get(f"general.{key}")
        if isinstance(value, int | float) or (isinstance(value, str) and len(value) < 200):
            described[key] = value
    return described


def _write_settings(made: _Made, dtype: torch.dtype, folder: Path) -> None:
    """Config, tokenizer and template, as transformers writes them."""
    made.config.dtype = dtype
    made.config.save_pretrained(folder)
    stop: Any = made.stop_ids[0] if len(made.stop_ids) == 1 else made.stop_ids or None
    pad = made.config.pad_token_id
    GenerationConfig(
        bos_token_id=made.config.bos_token_id,
        eos_token_id=stop,
        pad_token_id=made.stop_ids[0] if pad is None and made.stop_ids else pad,
    ).save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)


def _tried(folder: Path, dtype: torch.dtype, say: Progress) -> str:
    """The fingerprint of the folder's model, which loads and answers.

    Raises:
        GgufError: it does not load, or computes what is no number.
    """
    try:
        check_folder(folder, trust_remote_code=False)
        tokenizer = read_tokenizer(folder, trust_remote_code=False)
        config = read_config(folder, trust_remote_code=False)
        model = read_model(folder, config, dtype, trust_remote_code=False)
        model.eval()
        if tokenizer.chat_template is None:
            say("it has no chat template: set model.template in recipes")
        ids = torch.tensor([tokenizer(_TRIAL_TEXT)["input_ids"]])
        answered = _continued(model, ids)
        mark = fingerprint(model)
    except InputError as error:
        raise GgufError(f"the result cannot be used ({str(error).split(': ')[0]})") from error
    say(f"it goes on: {tokenizer.decode(answered)!r}")
    return mark


def _continued(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """What the model writes next, the likeliest token at each place."""
    with torch.no_grad():
        for _ in range(_TRIAL_TOKENS):
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            if not bool(torch.isfinite(logits).all()):
                raise GgufError("its model computes what is no finite number")
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    return [int(number) for number in ids[0, -_TRIAL_TOKENS:]]


def _describe(folder: Path, name: str, source: Mapping[str, Any], weights: str, mark: str) -> None:
    """Writes the card, and the manifest that the cache goes by."""
    licence = str(source.get("license", "not said in the file"))
    card = [f"# {name}", "", "Converted by `rlprompt model convert`.", ""]
    lines = {
        "file": source["file"],
        "sha256": source["sha256"],
        "model": source.get("name", "not said in the file"),
        "architecture": source["architecture"],
        "weights": weights,
        "licence": licence,
        "fingerprint": mark,
    }
    card += [f"- {key}: {' '.join(str(value).split())}" for key, value in lines.items()]
    write_atomic(folder / "README.md", "\n".join(card) + "\n")
    versions = {each: version(each) for each in ("transformers", "torch", "tokenizers", "gguf")}
    manifest = {
        "name": name,
        "licence": licence,
        "source": dict(source),
        "weights": weights,
        "fingerprint": mark,
        "versions": {"rlprompt": __version__, **versions},
        "files": {each.name: each.stat().st_size for each in sorted(folder.iterdir())},
    }
    write_atomic(folder / MANIFEST, to_json(manifest, indent=2) + "\n")
