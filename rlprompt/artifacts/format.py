"""The artifact: a learned prompt as a directory, separate from the model.

    prompt.safetensors   the tensors of its representation
    prompt.json          what it is, what it was made on, and how
    README.md            a card for people

An artifact belongs to one base (by fingerprint) and one chat template (by hash): under another one
the same tensors mean something else, so loading there is refused unless forced.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from rlprompt.artifacts.card import card
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.settings import Settings
from rlprompt.training.files import to_json, write_atomic

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class ArtifactInfo(Settings):
    """The content of prompt.json."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format."""
    name: str
    """Name of the recipe."""
    representation: str
    """`soft` or `text`."""
    num_virtual_tokens: int
    """Positions in the slot."""
    init_text: str
    """What the prompt started from, or is."""
    base: str
    """Id of the base."""
    base_fingerprint: str
    """Hash over the base's weights."""
    template_hash: str
    """Hash over the chat template."""
    created: str
    """UTC time, ISO 8601."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Held-out results."""
    certificate: dict[str, Any] | None = None
    """Risk certificate, when one was issued."""


_LOADERS: dict[str, Callable[[Mapping[str, torch.Tensor], ArtifactInfo], Prompt]] = {
    "soft": lambda tensors, info: SoftPrompt(tensors["embeddings"], info.init_text),
    "text": lambda tensors, info: TextPrompt(info.init_text),
}


def save_artifact(
    folder: Path,
    policy: Policy,
    prompt: Prompt,
    *,
    name: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> ArtifactInfo:
    """Write a prompt as an artifact; each file atomically, prompt.json last.

    Args:
        folder: made if absent.
        policy: says which base and template the prompt belongs to.
        prompt: soft or text.
        name: of the recipe.
        recipe: resolved, as plain values.
        metrics: held-out results for the card.

    Raises:
        InputError: the representation has no artifact form.
    """
    if prompt.kind not in _LOADERS:
        raise InputError(f"a {prompt.kind} prompt cannot be saved as an artifact")
    folder.mkdir(parents=True, exist_ok=True)
    state = prompt.state_dict()
    length = state["embeddings"].shape[0] if state else len(policy.slot_ids(prompt.init_text))
    info = ArtifactInfo(
        name=name,
        representation=prompt.kind,
        num_virtual_tokens=int(length),
        init_text=prompt.init_text,
        base=policy.base.id,
        base_fingerprint=policy.base.fingerprint,
        template_hash=policy.slot.template_hash,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=dict(recipe),
        metrics=dict(metrics),
    )
    write_atomic(folder / "prompt.safetensors", save(state, {"format": "pt"}))
    write_atomic(folder / "README.md", card(info.model_dump()))
    write_atomic(folder / "prompt.json", to_json(info.model_dump(), indent=2))
    return info


def read_artifact_info(folder: Path) -> ArtifactInfo:
    """The content of an artifact's prompt.json.

    Raises:
        InputError: there is no artifact, or it is damaged or of a newer version.
    """
    path = Path(folder) / "prompt.json"
    if not path.is_file():
        raise InputError(
            f"'{folder}' is not an artifact (no prompt.json); name the artifact/ folder of a run"
        )
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' is damaged ({error}); copy the artifact again") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"'{path}' has schema version {version}, this rlprompt reads {SCHEMA_VERSION}; install "
            "the version that wrote it"
        )
    try:
        return ArtifactInfo(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"'{path}' is damaged ({where}: {first['msg']}); copy the artifact again"
        ) from error


def load_artifact(folder: Path, policy: Policy, *, force: bool = False) -> Prompt:
    """The prompt of an artifact, for a policy's base.

    Args:
        folder: the artifact.
        policy: over the base it is to be used on.
        force: load although base or template differ; a warning is logged.

    Raises:
        InputError: the artifact is damaged, or belongs to another base or template.
    """
    info = read_artifact_info(folder)
    _check_belongs(info, folder, policy, force)
    if info.representation not in _LOADERS:
        raise InputError(
            f"'{folder}' holds a {info.representation} prompt, this rlprompt knows "
            f"{', '.join(_LOADERS)}; install the version that wrote it"
        )
    path = Path(folder) / "prompt.safetensors"
    try:
        tensors = load_file(path)
        prompt = _LOADERS[info.representation](tensors, info)
    except (OSError, SafetensorError, KeyError) as error:
        raise InputError(f"'{path}' cannot be read ({error}); copy the artifact again") from error
    _check_tensors(tensors, info, path, policy)
    return prompt


def _check_belongs(info: ArtifactInfo, folder: Path, policy: Policy, force: bool) -> None:
    differs = []
    if info.base_fingerprint != policy.base.fingerprint:
        differs.append(
            f"base {info.base} ({info.base_fingerprint[:12]}), not {policy.base.id} "
            f"({policy.base.fingerprint[:12]})"
        )
    if info.template_hash != policy.slot.template_hash:
        differs.append(
            f"chat template {info.template_hash[:12]}, not {policy.slot.template_hash[:12]}"
        )
    if not differs:
        return
    message = f"artifact '{folder}' was made on {' and on '.join(differs)}"
    if not force:
        raise InputError(f"{message}; use what it was made on, or --force to load it all the same")
    logger.warning("%s; loaded because it was forced", message)


def _check_tensors(
    tensors: Mapping[str, torch.Tensor], info: ArtifactInfo, path: Path, policy: Policy
) -> None:
    embeddings = tensors.get("embeddings")
    if embeddings is None:
        return
    width = policy.base.hidden_size
    if embeddings.dim() != 2 or embeddings.shape[1] != width:
        raise InputError(
            f"'{path}' holds embeddings of shape {tuple(embeddings.shape)}, {policy.base.id} needs "
            f"width {width}; use the base it was made on"
        )
    if embeddings.shape[0] != info.num_virtual_tokens:
        raise InputError(
            f"'{path}' holds {embeddings.shape[0]} embeddings, prompt.json says "
            f"{info.num_virtual_tokens}; copy the artifact again"
        )
    if not bool(embeddings.isfinite().all()):
        raise InputError(f"'{path}' holds values that are not finite; copy the artifact again")
