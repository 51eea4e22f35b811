"""Every writer that a recipe can name in `search.writer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from rlprompt.search.base import SearchStart
from rlprompt.search.endpoint_writer import EndpointWriter
from rlprompt.search.writer import BaseWriter, Writer, WriterSettings
from rlprompt.settings import OneOf

WRITERS: Mapping[str, type[Writer]] = {
    "base": BaseWriter,
    "endpoint": EndpointWriter,
}
"""The writers: what `search.writer.type` says -> the class."""

AnyWriterSettings = Annotated[
    WriterSettings,
    OneOf({name: each.Settings for name, each in WRITERS.items()}, is_extensible=False),
]
"""The field `writer` of a searcher's settings, such as `{type: base, temperature: 0.8}`."""


def make_writer(settings: WriterSettings, given: SearchStart) -> Writer:
    """The writer that a recipe describes.

    Args:
        settings: the settings of the writer, as `AnyWriterSettings` reads them.
        given: where the search starts.

    Raises:
        InputError: see `Writer.make`.
    """
    return WRITERS[settings.type].make(settings, given)
