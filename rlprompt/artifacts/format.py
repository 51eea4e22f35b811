"""The artifact: a learned prompt as a directory, separate from the model.

    prompt.safetensors   the tensors of its representation
    prompt.json          what it is, what it was made on, and how
    README.md            a card for people
    certificate.json     what has been certified of it, where something has
    signature.json       who vouches for these files, where somebody does
    adapter/             of an adapter: its weights in PEFT's own files

Tensors by representation: `soft` has embeddings [m, d], `prefix` has keys_values
[L, 2, H_kv, m, D], a `sequence` has those of its parts under 0/, 1/ and so on, `text` and `adapter`
have none. Files are safetensors and JSON only: reading one runs no code, and none is read past its
limits (`reading`, `identity`). What it is called by, and what is signed, is `content_hash`.

Version 2 added `details` and the representations beside soft and text, version 3 endpoints and
`system_role`. Versions 1 and 2 are read as well; `migration` writes them anew.

A representation of the user's own is read only where the caller names its class: an artifact may
come from a stranger, and what its recipe names is never imported.

An artifact belongs to one base (by fingerprint) and one chat template (by hash): under another one
the same tensors mean something else, so loading there is refused unless forced. A text that was
found for a model behind an endpoint belongs to the name of that model.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from rlprompt.artifacts.card import card
from rlprompt.artifacts.certificate import Certificate, drop_certificate, read_certificate
from rlprompt.artifacts.identity import CERTIFICATE, artifact_files
from rlprompt.artifacts.signature import drop_signature, read_signature
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt, SavedPrompt
from rlprompt.prompts.make import PROMPTS
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.target import Target
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.reading import json_text
from rlprompt.reading.files import DATA_BYTES, read_bytes, reason
from rlprompt.reading.tensors import read_tensors
from rlprompt.settings import Settings

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 3
"""Of what is written; published as `rlprompt schema --artifact`."""
READABLE = (1, 2, 3)
"""Versions that are read."""
_SUFFIXES = (".safetensors", ".json", ".md")
"""Of all files that an artifact may have."""


class ArtifactInfo(Settings):
    """The content of prompt.json."""

    schema_version: int = SCHEMA_VERSION
    """Version of this format."""
    name: str
    """Name of the recipe."""
    representation: str
    """A key of `rlprompt.prompts.make.PROMPTS`, or the `kind` of a class of the user's own."""
    num_virtual_tokens: int | None
    """Positions in the slot; None for a model behind an endpoint, whose tokens are not known."""
    init_text: str
    """What the prompt started from, or is; of an adapter, the text that it stands on."""
    details: dict[str, Any] = Field(default_factory=dict)
    """What the representation needs beside its tensors."""
    base: str
    """Id of the base."""
    base_fingerprint: str | None
    """Hash over the base's weights; None for a model behind an endpoint."""
    template_hash: str | None
    """Hash over the chat template; None for a model behind an endpoint."""
    system_role: bool | None = None
    """Whether the chat template has a system role, else the prompt opens the first user turn; None
    where it is not known."""
    endpoint: dict[str, str] | None = None
    """`base_url` and `model` of a model behind an endpoint; None for a base that was loaded."""
    created: str
    """UTC time, ISO 8601."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """The resolved recipe."""
    metrics: dict[str, Any] = Field(default_factory=dict)
    """Held-out results."""
    certificate: dict[str, Any] | None = None
    """Risk certificate, when one was issued."""


def artifact_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of prompt.json, as this version writes it."""
    schema = ArtifactInfo.model_json_schema()
    schema["properties"]["schema_version"] = {
        "const": SCHEMA_VERSION,
        "description": "Version of this format.",
    }
    schema["required"] = sorted({*schema["required"], "schema_version"})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": f"rlprompt artifact, version {SCHEMA_VERSION}: prompt.json",
    }


def save_artifact(
    folder: Path,
    target: Target,
    prompt: Prompt,
    *,
    name: str,
    recipe: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> ArtifactInfo:
    """Write a prompt as an artifact; each file atomically, prompt.json last.

    Args:
        folder: the folder, which is made if absent.
        target: the model that the prompt belongs to.
        prompt: any prompt but `NonePrompt`.
        name: the name of the recipe.
        recipe: the resolved recipe, as plain values.
        metrics: the held-out results for the card.

    Raises:
        InputError: the prompt has no artifact form.
    """
    if isinstance(prompt, NonePrompt):
        raise InputError(f"a {prompt.kind} prompt cannot be saved as an artifact")
    info = ArtifactInfo(
        name=name,
        representation=prompt.kind,
        num_virtual_tokens=target.positions(prompt),
        init_text=prompt.init_text,
        details=prompt.artifact_details(),
        base=target.id,
        base_fingerprint=target.fingerprint,
        template_hash=target.template_hash,
        system_role=not target.slot.folds_system if isinstance(target, Policy) else None,
        endpoint=None if target.endpoint is None else dict(target.endpoint),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=dict(recipe),
        metrics=dict(metrics),
    )
    drop_certificate(folder)  # it was another prompt's
    drop_signature(folder)
    for name, content in prompt.artifact_files(target.id).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
    write_atomic(folder / "README.md", card(info.model_dump()))
    write_atomic(folder / "prompt.json", to_json(info.model_dump(), indent=2))
    return info


def certify_artifact(folder: Path, certificate: Certificate) -> None:
    """Put a certificate into an artifact, in place of the one that is there, and onto its card.

    Args:
        folder: folder of the artifact.
        certificate: certificate of this prompt.

    Raises:
        InputError: the artifact is damaged, or cannot be written.
    """
    info = read_artifact_info(folder)
    if drop_signature(folder):
        logger.warning(
            "the signature of '%s' was removed, as it was without this certificate", folder
        )
    try:
        write_atomic(Path(folder) / CERTIFICATE, to_json(certificate.model_dump(), indent=1) + "\n")
        shown = {**info.model_dump(), "certificate": {"statement": certificate.statement}}
        write_atomic(Path(folder) / "README.md", card(shown))
    except OSError as error:
        raise InputError(
            f"'{folder}' cannot be written ({error.strerror}); name an artifact that can"
        ) from error


def read_artifact_info(folder: Path) -> ArtifactInfo:
    """The content of an artifact's prompt.json.

    Raises:
        InputError: there is no artifact, or it is damaged or of a newer version.
    """
    path = Path(folder) / "prompt.json"
    try:
        content = json_text.loads(read_bytes(path))
        version = content["schema_version"]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"'{folder}' is not an artifact (no prompt.json); name one, or the folder of a run that"
            " has one"
        ) from error
    except OSError as error:
        why = reason(error)
        raise InputError(f"'{path}' cannot be read ({why}); copy the artifact again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{path}' is damaged ({error}); copy the artifact again") from error
    if version not in READABLE:
        raise InputError(
            f"'{path}' has schema version {version}, this rlprompt reads "
            f"{', '.join(map(str, READABLE))}; install the version that wrote it"
        )
    try:
        return ArtifactInfo(**content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"'{path}' is damaged ({where}: {first['msg']}); copy the artifact again"
        ) from error


def check_files(folder: Path) -> ArtifactInfo:
    """Read all files of an artifact without a base: what `load_artifact` refuses of any base.

    Args:
        folder: the artifact.

    Returns:
        The content of its prompt.json.

    Raises:
        InputError: a file is damaged, missing, too large or of another kind, or certificate or
            signature are those of another artifact.
    """
    folder = Path(folder)
    info = read_artifact_info(folder)
    for name in artifact_files(folder, follow_links=True):
        if name.suffix not in _SUFFIXES:
            raise InputError(
                f"'{folder / name}' is no file that an artifact has ({', '.join(_SUFFIXES)}); "
                "remove it"
            )
    _require_whole(folder)
    path = folder / "prompt.safetensors"
    try:
        for each in (path, *sorted(folder.glob("adapter/*.safetensors"))):
            path = each  # for the error
            tensors = read_tensors(path)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise ValueError("it holds values that are not finite")
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(f"'{path}' cannot be read ({why}); copy the artifact again") from error
    return info


def load_artifact(
    folder: Path, policy: Policy, *, force: bool = False, own: Iterable[type[Prompt]] = ()
) -> Prompt:
    """The prompt of an artifact, for a policy's base.

    Args:
        folder: the artifact.
        policy: a policy over the base that the prompt is to be used on.
        force: whether to load although base or template differ; a warning is logged then.
        own: classes of the user's own that it may be of, beside the built-in ones.

    Raises:
        InputError: the artifact is damaged, belongs to another base or template, or is of a class
            that is neither built in nor named; or its certificate is another prompt's, or its
            signature that of other files.
    """
    info = read_artifact_info(folder)
    _require_whole(folder)
    _check_belongs(info, folder, policy, force)
    kinds = {**PROMPTS, **{each.kind: each for each in own}}
    _require_known(info, folder, kinds)
    path = Path(folder) / "prompt.safetensors"
    try:
        tensors = read_tensors(path)
        saved = SavedPrompt(info.init_text, tensors, info.details, _reader(Path(folder)), kinds)
        prompt = kinds[info.representation].restore(saved)
        _refuse_unused(prompt, tensors)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise InputError(f"'{path}' cannot be read ({why}); copy the artifact again") from error
    _check_prompt(prompt, info, path, policy)
    return prompt


def load_text_artifact(folder: Path, target: Target, *, force: bool = False) -> TextPrompt:
    """The text of an artifact, for a model behind an endpoint.

    Args:
        folder: the artifact.
        target: the model that the text is to be used on.
        force: whether to take a text of another model; a warning is logged then.

    Raises:
        InputError: the artifact is damaged, holds no text, or belongs to another model.
    """
    info = read_artifact_info(folder)
    _require_whole(folder)
    if info.representation != TextPrompt.kind:
        raise InputError(
            f"'{folder}' holds a prompt of the kind {info.representation}, and {target.id} takes "
            "texts only; evaluate it on its own base"
        )
    named, wanted = info.endpoint or {}, target.endpoint or {}
    if named.get("model") != wanted.get("model") or not named:
        message = f"artifact '{folder}' was made for {info.base}, not for {target.id}"
        if not force:
            raise InputError(f"{message}; use what it was made for, or --force to take its text")
        logger.warning("%s; its text is taken because that was forced", message)
    return TextPrompt(info.init_text)


def _require_whole(folder: Path) -> None:
    """Refuse an artifact whose certificate or signature is that of another one."""
    read_certificate(folder)
    read_signature(folder)


def _require_known(info: ArtifactInfo, folder: Path, kinds: Mapping[str, object]) -> None:
    """Refuse a prompt, or a part of a sequence, that is of no known class."""
    parts = info.details.get("parts") if info.representation == "sequence" else None
    described = parts if isinstance(parts, list) else []
    parts_of = [str(part.get("kind")) for part in described if isinstance(part, dict)]
    for name in (info.representation, *parts_of):
        if name not in kinds:
            raise InputError(
                f"'{folder}' holds a prompt of the kind '{name}', and known are "
                f"{', '.join(kinds)}; if it is your own, name its class (in the recipe as "
                "prompt.type, or with --prompt-class), else install the version that wrote it"
            )


def _reader(folder: Path) -> Callable[[str], bytes]:
    return lambda name: read_bytes(folder / name, DATA_BYTES)


def _refuse_unused(prompt: Prompt, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that the prompt would not write itself."""
    unused = sorted(tensors.keys() - prompt.artifact_tensors().keys())
    if unused:
        raise ValueError(f"a {prompt.kind} prompt has no tensor {unused[0][:80]!r}")


def _check_belongs(info: ArtifactInfo, folder: Path, policy: Policy, force: bool) -> None:
    differs = []
    if info.endpoint is not None:
        differs.append(f"{info.base}, not {policy.base.id}")
    elif info.base_fingerprint != policy.base.fingerprint:
        differs.append(
            f"base {info.base} ({str(info.base_fingerprint)[:12]}), not {policy.base.id} "
            f"({policy.base.fingerprint[:12]})"
        )
    if info.endpoint is None and info.template_hash != policy.slot.template_hash:
        differs.append(
            f"chat template {str(info.template_hash)[:12]}, not {policy.slot.template_hash[:12]}"
        )
    if not differs:
        return
    message = f"artifact '{folder}' was made on {' and on '.join(differs)}"
    if not force:
        raise InputError(f"{message}; use what it was made on, or --force to load it all the same")
    logger.warning("%s; loaded because it was forced", message)


def _check_prompt(prompt: Prompt, info: ArtifactInfo, path: Path, policy: Policy) -> None:
    try:
        prompt.check(policy)
    except ValueError as error:
        raise InputError(
            f"'{path}' does not fit {policy.base.id} ({error}); use the base it was made on"
        ) from error
    if not all(_is_usable(tensor, policy.base.dtype) for tensor in prompt.state_dict().values()):
        raise InputError(
            f"'{path}' holds values that are not finite in {policy.base.dtype} or as squares; copy "
            "the artifact again"
        )
    positions = _slot_positions(prompt, policy) + len(policy.head_ids)
    if positions > policy.forward.max_positions:
        raise InputError(
            f"'{path}' holds a prompt of {positions} positions with the template's head, and "
            f"{policy.base.id} has {policy.forward.max_positions}; use the base it was made on"
        )
    with torch.no_grad():
        prefix = policy.prefix(prompt)
    if not all(bool(each.isfinite().all()) for each in (*prefix.keys, *prefix.values)):
        raise InputError(
            f"'{path}' holds values that the base turns into infinities; copy the artifact again"
        )
    length = prefix.num_tokens - len(policy.head_ids)
    if length != info.num_virtual_tokens and info.endpoint is None:
        raise InputError(
            f"'{path}' holds {length} positions, prompt.json says {info.num_virtual_tokens}; copy "
            "the artifact again"
        )


def _is_usable(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether values stay finite in the base's dtype, and in the sums of squares of its norms."""
    if not tensor.is_floating_point():
        return True
    wide = tensor.to(dtype).to(torch.promote_types(dtype, torch.float32))
    return bool(wide.isfinite().all()) and bool(wide.square().sum().isfinite())


def _slot_positions(prompt: Prompt, policy: Policy) -> int:
    """Positions of the slot that a built-in prompt takes, without computing its prefix."""
    if isinstance(prompt, SequencePrompt):
        return sum(_slot_positions(part, policy) for part in prompt.parts)
    if isinstance(prompt, SoftPrompt | PrefixPrompt):
        return prompt.num_virtual_tokens
    if isinstance(prompt, TextPrompt | AdapterPrompt):
        return len(policy.slot_ids(prompt.init_text))
    return 0
