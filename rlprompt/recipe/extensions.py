"""Classes of the user's own in the places of a recipe that choose something by `type`.

    algorithm: {type: "algorithm.py:MaxRL", ...}
    prompt: {type: "prompt.py:LowRank", ...}           also in its parts, and in a population
    search: {type: "searcher.py:Climb", ...}
    engine: {type: "engine.py:Timed", ...}
    tracking: {trackers: [console, {type: "tracker.py:Csv", ...}]}

`load_named` imports what such paths name. `extended` makes a recipe class whose unions have the
classes' settings beside the built-in ones, so that pydantic reads, refuses and writes them like any
other part of a recipe. Nothing else imports user code for a recipe: reading one that a run or an
artifact has stored does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import Field, create_model

from rlprompt.algorithms.base import Algorithm
from rlprompt.algorithms.make import ALGORITHMS
from rlprompt.algorithms.make import DEFAULT as DEFAULT_ALGORITHM
from rlprompt.engines.base import Engine
from rlprompt.engines.make import DEFAULT as DEFAULT_ENGINE
from rlprompt.engines.make import ENGINES
from rlprompt.errors import InputError
from rlprompt.prompts.base import SlotPrompt
from rlprompt.prompts.make import DEFAULT as DEFAULT_PROMPT
from rlprompt.prompts.make import PROMPTS, load_prompt_class
from rlprompt.prompts.sequence import MOST_PARTS, SequenceSettings
from rlprompt.prompts.single import PARTS
from rlprompt.search.base import Searcher
from rlprompt.search.make import DEFAULT as DEFAULT_SEARCHER
from rlprompt.search.make import SEARCHERS
from rlprompt.settings import ChosenSettings, OneOf, Settings, UserClass, chosen_as
from rlprompt.tracking.make import TRACKERS, TrackersSettings
from rlprompt.tracking.tracker import Tracker, TrackerSettings
from rlprompt.user_code import is_path, load_class

_Recipe = TypeVar("_Recipe", bound=Settings)


@dataclass(frozen=True)
class Point:
    """A section of the recipe that chooses one of several classes by `type`."""

    builtin: Mapping[str, UserClass]
    """Classes by name."""
    default: str
    """The choice of a section without a `type`."""
    load: Callable[[str, Path], UserClass]
    """The class at a path, relative to a folder; refuses what cannot stand here."""


POINTS: Mapping[str, Point] = {
    "algorithm": Point(ALGORITHMS, DEFAULT_ALGORITHM, partial(load_class, base=Algorithm)),
    "prompt": Point(PROMPTS, DEFAULT_PROMPT, load_prompt_class),
    "search": Point(SEARCHERS, DEFAULT_SEARCHER, partial(load_class, base=Searcher)),
    "engine": Point(ENGINES, DEFAULT_ENGINE, partial(load_class, base=Engine)),
}
"""Sections of the recipe that a class of the user's own can be named in."""


class Named(NamedTuple):
    """A class of the user's own that a recipe names."""

    section: str
    """Where it stands: a key of `POINTS`, or `tracking`."""
    path: str
    """What the recipe says."""
    user_class: UserClass
    """What that is."""


def load_named(
    tree: Mapping[str, Any], base_dir: Path, at_fault: Callable[[str], str]
) -> tuple[Named, ...]:
    """Import the classes of the user's own that a recipe names.

    Args:
        tree: plain values of a recipe, not checked yet.
        base_dir: folder that file paths are relative to.
        at_fault: function from the YAML path of a wrong value to what wrote it, for errors.

    Raises:
        InputError: a path names nothing, or nothing that can stand where it is.
    """
    found: dict[tuple[str, str], UserClass] = {}
    for use in _uses(tree):
        try:
            found[use.section, use.path] = _load(use, base_dir)
        except InputError as error:
            raise InputError(f"{at_fault(use.place)}: '{use.place}': {error}") from error
    return tuple(Named(section, path, each) for (section, path), each in found.items())


def named_places(tree: Mapping[str, Any]) -> dict[str, str]:
    """The paths to classes of the user's own in a recipe, by dotted key; nothing is imported.

    Args:
        tree: plain values of a recipe, not checked yet.
    """
    return {use.place: use.path for use in _uses(tree)}


class _Use(NamedTuple):
    """A path to a class of the user's own in a recipe."""

    section: str
    place: str
    """YAML path of the value."""
    path: str
    """The value."""


def _uses(tree: Mapping[str, Any]) -> Iterator[_Use]:
    for section in POINTS:
        yield from _types(section, section, tree.get(section))
    for place, member in _entries("population", tree.get("population")):
        changes = member.get("changes") if isinstance(member, dict) else None
        for key, value in (changes if isinstance(changes, dict) else {}).items():
            where, node = str(key), value
            if where.endswith(".type"):
                where, node = where.removesuffix(".type"), {"type": value}
            elif where == "prompt.parts":
                where, node = "prompt", {"type": "sequence", "parts": value}
            yield from _types("prompt", f"{place}.changes.{where}", node)
    tracking = tree.get("tracking")
    trackers = tracking.get("trackers") if isinstance(tracking, dict) else None
    for place, entry in _entries("tracking.trackers", trackers):
        if isinstance(entry, str) and is_path(entry):
            yield _Use("tracking", place, entry)
        yield from _types("tracking", place, entry)


def _types(section: str, place: str, node: object) -> Iterator[_Use]:
    """The path that a section has as its `type`, and those of a sequence's parts."""
    if not isinstance(node, dict):
        return
    kind = node.get("type")
    if isinstance(kind, str) and is_path(kind):
        yield _Use(section, f"{place}.type", kind)
    if section == "prompt" and kind == "sequence":
        for part, entry in _entries(f"{place}.parts", node.get("parts")):
            yield from _types(section, part, entry)


def _entries(place: str, node: object) -> Iterator[tuple[str, object]]:
    entries = node if isinstance(node, list | tuple) else ()
    yield from ((f"{place}.{number}", entry) for number, entry in enumerate(entries))


def _load(use: _Use, base_dir: Path) -> UserClass:
    if use.section == "tracking":
        return load_class(use.path, base_dir, Tracker)
    found = POINTS[use.section].load(use.path, base_dir)
    if ".parts." in use.place and not issubclass(found, SlotPrompt):
        raise InputError(
            f"{use.path} fills no positions of the slot, as a part of a sequence must; derive it "
            "from rlprompt.extend.SlotPrompt, or use it alone"
        )
    return found


def extended(recipe: type[_Recipe], named: tuple[Named, ...]) -> type[_Recipe]:
    """The recipe class in which named classes of the user's own can be chosen.

    Args:
        recipe: the recipe class with what is built in.
        named: what `load_named` gave; equal ones give the same class.
    """
    return _extended(recipe, named) if named else recipe


@lru_cache(maxsize=32)
def _extended(recipe: type[_Recipe], named: tuple[Named, ...]) -> type[_Recipe]:
    fields: dict[str, Any] = {}
    for section in dict.fromkeys(each.section for each in named):
        own = {
            each.path: chosen_as(each.path, each.user_class)
            for each in named
            if each.section == section
        }
        if section == "tracking":
            tracking = _tracking_with(own)
            fields[section] = (tracking, tracking())
            continue
        point = POINTS[section]
        settings = {name: each.Settings for name, each in point.builtin.items()}
        if section == "prompt":
            settings["sequence"] = _sequence_with(own)
        kind: Any = Annotated[ChosenSettings, OneOf({**settings, **own}, default=point.default)]
        default = recipe.model_fields[section].default
        fields[section] = (kind if default is not None else kind | None, default)
    return create_model(recipe.__name__, __base__=recipe, **fields)


def _sequence_with(own: Mapping[str, type[ChosenSettings]]) -> type[ChosenSettings]:
    """The settings of a sequence whose parts may be of these classes too."""
    settings: dict[str, type[ChosenSettings]] = {n: each.Settings for n, each in PARTS.items()}
    for path, each in own.items():
        if each.user_class is not None and issubclass(each.user_class, SlotPrompt):
            settings[path] = each
    part = Annotated[ChosenSettings, OneOf(settings)]
    before = SequenceSettings.model_fields["parts"]
    parts: Any = (tuple[part, ...], Field(default=before.default, max_length=MOST_PARTS))
    return create_model(SequenceSettings.__name__, __base__=SequenceSettings, parts=parts)


def _tracking_with(own: Mapping[str, type[ChosenSettings]]) -> type[TrackersSettings]:
    """The settings of tracking whose trackers may be of these classes too."""
    tracker = Annotated[str | TrackerSettings, OneOf(own, names=TRACKERS)]
    default = TrackersSettings.model_fields["trackers"].default
    trackers: Any = (tuple[tracker, ...], default)
    return create_model(TrackersSettings.__name__, __base__=TrackersSettings, trackers=trackers)
