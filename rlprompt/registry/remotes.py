"""Versions to and from other places: another registry's folder, the Hugging Face hub, W&B.

    ../shared-registry          a folder
    hf://OWNER/REPO             a repository of the hub (`hf auth login`, or HF_TOKEN)
    wandb://ENTITY/PROJECT      an artifact of the type `prompt` (`wandb login`, or WANDB_API_KEY)

What is pulled is read like any artifact of a stranger: only files that an artifact has are taken,
and nothing in them is run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rlprompt.artifacts.identity import CERTIFICATE, SIGNATURE, artifact_files
from rlprompt.errors import InputError
from rlprompt.registry.records import Version
from rlprompt.registry.store import Registry

_HUB = "hf://"
_WANDB = "wandb://"
_PATTERNS = (
    "prompt.json", "prompt.safetensors", "README.md", "adapter/*", CERTIFICATE, SIGNATURE
)  # fmt: skip
"""Files that an artifact may have; no other file of a repository is downloaded."""


def push(registry: Registry, reference: str, to: str) -> str:
    """Copy a version to another place.

    Args:
        registry: the registry that has it.
        reference: the version, as `NAME@ALIAS` or `NAME:NUMBER`.
        to: the place; see the module.

    Returns:
        What it is called there.

    Raises:
        InputError: there is no such version, or the place refuses.
    """
    name, version = registry.resolve(reference)
    folder = registry.path(version)
    for scheme, send in _SENDERS.items():
        if to.startswith(scheme):
            return send(folder, to.removeprefix(scheme), name, version)
    there = Registry(to).add(
        folder, name, message=version.message, tags=version.tags, by=version.by
    )
    return f"{name}:{there.number}"


def pull(registry: Registry, source: str, name: str, *, reference: str = "") -> Version:
    """Take a version from another place into a registry.

    Args:
        registry: the registry that gets it.
        source: the place; see the module. The hub's may end in `@REVISION`, W&B's in `/NAME:ALIAS`.
        name: the prompt's name in the registry.
        reference: the version of a folder's registry, as `NAME@ALIAS` or `NAME:NUMBER`.

    Raises:
        InputError: it is not there, or is no artifact.
    """
    for scheme, fetched in _FETCHERS.items():
        if source.startswith(scheme):
            if reference:
                raise InputError(
                    f"'{source}' is one artifact, so '{reference}' names nothing in it; leave it "
                    "out"
                )
            with fetched(source.removeprefix(scheme)) as folder:
                return registry.add(folder, name, message=f"pulled from {source}")
    theirs = Registry(source)
    if not reference:
        known = ", ".join(theirs.names()) or "nothing"
        raise InputError(
            f"'{source}' is a registry and has {known}; say which version, as NAME@ALIAS or "
            "NAME:NUMBER"
        )
    _, version = theirs.resolve(reference)
    return registry.add(
        theirs.path(version), name, message=version.message, tags=version.tags, by=version.by
    )


def _to_hub(folder: Path, repo: str, name: str, version: Version) -> str:
    from huggingface_hub import HfApi

    _check_parts(_HUB, repo, 2, "OWNER/REPO")
    api = HfApi()
    message = version.message or f"{name} version {version.number} ({version.prompt[:12]})"
    try:
        api.create_repo(repo, exist_ok=True)
        files = [path.as_posix() for path in artifact_files(folder)]
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=files, commit_message=message
        )
    except Exception as error:  # the hub's client raises of many kinds, network errors among them
        raise _refused(_HUB + repo, "HF_TOKEN", error) from error
    return f"{_HUB}{repo}@{getattr(done, 'oid', 'main')}"


@contextmanager
def _from_hub(source: str) -> Iterator[Path]:
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    _check_parts(_HUB, repo, 2, "OWNER/REPO")
    with tempfile.TemporaryDirectory(prefix="rlprompt-pull-") as temporary:
        try:
            snapshot_download(
                repo,
                revision=revision or None,
                local_dir=temporary,
                allow_patterns=list(_PATTERNS),
            )
        except Exception as error:  # as above
            raise _refused(_HUB + source, "HF_TOKEN", error) from error
        yield Path(temporary)


def _to_wandb(folder: Path, project: str, name: str, version: Version) -> str:
    from rlprompt.tracking.wandb_tracker import log_folder

    entity, own = _check_parts(_WANDB, project, 2, "ENTITY/PROJECT")
    told = {"prompt": version.prompt, "content": version.content, "number": version.number}
    try:
        return _WANDB + log_folder(folder, entity, own, name, told)
    except Exception as error:  # as above
        raise _refused(_WANDB + project, "WANDB_API_KEY", error) from error


@contextmanager
def _from_wandb(source: str) -> Iterator[Path]:
    from rlprompt.tracking.wandb_tracker import download_folder

    _check_parts(_WANDB, source, 3, "ENTITY/PROJECT/NAME:ALIAS")
    with tempfile.TemporaryDirectory(prefix="rlprompt-pull-") as temporary:
        try:
            download_folder(source, Path(temporary))
        except Exception as error:  # as above
            raise _refused(_WANDB + source, "WANDB_API_KEY", error) from error
        yield Path(temporary)


def _check_parts(scheme: str, given: str, count: int, form: str) -> list[str]:
    parts = given.split("/")
    if len(parts) != count or not all(parts):
        raise InputError(f"'{scheme}{given}' is no place; write {scheme}{form}")
    return parts


def _refused(place: str, variable: str, error: Exception) -> InputError:
    why = " ".join(str(error).split())[:200] or type(error).__name__
    return InputError(f"'{place}' refused ({why}); check its name, the network and {variable}")


_SENDERS: Mapping[str, Callable[[Path, str, str, Version], str]] = {
    _HUB: _to_hub,
    _WANDB: _to_wandb,
}
_FETCHERS = {_HUB: _from_hub, _WANDB: _from_wandb}
