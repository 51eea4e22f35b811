"""`rlprompt registry`: what its commands do and print."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from rlprompt.artifacts.certificate import read_certificate
from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.files import to_json
from rlprompt.registry.difference import difference
from rlprompt.registry.records import AliasChange, Protection, Target
from rlprompt.registry.remotes import pull as pull_version
from rlprompt.registry.remotes import push as push_version
from rlprompt.registry.store import Registry
from rlprompt.serving.loaded import artifact_folder
from rlprompt.tracking.console import PlainConsole, clean_text, format_number

_SHORT = 12
_MOST_SHOWN = 400
"""Characters of one text that are shown."""


def add(folder: Path, artifact: Path, name: str, message: str, tags: Sequence[str]) -> None:
    """Add an artifact and say which version it is.

    Args:
        folder: the registry's folder.
        artifact: folder of the artifact, or of the run that has one.
        name: the prompt's name.
        message: why it is added.
        tags: words to find it by.

    Raises:
        InputError: see `Registry.add`.
    """
    version = Registry(folder).add(artifact_folder(artifact), name, message=message, tags=tags)
    _say(f"{name}:{version.number} is prompt {version.prompt[:_SHORT]}")


def show_all(folder: Path, tag: str | None, as_json: bool) -> None:
    """Print all names, versions and aliases.

    Args:
        folder: the registry's folder.
        tag: a tag that versions must have; None = all.
        as_json: whether JSON is printed in place of a table.

    Raises:
        InputError: the registry is not there, or damaged.
    """
    registry = _existing(folder)
    versions = {
        name: [each for each in registry.versions(name) if tag is None or tag in each.tags]
        for name in registry.names()
    }
    aliases = {name: registry.aliases(name) for name in versions}
    if as_json:
        _print_json(
            {
                name: {
                    "versions": [version.model_dump() for version in own],
                    "aliases": {
                        alias: [target.model_dump() for target in targets]
                        for alias, targets in aliases[name].items()
                    },
                }
                for name, own in versions.items()
            }
        )
        return
    table = Table("prompt", "aliases", "hash", "tags", "added", "by", "message")
    for name, own in versions.items():
        for version in own:
            table.add_row(
                f"{name}:{version.number}",
                _pointing(aliases[name], version.number),
                version.prompt[:_SHORT],
                " ".join(version.tags),
                version.at,
                clean_text(version.by, _MOST_SHOWN),
                clean_text(version.message, _MOST_SHOWN),
            )
    PlainConsole().print(table)


def show(folder: Path, reference: str, as_json: bool) -> None:
    """Print what a version is.

    Args:
        folder: the registry's folder.
        reference: the version.
        as_json: whether JSON is printed.

    Raises:
        InputError: there is no such version, or its files are damaged.
    """
    registry = _existing(folder)
    name, version = registry.resolve(reference)
    path = registry.path(version)
    info, certificate = read_artifact_info(path), read_certificate(path)
    aliases = registry.aliases(name)
    report: dict[str, Any] = {
        "name": name,
        **version.model_dump(),
        "aliases": [alias for alias, to in aliases.items() if _points(to, version.number)],
        "representation": info.representation,
        "num_virtual_tokens": info.num_virtual_tokens,
        "text": info.init_text,
        "base": info.base,
        "metrics": info.metrics,
        "certificate": None if certificate is None else certificate.statement,
        "path": str(path),
    }
    if as_json:
        _print_json(report)
        return
    table = Table(show_header=False)
    for key, value in report.items():
        table.add_row(key.replace("_", " "), _shown(value))
    PlainConsole().print(table)


def diff(folder: Path, one: str, other: str, as_json: bool) -> None:
    """Print how two versions differ.

    Args:
        folder: the registry's folder.
        one: the first version.
        other: the second version.
        as_json: whether JSON is printed.

    Raises:
        InputError: there is no such version, or its files are damaged.
    """
    registry = _existing(folder)
    paths = [registry.path(registry.resolve(reference)[1]) for reference in (one, other)]
    found = difference(paths[0], paths[1])
    if as_json:
        _print_json(asdict(found))
        return
    console = PlainConsole()
    for line in found.text:
        console.print(Text(clean_text(line, _MOST_SHOWN)), soft_wrap=True)
    for title, pairs in (
        ("description", found.fields),
        ("measured", found.metrics),
        ("recipe", found.recipe),
    ):
        if pairs:
            table = Table(title, one, other)
            for key, (first, second) in pairs.items():
                table.add_row(key, _shown(first), _shown(second))
            console.print(table)
    if found.tensors:
        table = Table("tensor", "cosine", "relative difference", "shapes")
        for each in found.tensors:
            values = ["-" if v is None else format_number(v) for v in (each.cosine, each.relative)]
            table.add_row(each.name, *values, " and ".join(str(s) for s in each.shapes))
        console.print(table)
    if not (found.text or found.fields or found.metrics or found.recipe or found.tensors):
        console.print("no difference")


def promote(
    folder: Path,
    name: str,
    alias: str,
    versions: Sequence[str],
    why: str,
    *,
    force: bool,
    remove: bool,
) -> None:
    """Point an alias somewhere and say so.

    Args:
        folder: the registry's folder.
        name: the prompt's name.
        alias: the alias.
        versions: the versions, as `NUMBER` or `NUMBER=SHARE`.
        why: the reason.
        force: whether protection is overruled.
        remove: whether the alias is removed.

    Raises:
        InputError: see `Registry.point`; or the versions cannot be read.
    """
    if remove == bool(versions):
        raise InputError("give the version that the alias shall point to, or --remove, not both")
    targets = _targets(versions)
    change = _existing(folder).point(name, alias, targets, why=why, force=force)
    _say(_told(name, change))


def protect(
    folder: Path,
    name: str,
    alias: str,
    verdict: bool,
    certificate: float | None,
    reward: str | None,
) -> None:
    """Set what an alias demands and say so.

    Args:
        folder: the registry's folder.
        name: the prompt's name.
        alias: the alias.
        verdict: whether a verdict of being better is demanded.
        certificate: largest alpha of the certificate that is demanded; None = no certificate.
        reward: name of the reward that the certificate is about; None = any.

    Raises:
        InputError: the demands make no sense, or there is no such prompt.
    """
    if reward is not None and certificate is None:
        raise InputError("--reward is what a certificate is about; give --certificate too")
    if certificate == 0.0:
        raise InputError("--certificate is 0, which no sample can certify; give a rate above 0")
    protection = Protection(verdict=verdict, certificate=certificate, reward=reward)
    _existing(folder).protect(name, alias, protection)
    demands = []
    if verdict:
        demands.append("a verdict of being better than its start")
    if certificate is not None:
        about = "" if reward is None else f" of {reward}"
        demands.append(f"a certificate{about} for {certificate:g} or less")
    _say(f"{name}@{alias} demands {' and '.join(demands) or 'nothing'}")


def roll_back(folder: Path, name: str, alias: str, why: str) -> None:
    """Point an alias back and say so.

    Args:
        folder: the registry's folder.
        name: the prompt's name.
        alias: the alias.
        why: the reason.

    Raises:
        InputError: see `Registry.roll_back`.
    """
    _say(_told(name, _existing(folder).roll_back(name, alias, why=why)))


def history(folder: Path, name: str, alias: str | None, as_json: bool) -> None:
    """Print the changes of aliases.

    Args:
        folder: the registry's folder.
        name: the prompt's name.
        alias: the only alias that is wanted; None = all.
        as_json: whether JSON is printed.

    Raises:
        InputError: there is no such prompt, or its records are damaged.
    """
    changes = _existing(folder).history(name, alias)
    if as_json:
        _print_json([change.model_dump() for change in changes])
        return
    table = Table("when", "alias", "from", "to", "by", "why")
    for change in changes:
        kind = "forced" if change.forced else "rollback" if change.is_rollback else ""
        why = ": ".join(part for part in (kind, clean_text(change.why, _MOST_SHOWN)) if part)
        table.add_row(
            change.at,
            change.alias,
            _written(change.before),
            _written(change.to),
            clean_text(change.by, _MOST_SHOWN),
            why,
        )
    PlainConsole().print(table)


def push(folder: Path, reference: str, to: str) -> None:
    """Copy a version elsewhere and say what it is called there.

    Args:
        folder: the registry's folder.
        reference: the version.
        to: the place.

    Raises:
        InputError: see `rlprompt.registry.remotes.push`.
    """
    _say(f"pushed as {push_version(_existing(folder), reference, to)}")


def pull(folder: Path, source: str, reference: str, name: str | None) -> None:
    """Take a version in and say which one it is.

    Args:
        folder: the registry's folder.
        source: the place.
        reference: the version there, of a registry.
        name: the prompt's name here; None = that of the reference.

    Raises:
        InputError: see `rlprompt.registry.remotes.pull`; or no name is known.
    """
    own = name or reference.partition("@")[0].partition(":")[0]
    if not own and "://" in source:
        raise InputError(f"'{source}' has no name for the registry; give one with --name")
    version = pull_version(Registry(folder), source, own, reference=reference)
    _say(f"{own}:{version.number} is prompt {version.prompt[:_SHORT]}")


def _existing(folder: Path) -> Registry:
    if not folder.is_dir():
        raise InputError(
            f"there is no registry in '{folder}'; `rlprompt registry add` makes one, --registry or "
            "RLPROMPT_REGISTRY names another"
        )
    return Registry(folder)


def _targets(versions: Sequence[str]) -> list[Target]:
    targets = []
    for given in versions:
        number, equals, share = given.partition("=")
        try:
            part = float(share) if equals else 1.0
            targets.append(Target(version=int(number), share=part))
        except ValueError as error:
            raise InputError(
                f"'{given}' names no version; write its number, or NUMBER=SHARE with a share above "
                "0 and at most 1"
            ) from error
    return targets


def _told(name: str, change: AliasChange) -> str:
    if not change.to:
        return f"{name}@{change.alias} is removed; it was {_written(change.before)}"
    passed = f" ({'; '.join(change.passed)})" if change.passed else ""
    return f"{name}@{change.alias} is {_written(change.to)}, was {_written(change.before)}{passed}"


def _written(targets: Sequence[Target]) -> str:
    if not targets:
        return "nothing"
    if len(targets) == 1:
        return str(targets[0].version)
    return " ".join(f"{target.version}={target.share:g}" for target in targets)


def _points(targets: Sequence[Target], number: int) -> bool:
    return any(target.version == number for target in targets)


def _pointing(aliases: Mapping[str, Sequence[Target]], number: int) -> str:
    found = []
    for alias, targets in aliases.items():
        for target in targets:
            if target.version == number:
                found.append(alias if len(targets) == 1 else f"{alias} {target.share:.0%}")
    return ", ".join(found)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_shown(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(each) for each in value)
    return "-" if value is None else clean_text(str(value), _MOST_SHOWN)


def _print_json(value: Any) -> None:
    sys.stdout.write(to_json(value, indent=2) + "\n")


def _say(sentence: str) -> None:
    PlainConsole().print(Text(sentence), soft_wrap=True)
