"""Every tracker: the settings that a recipe may hold, and what makes the trackers of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from rich.console import Console

from rlprompt.settings import OneOf
from rlprompt.tracking.tracker import Tracker, TrackerGroup, TrackerSettings, TrackingSettings
from rlprompt.tracking.trackers import ConsoleTracker, JsonlTracker, TensorBoardTracker
from rlprompt.tracking.wandb_tracker import WandbTracker

TRACKERS: Mapping[str, type[Tracker]] = {
    "console": ConsoleTracker,
    "jsonl": JsonlTracker,
    "wandb": WandbTracker,
    "tensorboard": TensorBoardTracker,
}
"""The built-in trackers: what `tracking.trackers` names -> the class."""

AnyTracker = Annotated[str | TrackerSettings, OneOf({}, names=TRACKERS)]
"""The name of a built-in tracker, or the settings of one of the user's own."""

_PLACES = {"jsonl": -1, "console": 1}
"""The record comes first; the live display last, so that no start-up message tears it."""


class TrackersSettings(TrackingSettings):
    """Where a run reports to."""

    trackers: tuple[AnyTracker, ...] = ("console", "jsonl")
    """Where metrics go. `jsonl` is always written, named here or not: the report reads it."""


def build_trackers(settings: TrackersSettings, console: Console | None = None) -> TrackerGroup:
    """Make the trackers that a recipe names, JSON Lines first and always.

    Args:
        settings: the recipe's part.
        console: console shared with the log handler of the command line, so that a log line does
            not tear the live display; None makes one of its own.
    """
    names = {"jsonl", *(each for each in settings.trackers if isinstance(each, str))}
    chosen = [TRACKERS[name].Settings(type=name) for name in TRACKERS if name in names]
    chosen += [each for each in settings.trackers if not isinstance(each, str)]
    trackers: dict[str, Tracker] = {}
    for each in sorted(chosen, key=lambda each: _PLACES.get(each.type, 0)):
        kind: type[Tracker] = each.user_class or TRACKERS[each.type]
        name, number = each.type, 2
        while name in trackers:
            name, number = f"{each.type} ({number})", number + 1
        trackers[name] = kind.make(each, settings, console)
    return TrackerGroup(trackers, settings)
