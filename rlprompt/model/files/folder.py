"""From what a recipe calls a model to a folder that is worth loading.

A model is a name of the cache, a local folder or a hub id; each ends as a local folder, so that one
set of checks serves all three. The checks read file names and headers only: a wrong folder is
refused within a second, before any weight is read.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlprompt.errors import InputError
from rlprompt.model.files.converted import converted_folder, is_converted, list_converted
from rlprompt.model.files.fetch import EMBEDDED, fetch
from rlprompt.reading import json_text
from rlprompt.reading.files import DATA_BYTES, expanded, read_bytes, reason, require_regular
from rlprompt.reading.tensors import STORED, require_size

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_TIMEOUT_SECONDS = 10.0
HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.py")
HUB_FILES_SKIPPED = ("*/*", "consolidated*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
ADAPTER_FILE = "adapter_config.json"
READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".model", ".txt", ".py")
"""Of files that transformers may open in a model's folder."""
NOT_A_MODEL = {
    ADAPTER_FILE: "a PEFT adapter: name the model that it was trained on",
    "prompt.json": "an rlprompt artifact: name the base that it was trained on",
}


@dataclass(frozen=True)
class Source:
    """Where the files of a model are, and what to call it."""

    folder: Path
    id: str
    """A name of the cache, `org/name[@revision]`, or the absolute path of the folder."""


def locate(path: str, revision: str | None) -> Source:
    """Finds the folder of a model, fetching it when it is an embedded name or a hub id.

    Args:
        path: path, name or hub id, as a recipe's `model.path` has it.
        revision: branch, tag or commit of a hub id.

    Raises:
        InputError: If nothing has that name, it cannot be fetched, or `revision` is given for
            something that has none.
    """
    local = expanded(path, "model.path")
    if path in EMBEDDED:
        _refuse_revision(path, revision)
        return Source(fetch(path, progress=logger.info), path)
    if is_converted(path):
        _refuse_revision(path, revision)
        folder = converted_folder(path)
        if local.is_dir() and local.resolve() != folder.resolve():
            raise InputError(
                f"model.path is {path!r}, which is a converted model in the cache and a folder "
                f"here: write ./{path} for the folder, or {folder} for the converted one."
            )
        return Source(folder, path)
    if local.is_dir():
        _refuse_revision(path, revision)
        return Source(local.resolve(), str(local.resolve()))
    if local.exists():
        raise InputError(
            f"model.path is {path!r}, a file: give the folder that holds config.json and "
            "*.safetensors."
        )
    if HUB_ID.fullmatch(path):
        model_id = path if revision is None else f"{path}@{revision}"
        return Source(_fetch_from_hub(path, revision), model_id)
    raise InputError(
        f"model.path is {path!r}, which is no embedded model ({', '.join(EMBEDDED)}), no converted "
        f"one, no folder and no hub id (org/name); {_suggestion(path) or 'correct it.'}"
    )


def _refuse_revision(path: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(
            f"model.revision is {revision!r}, but {path!r} is not a hub id and has no revisions: "
            "remove model.revision."
        )


def _suggestion(path: str) -> str:
    """`did you mean ...?` with the nearest embedded name or neighbouring folder, or nothing."""
    wanted = expanded(path, "model.path")
    names = {name: name for name in _names()}
    if wanted.parent.is_dir():
        for entry in wanted.parent.iterdir():
            if entry.is_dir():
                names.setdefault(entry.name, str(entry))
    near = difflib.get_close_matches(wanted.name, names, n=1, cutoff=0.6)
    return f"did you mean {names[near[0]]!r}?" if near else ""


def _names() -> list[str]:
    """Models that can be named."""
    return [*EMBEDDED, *(row.name for row in list_converted())]


def _fetch_from_hub(repo: str, revision: str | None) -> Path:
    """The snapshot folder of a hub model: the newest, or the cached one when the hub is away."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        # A short question first: the download itself retries for minutes without a network.
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except errors.GatedRepoError as error:
        raise InputError(
            f"The hub model {repo!r} is gated: accept its licence on its page and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"The hub model {repo!r} has no revision {revision!r}: correct model.revision."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"model.path is {repo!r}, but no such folder exists here and the hub has no model of "
            f"that name that you may read; "
            f"{_suggestion(repo) or 'correct it, or set HF_TOKEN if the model is private.'}"
        ) from error
    except Exception as error:
        return _cached_snapshot(repo, revision, error)
    try:
        return Path(
            snapshot_download(
                repo,
                revision=info.sha,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_FILES_SKIPPED),
            )
        )
    except Exception as error:
        raise InputError(
            f"Downloading {repo!r} from the hub failed ({first_line(error)}): run it again to go "
            "on, or give model.path a local folder."
        ) from error


def _cached_snapshot(repo: str, revision: str | None, cause: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            local_files_only=True,
            allow_patterns=list(HUB_FILES),
            ignore_patterns=list(HUB_FILES_SKIPPED),
        )
    except Exception as error:
        reason = first_line(cause).split(". ")[0].rstrip(".")
        others = f"use an embedded model ({', '.join(EMBEDDED)})"
        hint = _suggestion(repo) or f"correct the path, connect to the network, or {others}."
        raise InputError(
            f"model.path is {repo!r}, but no such folder exists here, and if it is a hub id, it is "
            f"not in the cache and the hub cannot be reached ({reason}); {hint}"
        ) from error
    logger.warning("hub not reachable (%s): taking %s from its cache", first_line(cause), repo)
    return Path(folder)


def check_folder(folder: Path, trust_remote_code: bool) -> None:
    """Refuses a folder that cannot become a base, with the first reason found.

    Raises:
        InputError: If config.json, safe weights or the tokenizer are missing or damaged, if an
            adapter lies beside them, or if the model is quantised or needs its own code and
            `trust_remote_code` is off.
    """
    config = _read_config(folder)
    _check_config(folder, config, trust_remote_code)
    _refuse_adapter(folder)
    _check_weights(folder)
    _check_other_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"The model folder {folder} has no tokenizer ({' or '.join(TOKENIZER_FILES[:2])}): "
            "copy the tokenizer files of the model beside its weights."
        )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        for marker, what in NOT_A_MODEL.items():
            if (folder / marker).is_file():
                raise InputError(f"model.path {folder} is {what}.")
        raise InputError(
            f"The folder {folder} has no config.json, so it is not a model: give the folder that "
            "holds config.json and *.safetensors."
        )
    try:
        config = json_text.loads(read_bytes(file), lenient=True)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({reason(error)}): copy the file again."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{file} is not valid JSON ({first_line(error)}): copy the file again."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{file} holds no settings of a model: copy the file again.")
    stated = config.get("architectures") or []
    names = [config.get("model_type") or "", *(stated if isinstance(stated, list) else [stated])]
    if not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{file} has a model_type or architectures that are no names: copy the file again."
        )
    return config


def _check_config(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else ""
        )
        raise InputError(
            f"The model in {folder} is quantised ({method or quantization}), through which "
            "gradients to a prompt are not supported: use its full-precision version."
        )
    model_type = config.get("model_type")
    if "auto_map" in config and model_type not in CONFIG_MAPPING and not trust_remote_code:
        raise InputError(
            f"The model in {folder} runs its own Python code ({model_type}): read that code and "
            "set model.trust_remote_code: true, or choose another model."
        )
    if "auto_map" not in config and model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{folder / 'config.json'} has model_type {model_type!r}, which this version of "
            "transformers does not know: update transformers or choose another model."
        )


def _refuse_adapter(folder: Path) -> None:
    """Refuses what transformers would load into the weights without a word."""
    stray = folder / ADAPTER_FILE
    if os.path.lexists(stray):
        raise InputError(
            f"The model folder {folder} holds {stray.name} beside the model, an adapter that would "
            "change the frozen base: move that file away, or merge the adapter into the model and "
            "name the merged folder."
        )


def _check_other_files(folder: Path) -> None:
    """Refuses what a library would wait for, or read without end, beside the weights."""
    for file in sorted(folder.iterdir()):
        if file.suffix not in READ_SUFFIXES or file.is_dir():
            continue
        try:
            require_regular(file)
        except OSError as error:
            raise InputError(
                f"{file} cannot be read ({reason(error)}): copy the file again."
            ) from error


def _check_types(file: Path) -> None:
    """Refuses weights of element types that no layer here computes with."""
    with safe_open(str(file), framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (no mapping)
            kind = opened.get_slice(name).get_dtype()
            if kind not in STORED:
                raise InputError(
                    f"The weights file {file} holds {name} in the type {kind}, in which rlprompt "
                    "computes nothing: use the model's full-precision version."
                )


def _check_weights(folder: Path) -> None:
    files = _weight_files(folder)
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"The model folder {folder} has only pickled weights ({pickles[0]}), which can run "
                "code when read: convert them to safetensors with save_pretrained."
            )
        raise InputError(
            f"The model folder {folder} has no weights (model.safetensors): copy them there."
        )
    for file in files:
        if not file.is_file():
            raise InputError(
                f"The model folder {folder} lacks {file.name}, which its index names: "
                "download that file."
            )
        try:
            require_regular(file)
            require_size(file)
            _check_types(file)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"The weights file {file} is truncated or damaged ({first_line(error)}): "
                "download it again."
            ) from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; none when there are no safetensors."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        listed = json_text.loads(read_bytes(index, DATA_BYTES), lenient=True)["weight_map"]
        shards = {_file_name(shard) for shard in listed.values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The weight index {index} is damaged ({first_line(error)}): download it again."
        ) from error
    return [folder / shard for shard in sorted(shards)]


def _file_name(shard: object) -> str:
    if not isinstance(shard, str) or Path(shard).name != shard:
        raise ValueError(f"{str(shard)[:80]!r} is no file in that folder")
    return shard


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough to stand inside a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
