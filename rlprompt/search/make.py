"""Every searcher that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from rlprompt.search.base import Searcher, SearchSettings, SearchStart
from rlprompt.search.cmaes import CMAES
from rlprompt.search.es import ES
from rlprompt.search.evolution import Evolution
from rlprompt.search.gepa import GEPA
from rlprompt.search.mixed import Mixed
from rlprompt.search.rl import RL
from rlprompt.search.texts import Texts
from rlprompt.search.tokens import Tokens
from rlprompt.settings import OneOf

SEARCHERS: Mapping[str, type[Searcher]] = {
    "gepa": GEPA,
    "texts": Texts,
    "cmaes": CMAES,
    "es": ES,
    "evolution": Evolution,
    "mixed": Mixed,
    "rl": RL,
    "tokens": Tokens,
}
"""The built-in searchers: what `search.type` says -> the class."""

DEFAULT = "texts"
"""The searcher of a search without a `type`."""

AnySearchSettings = Annotated[
    SearchSettings,
    OneOf({name: each.Settings for name, each in SEARCHERS.items()}, default=DEFAULT),
]


def searcher_class(settings: SearchSettings) -> type[Searcher]:
    """The searcher that settings choose."""
    kind: type[Searcher] = settings.user_class or SEARCHERS[settings.type]
    return kind


def make_searcher(settings: SearchSettings, given: SearchStart) -> Searcher:
    """The searcher that a recipe describes.

    Raises:
        InputError: see `Searcher.make`.
    """
    return searcher_class(settings).make(settings, given)
