"""What a registry shows to those who only read: every version by name, and the text of texts.

A text prompt is shown word for word. Of a prompt that was learned as numbers there is no text to
show: it is listed with its kind and its hash, and neither its tensors nor the text that it began
with leave the registry.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.registry.records import Target, Version, check_name
from rlprompt.registry.store import Registry, chosen

_MOST_CONTENTS = 4096
"""Versions whose kind and text are kept; the one that was used least lately goes."""


class UnknownPromptError(InputError):
    """A registry has no such name, version or alias, or the version is no text."""


@dataclass(frozen=True)
class _Content:
    """What the files of a version say; they never change."""

    kind: str
    base: str
    text: str | None


@dataclass(frozen=True)
class CatalogVersion:
    """A version of a name as readers see it."""

    name: str
    """Name of the prompt."""
    version: Version
    """What the registry has written down of it."""
    kind: str
    """Kind of the prompt, such as `text` or `soft`."""
    base: str
    """Id of the base that it was made for."""
    text: str | None
    """The prompt word for word; None = it is no text."""
    aliases: tuple[str, ...]
    """Aliases that point to it, also with a share only."""

    def must_be_text(self) -> str:
        """The text.

        Raises:
            UnknownPromptError: it is none.
        """
        if self.text is None:
            raise UnknownPromptError(
                f"version {self.version.number} of '{self.name}' is a {self.kind} prompt, which "
                "has no text; serve it with rlprompt serve and ask for answers under it"
            )
        return self.text


class Catalog:
    """A registry that is only read, by any number of threads."""

    def __init__(self, folder: Path | str) -> None:
        """Stand for a registry.

        Args:
            folder: the registry's folder.

        Raises:
            InputError: it is no registry.
        """
        self._registry = Registry(folder)
        if not (self._registry.folder / "prompts").is_dir():
            raise InputError(
                f"'{folder}' is no registry; name the folder that rlprompt registry add has made"
            )
        self._lock = threading.Lock()
        self._contents: OrderedDict[str, _Content] = OrderedDict()

    def names(self) -> list[str]:
        """All names, in order.

        Raises:
            InputError: the registry is damaged.
        """
        return self._registry.names()

    def versions(self, name: str) -> list[CatalogVersion]:
        """All versions of a name, the oldest first.

        Args:
            name: the prompt's name.

        Raises:
            UnknownPromptError: there is no such name.
            InputError: the registry is damaged.
        """
        known = self._known(name)
        aliases = self._registry.aliases(name)
        return [self._shown(name, each, aliases) for each in known]

    def version(self, name: str, number: int) -> CatalogVersion:
        """One version of a name.

        Args:
            name: the prompt's name.
            number: number of the version, from 1.

        Raises:
            UnknownPromptError: there is none.
            InputError: the registry is damaged.
        """
        known = self._known(name)
        if not 1 <= number <= len(known):
            raise UnknownPromptError(
                f"'{name}' has no version {number}; its versions are 1 to {len(known)}"
            )
        return self._shown(name, known[number - 1], self._registry.aliases(name))

    def pointed(self, name: str, alias: str, key: str | None = None) -> CatalogVersion:
        """The version that an alias points to.

        Args:
            name: the prompt's name.
            alias: the alias.
            key: what an alias with shares decides by, such as a user's id: equal keys get the same
                version. None = each call is drawn by the shares.

        Raises:
            UnknownPromptError: there is no such name or alias.
            InputError: the registry is damaged.
        """
        self._known(name)
        aliases = self._registry.aliases(name)
        targets = aliases.get(alias)
        if not targets:
            others = ", ".join(sorted(aliases)) or "none"
            raise UnknownPromptError(f"'{name}' has no alias {alias[:80]!r}; it has {others}")
        target = chosen(targets, secrets.token_hex(16) if key is None else key)
        return self.version(name, target.version)

    def aliases(self, name: str) -> dict[str, tuple[Target, ...]]:
        """What each alias of a name points to.

        Args:
            name: the prompt's name.

        Raises:
            UnknownPromptError: there is no such name.
            InputError: the registry is damaged.
        """
        self._known(name)
        return self._registry.aliases(name)

    def updated(self, name: str) -> str:
        """UTC time (ISO 8601) of the last change of a name: a version, or an alias.

        Args:
            name: the prompt's name.

        Raises:
            UnknownPromptError: there is no such name.
            InputError: the registry is damaged.
        """
        changes = [each.at for each in self._registry.history(name)]
        return max([each.at for each in self._known(name)] + changes)

    def _known(self, name: str) -> list[Version]:
        try:
            check_name(name, "the name")
        except InputError as error:
            raise UnknownPromptError(str(error)) from error
        if not self._registry.has(name):
            raise UnknownPromptError(f"the registry has no prompt '{name}'")
        return self._registry.versions(name)

    def _shown(
        self, name: str, version: Version, aliases: dict[str, tuple[Target, ...]]
    ) -> CatalogVersion:
        content = self._content(version)
        pointing = sorted(
            alias
            for alias, targets in aliases.items()
            if any(target.version == version.number for target in targets)
        )
        return CatalogVersion(
            name, version, content.kind, content.base, content.text, tuple(pointing)
        )

    def _content(self, version: Version) -> _Content:
        """Kind and text of a version, whose files are checked when they are first read."""
        with self._lock:
            found = self._contents.get(version.content)
            if found is not None:
                self._contents.move_to_end(version.content)
                return found
        info = read_artifact_info(self._registry.path(version))
        is_text = info.representation == TextPrompt.kind
        made = _Content(info.representation, info.base, info.init_text if is_text else None)
        with self._lock:
            self._contents[version.content] = made
            if len(self._contents) > _MOST_CONTENTS:
                self._contents.popitem(last=False)
        return made
