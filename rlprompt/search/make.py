"""Every searcher that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping

from rlprompt.search.base import Searcher, SearchSettings, SearchStart
from rlprompt.search.texts import Texts, TextsSettings

AnySearchSettings = TextsSettings

SEARCHERS: Mapping[str, type[Searcher]] = {
    "texts": Texts,
}
"""`search.type` -> the searcher."""


def make_searcher(settings: SearchSettings, given: SearchStart) -> Searcher:
    """The searcher that a recipe describes.

    Raises:
        InputError: see `Searcher.make`.
    """
    return SEARCHERS[settings.type].make(settings, given)
