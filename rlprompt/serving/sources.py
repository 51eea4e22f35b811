"""Where served prompts come from: the folder of an artifact, or an alias in a registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlprompt.artifacts.identity import prompt_hash
from rlprompt.errors import InputError
from rlprompt.registry.records import Target, check_name, now
from rlprompt.registry.store import Registry
from rlprompt.serving.loaded import artifact_folder


class Found(NamedTuple):
    """An artifact that a source points to."""

    folder: Path
    """Its folder."""
    share: float
    """Share of the requests that it answers."""
    label: str
    """What its source calls it, such as `version 3`."""


class Source(Protocol):
    """What a name is served from."""

    def state(self) -> str:
        """A short text that changes when it points to something else."""
        ...

    def find(self) -> Sequence[Found]:
        """What it points to now.

        Raises:
            InputError: it points to nothing that can be read.
        """
        ...

    def history(self) -> list[dict[str, Any]]:
        """What it has pointed to, the oldest first."""
        ...

    def roll_back(self, why: str) -> bool:
        """Point to what was there before; False = there is nothing before.

        Args:
            why: the reason, for its history.
        """
        ...


class ArtifactSource:
    """The folder of an artifact, or of a run."""

    def __init__(self, path: Path) -> None:
        """Stand for a folder.

        Args:
            path: the folder of an artifact, or of a run.

        Raises:
            InputError: there is none.
        """
        self.folder = artifact_folder(path)
        if not (self.folder / "prompt.json").is_file():
            raise InputError(
                f"'{path}' holds no artifact; name the artifact/ folder of a run, the run, or "
                "REGISTRY@ALIAS"
            )
        self._history: list[dict[str, Any]] = []

    def state(self) -> str:
        """The hash of what the artifact is when it was last looked at, never newer by itself."""
        return ""

    def find(self) -> Sequence[Found]:
        """The folder; reading it anew is up to who loads it."""
        return (Found(self.folder, 1.0, str(self.folder)),)

    def history(self) -> list[dict[str, Any]]:
        """When it was loaded, and what it was."""
        return list(self._history)

    def note(self) -> None:
        """Write down that it is loaded now."""
        self._history.append({"at": now(), "to": prompt_hash(self.folder), "by": "rlprompt serve"})

    def roll_back(self, why: str) -> bool:
        """False: a folder has no past."""
        return False


class RegistrySource:
    """An alias of a name in a registry."""

    def __init__(self, folder: Path, name: str, alias: str) -> None:
        """Stand for an alias, which has to be there.

        Args:
            folder: folder of the registry.
            name: name of the prompt in it.
            alias: the alias.

        Raises:
            InputError: there is no such alias.
        """
        self._registry = Registry(folder)
        self._name, self._alias = name, alias
        self._registry.resolve(f"{name}@{alias}")

    def state(self) -> str:
        """What the alias points to, as a text."""
        return repr(self._targets())

    def find(self) -> Sequence[Found]:
        """The versions that the alias points to, with their shares."""
        found = []
        for target in self._targets():
            version = self._registry.version(self._name, target.version)
            folder = self._registry.path(version)
            found.append(Found(folder, target.share, f"version {target.version}"))
        if not found:
            raise InputError(
                f"'{self._name}@{self._alias}' points to nothing any more; promote a version, or "
                "unload the prompt"
            )
        return found

    def history(self) -> list[dict[str, Any]]:
        """The changes of the alias."""
        return [each.model_dump() for each in self._registry.history(self._name, self._alias)]

    def roll_back(self, why: str) -> bool:
        """Let the alias point to what it pointed to before its last change."""
        try:
            self._registry.roll_back(self._name, self._alias, why=why, by="rlprompt serve")
        except InputError:
            return False
        return True

    def _targets(self) -> tuple[Target, ...]:
        return self._registry.aliases(self._name).get(self._alias, ())


def parse_source(text: str) -> tuple[str, Source]:
    """The name and source of `NAME=ARTIFACT` or `NAME=REGISTRY[#PROMPT]@ALIAS`.

    Args:
        text: what the command line says.

    Raises:
        InputError: it is neither, or names nothing that is there.
    """
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise InputError(f"'{text}' names no prompt; write NAME=ARTIFACT, or NAME=REGISTRY@ALIAS")
    check_name(name, "the name")
    return name, source_of(name, rest)


def source_of(name: str, text: str) -> Source:
    """The source that a text stands for.

    Args:
        name: the name that it is served under, which is its name in a registry where none is given.
        text: the folder of an artifact or a run, or `REGISTRY[#PROMPT]@ALIAS`.

    Raises:
        InputError: it names nothing that is there.
    """
    folder, at, alias = text.rpartition("@")
    if not at or artifact_folder(text).joinpath("prompt.json").is_file():
        return ArtifactSource(Path(text))
    folder, _, other = folder.partition("#")
    if not Path(folder, "prompts").is_dir():
        raise InputError(
            f"'{folder}' is no registry, and '{text}' no artifact; name the folder of one of them"
        )
    return RegistrySource(Path(folder), other or name, alias)
