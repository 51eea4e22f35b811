"""A library of pieces of system texts, so that a search finds words where no model writes them.

A component is a piece that stands on its own, such as a sentence. It has a category, for what it
is for: two of one category can take each other's place, and a text wants one of several of them.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlprompt.errors import InputError
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text
from rlprompt.search import edits

Library = Mapping[str, tuple[str, ...]]
"""Category -> its components, in order, each once."""

BUILT_IN = Path(__file__).parent / "components.yaml"
MOST_CHARACTERS = 4_000
"""Longest component."""
MOST_COMPONENTS = 10_000
"""Components of a library in all."""


def read_library(given: str | Mapping[str, tuple[str, ...]] | None, *, built_in: bool) -> Library:
    """The components that a search may use.

    Args:
        given: components of the user's by category, or the path of a YAML or JSON file of them.
        built_in: whether those that come with rlprompt are there too.

    Raises:
        InputError: the file cannot be read, or does not hold lists of texts by category.
    """
    library: dict[str, dict[str, None]] = {}
    sources = [_read(BUILT_IN)] if built_in else []
    if given is not None:
        sources.append(_read(Path(given)) if isinstance(given, str) else checked(given))
    for source in sources:
        for category, components in source.items():
            library.setdefault(category, {}).update(dict.fromkeys(components))
    if sum(map(len, library.values())) > MOST_COMPONENTS:
        raise InputError(
            f"search.components are more than {MOST_COMPONENTS} texts; keep the best of them"
        )
    return {category: tuple(components) for category, components in library.items()}


def checked(given: Any) -> Library:
    """Components as they were given, if they are lists of texts by category.

    Raises:
        InputError: they are something else.
    """
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            "search.components are no mapping; give lists of texts by category, such as "
            "'tone: [Sound calm.]'"
        )
    library = {}
    for category, components in given.items():
        if not isinstance(category, str) or not category.strip():
            raise InputError(
                f"search.components have the category {category!r}, which is no word; name it"
            )
        if isinstance(components, str) or not isinstance(components, (list, tuple)):
            raise InputError(
                f"search.components.{category} is no list; give a list of texts, even for one"
            )
        for place, each in enumerate(components):
            _check(f"search.components.{category}.{place}", each)
        if not components:
            raise InputError(f"search.components.{category} is empty; give a text, or remove it")
        library[category] = tuple(each.strip() for each in components)
    return library


def digest(library: Library) -> str:
    """A short name of all that a library holds, in order."""
    plain = json.dumps([[category, *texts] for category, texts in library.items()])
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def exchange(text: str, library: Library, draw: random.Random) -> str | None:
    """The text with one of its components replaced by another of the same category."""
    found = [
        (component, category)
        for category, components in library.items()
        for component in components
        if len(components) > 1 and component in text
    ]
    if not found:
        return None
    component, category = draw.choice(found)
    other = draw.choice([each for each in library[category] if each != component])
    return edits.tidy(text.replace(component, other, 1))


def add(text: str, library: Library, draw: random.Random) -> str | None:
    """The text with a component more, of a category that it has none of; None if there is none."""
    missing = [
        category
        for category, components in library.items()
        if not any(component in text for component in components)
    ]
    if not missing:
        return None
    return edits.insert(text, draw.choice(library[draw.choice(missing)]), draw)


def compose(library: Library, draw: random.Random) -> str | None:
    """A text of components alone: one of each category that is drawn, in the library's order."""
    if not library:
        return None
    count = draw.randint(1, len(library))
    chosen = set(draw.sample(list(library), count))
    return edits.joined([draw.choice(library[each]) for each in library if each in chosen])


def _check(place: str, component: Any) -> None:
    if not isinstance(component, str) or not component.strip():
        raise InputError(f"{place} is no text or blank; write a piece of a system message")
    if len(component) > MOST_CHARACTERS:
        raise InputError(
            f"{place} has {len(component)} characters, more than {MOST_CHARACTERS}; cut it into "
            "several components"
        )


def _read(path: Path) -> Library:
    try:
        found = yaml_text.load(read_text(path))
    except OSError as error:
        raise InputError(
            f"search.components is '{path}', which cannot be read ({error.strerror}); name a YAML "
            "file, or write the components into the recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"search.components '{path}' is not UTF-8; save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise InputError(f"search.components '{path}': {yaml_text.reason(error)}") from error
    try:
        return checked(found)
    except InputError as error:
        raise InputError(f"'{path}': {error}") from error
