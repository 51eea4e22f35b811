"""The registry: a folder that many may write to at once, and that a crash cannot spoil.

    objects/HASH/               an artifact, by the hash of all its files; never changed
    prompts/NAME/versions.jsonl versions of a name, appended
    prompts/NAME/aliases.jsonl  changes of its aliases, appended
    prompts/NAME/protected.json what an alias demands of a version
    incoming/                   artifacts that are being copied; what a crash leaves is swept

Whoever writes holds the lock of the registry (`flock`, so a killed process holds none). An object
is complete under its name or not there at all, and a version is written down only after its object
is. Readers need no lock: they see complete lines of files that only grow.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from rlprompt.artifacts.certificate import read_certificate
from rlprompt.artifacts.format import read_artifact_info
from rlprompt.artifacts.identity import artifact_files, content_hash, prompt_hash
from rlprompt.artifacts.signature import read_signature
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.registry.gate import failures, fulfilled
from rlprompt.registry.records import (
    AliasChange,
    Protection,
    Target,
    Version,
    check_name,
    now,
    whoever,
)
from rlprompt.settings import Settings

_Record = TypeVar("_Record", bound=Settings)

_VERSIONS = "versions.jsonl"
_ALIASES = "aliases.jsonl"
_PROTECTED = "protected.json"
_MOST_BYTES = 256 << 20
"""Most that a file of records may have."""


class Registry:
    """Named prompts with their versions and aliases."""

    def __init__(self, folder: Path | str) -> None:
        """Stand for a folder, which the first `add` makes.

        Args:
            folder: the registry's folder.

        Raises:
            InputError: it is something else than a folder.
        """
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"'{folder}' is no folder; name the folder of a registry")

    def add(
        self,
        artifact: Path,
        name: str,
        *,
        message: str = "",
        tags: Sequence[str] = (),
        by: str | None = None,
    ) -> Version:
        """Take an artifact in as the next version of a name; the artifact itself is copied.

        What is there already, file by file, gets no second version.

        Args:
            artifact: folder of the artifact.
            name: the prompt's name.
            message: why it is added.
            tags: words to find it by.
            by: who adds it; None = whoever is at work.

        Raises:
            InputError: it is no artifact, carries another prompt's certificate or the signature of
                other files, or the name or a tag cannot be used.
        """
        check_name(name, "the name")
        words = tuple(dict.fromkeys(check_name(tag, "the tag") for tag in tags))
        artifact = Path(artifact)
        read_artifact_info(artifact)
        with self._writing():
            incoming = self._copied(artifact)
            try:
                read_artifact_info(incoming)
                read_certificate(incoming)
                read_signature(incoming)
                content, prompt = content_hash(incoming), prompt_hash(incoming)
                self._keep(incoming, content)
            finally:
                shutil.rmtree(incoming, ignore_errors=True)
            known = self.versions(name) if name in self.names() else []
            for version in known:
                if version.content == content:
                    return version
            version = Version(
                number=len(known) + 1,
                content=content,
                prompt=prompt,
                tags=words,
                message=message,
                by=by or whoever(),
                at=now(),
            )
            self._append(name, _VERSIONS, version)
            return version

    def names(self) -> list[str]:
        """All names that have a version, in order."""
        prompts = self.folder / "prompts"
        if not prompts.is_dir():
            return []
        return sorted(p.name for p in prompts.iterdir() if _records(p / _VERSIONS, Version))

    def has(self, name: str) -> bool:
        """Whether a name has a version.

        Args:
            name: the prompt's name.

        Raises:
            InputError: it cannot be a name, or the file of its versions is damaged.
        """
        return bool(_records(self._of(name) / _VERSIONS, Version))

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the oldest first.

        Raises:
            InputError: there is no such name.
        """
        found = _records(self._of(name) / _VERSIONS, Version)
        if not found:
            known = ", ".join(self.names()) or "none"
            raise InputError(f"the registry has no prompt '{name}'; it has {known}")
        return found

    def version(self, name: str, number: int) -> Version:
        """One version of a name.

        Raises:
            InputError: there is none.
        """
        found = self.versions(name)
        if not 1 <= number <= len(found):
            raise InputError(
                f"'{name}' has no version {number}; it has 1 to {len(found)}"
                if len(found) > 1
                else f"'{name}' has no version {number}; it has version 1 only"
            )
        return found[number - 1]

    def aliases(self, name: str) -> dict[str, tuple[Target, ...]]:
        """What each alias of a name points to now."""
        current: dict[str, tuple[Target, ...]] = {}
        for change in self.history(name):
            current.pop(change.alias, None)
            if change.to:
                current[change.alias] = change.to
        return current

    def history(self, name: str, alias: str | None = None) -> list[AliasChange]:
        """All changes of aliases, the oldest first.

        Args:
            name: the prompt's name.
            alias: the only alias that is wanted; None = all.
        """
        self.versions(name)
        changes = _records(self._of(name) / _ALIASES, AliasChange)
        return [each for each in changes if alias in (None, each.alias)]

    def resolve(self, reference: str, key: str = "") -> tuple[str, Version]:
        """The name and version that `NAME@ALIAS` or `NAME:NUMBER` stands for.

        There is no "latest": what is served is what somebody has pointed to.

        Args:
            reference: the reference.
            key: what an alias with shares decides by, such as a user's id: equal keys always get
                the same version.

        Raises:
            InputError: it stands for nothing.
        """
        name, at, alias = reference.partition("@")
        if at:
            targets = self.aliases(check_name(name, "the name")).get(alias)
            if not targets:
                known = ", ".join(self.aliases(name)) or "none"
                raise InputError(f"'{name}' has no alias '{alias}'; it has {known}")
            return name, self.version(name, chosen(targets, key).version)
        name, colon, number = reference.partition(":")
        if not colon or not number.isdecimal():
            raise InputError(f"'{reference}' names no version; write NAME@ALIAS, or NAME:NUMBER")
        return name, self.version(check_name(name, "the name"), int(number))

    def path(self, version: Version) -> Path:
        """The folder of a version's artifact; nobody may write to it.

        Raises:
            InputError: its files are not those that were added.
        """
        folder = self.folder / "objects" / version.content
        if not folder.is_dir() or content_hash(folder) != version.content:
            raise InputError(
                f"the files of version {version.number} in '{self.folder}/objects' are not those "
                "that were added; restore them from a copy of the registry"
            )
        return folder

    def point(
        self,
        name: str,
        alias: str,
        to: Sequence[Target],
        *,
        why: str = "",
        by: str | None = None,
        force: bool = False,
    ) -> AliasChange:
        """Let an alias point to versions, or with none remove it.

        Args:
            name: the prompt's name.
            alias: the alias.
            to: versions with their shares, which sum to 1.
            why: the reason.
            by: who does it; None = whoever is at work.
            force: whether the alias's protection is overruled; the history says so.

        Raises:
            InputError: a version is not there, the shares do not sum to 1, or the alias is
                protected and a version does not fulfil what it demands.
        """
        check_name(alias, "the alias")
        targets = _checked_shares(to)
        with self._writing():
            for target in targets:
                self.path(self.version(name, target.version))
            before = self.aliases(name).get(alias, ())
            if not targets and not before:
                raise InputError(f"'{name}' has no alias '{alias}', so it cannot be removed")
            passed, refused = self._gated(name, alias, targets)
            if refused and not force:
                raise InputError(
                    f"'{name}@{alias}' is protected: {'; '.join(refused)}; choose another version, "
                    "or overrule it with --force and a reason"
                )
            if refused and not why.strip():
                raise InputError(
                    f"'{name}@{alias}' is protected, and overruling it needs a reason; give --why"
                )
            change = AliasChange(
                alias=alias,
                to=targets,
                before=before,
                why=why,
                passed=passed,
                forced=bool(refused),
                by=by or whoever(),
                at=now(),
            )
            self._append(name, _ALIASES, change)
            return change

    def roll_back(
        self, name: str, alias: str, *, why: str = "", by: str | None = None
    ) -> AliasChange:
        """Let an alias point to what it pointed to before its last change.

        A second call goes one change further back, past what was rolled back; the history keeps
        all of them. What an alias has pointed to before is not held to its protection again.

        Raises:
            InputError: there is nothing before.
        """
        with self._writing():
            states = _states(self.history(name, alias))
            if not states:
                raise InputError(f"'{name}' has no alias '{alias}'; point it with promote")
            if len(states) < 2 or not states[-2]:
                raise InputError(
                    f"'{name}@{alias}' has pointed to nothing before; point it with promote"
                )
            change = AliasChange(
                alias=alias,
                to=states[-2],
                before=self.aliases(name).get(alias, ()),
                why=why,
                is_rollback=True,
                by=by or whoever(),
                at=now(),
            )
            self._append(name, _ALIASES, change)
            return change

    def protect(self, name: str, alias: str, protection: Protection) -> None:
        """Demand something of every version that an alias will point to.

        Args:
            name: the prompt's name.
            alias: the alias, which need not be there yet.
            protection: what is demanded; one without any demand lifts it.
        """
        check_name(alias, "the alias")
        self.versions(name)
        with self._writing():
            all_of_it = {**self.protections(name), alias: protection}
            kept = {key: each.model_dump() for key, each in all_of_it.items() if _demands(each)}
            write_atomic(self._of(name) / _PROTECTED, to_json(kept, indent=1) + "\n")

    def protections(self, name: str) -> Mapping[str, Protection]:
        """What each protected alias of a name demands.

        Raises:
            InputError: the file is damaged.
        """
        path = self._of(name) / _PROTECTED
        try:
            content = json_text.loads(read_bytes(path))
            return {alias: Protection.model_validate(each) for alias, each in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            why = reason(error) if isinstance(error, OSError) else error
            raise InputError(
                f"'{path}' is damaged ({why}); protect the aliases of '{name}' again"
            ) from error

    def _gated(
        self, name: str, alias: str, targets: Sequence[Target]
    ) -> tuple[tuple[str, ...], list[str]]:
        """What the versions fulfil of the alias's protection, and what not, in words."""
        protection = self.protections(name).get(alias)
        if protection is None:
            return (), []
        passed: list[str] = []
        refused: list[str] = []
        for target in targets:
            folder = self.path(self.version(name, target.version))
            mark = f"version {target.version} "
            passed += [mark + each for each in fulfilled(folder, protection)]
            refused += [mark + each for each in failures(folder, protection)]
        return tuple(passed), refused

    def _of(self, name: str) -> Path:
        return self.folder / "prompts" / check_name(name, "the name")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the registry's lock, and clear what a crash has left."""
        try:
            for part in ("objects", "prompts", "incoming"):
                (self.folder / part).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(
                f"the registry '{self.folder}' cannot be written ({error.strerror}); name a folder "
                "that can"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in (self.folder / "incoming").iterdir():
                shutil.rmtree(left, ignore_errors=True)
            yield
        finally:
            os.close(lock)

    def _copied(self, artifact: Path) -> Path:
        """A copy of an artifact's files, all on disk."""
        incoming = self.folder / "incoming" / uuid.uuid4().hex
        try:
            incoming.mkdir()
            for name in artifact_files(artifact):
                (incoming / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact / name, incoming / name)
                _sync(incoming / name)
            for folder in [incoming, *(p for p in incoming.rglob("*") if p.is_dir())]:
                _sync(folder)
        except OSError as error:
            shutil.rmtree(incoming, ignore_errors=True)
            raise InputError(
                f"'{artifact}' cannot be copied into '{self.folder}' ({error.strerror}); free disk "
                "space, or name an artifact that can be read"
            ) from error
        return incoming

    def _keep(self, incoming: Path, content: str) -> None:
        """Move a copy to its place; one that is there already, and whole, stays."""
        place = self.folder / "objects" / content
        if place.is_dir() and content_hash(place) == content:
            return
        shutil.rmtree(place, ignore_errors=True)  # spoilt: the copy mends it
        os.replace(incoming, place)
        _sync(place.parent)

    def _append(self, name: str, file: str, record: Settings) -> None:
        """Add one line, after cutting off one that a crash has left incomplete."""
        path = self._of(name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as handle:
            handle.seek(0)
            content = handle.read()
            handle.truncate(content.rfind(b"\n") + 1)
            handle.write((to_json(record.model_dump()) + "\n").encode())
            handle.flush()
            os.fsync(handle.fileno())
        _sync(path.parent)
        _sync(path.parent.parent)


def chosen(targets: Sequence[Target], key: str) -> Target:
    """The target that a key falls on, by shares; equal keys fall on equal targets.

    Args:
        targets: targets whose shares sum to 1.
        key: any text.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    left = int.from_bytes(digest[:8], "big") / 2**64
    for target in targets[:-1]:
        left -= target.share
        if left < 0.0:
            return target
    return targets[-1]


def _states(changes: Sequence[AliasChange]) -> list[tuple[Target, ...]]:
    """What an alias pointed to, change by change; a rollback takes the last one off."""
    states: list[tuple[Target, ...]] = []
    for change in changes:
        if change.is_rollback and len(states) > 1:
            states.pop()
        else:
            states.append(change.to)
    return states


def _checked_shares(to: Sequence[Target]) -> tuple[Target, ...]:
    numbers = [target.version for target in to]
    if len(set(numbers)) < len(numbers):
        raise InputError("an alias points to one version twice; name each version once")
    total = sum(target.share for target in to)
    if to and abs(total - 1.0) > 1e-9:
        raise InputError(f"the shares of the versions sum to {total:g}; let them sum to 1")
    return tuple(to)


def _demands(protection: Protection) -> bool:
    return protection.verdict or protection.certificate is not None


def _records(path: Path, kind: type[_Record]) -> list[_Record]:
    """The complete lines of a file of records; none where there is no file.

    Raises:
        InputError: a line is not a record.
    """
    try:
        content = read_bytes(path, _MOST_BYTES)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); restore it") from error
    found = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            found.append(kind.model_validate(json_text.loads(line)))
        except ValueError as error:
            why = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
            raise InputError(
                f"'{path}' line {number} is damaged ({why}); restore it from a copy"
            ) from error
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
