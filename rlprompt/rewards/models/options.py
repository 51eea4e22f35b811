"""How a class that holds more than its options shows which options it takes."""

from __future__ import annotations

import inspect

from rlprompt.settings import Settings


class SignatureOf:
    """Gives a class the signature of a settings class; its instances keep that of `__call__`.

    The loader of rewards reads signatures to name an unknown option; a class whose constructor is
    `__init__(self, **options)` says by this what the options are.
    """

    def __init__(self, settings: type[Settings]) -> None:
        self._settings = settings

    def __get__(self, instance: object | None, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        return inspect.signature(self._settings)
