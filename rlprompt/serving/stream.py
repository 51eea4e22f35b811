"""An answer piece by piece, while it is drawn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.types import Query

_HALF_A_CHARACTER = "\ufffd"
"""What a decoder gives for bytes that are not yet a whole character."""


class _Unheard(Exception):
    """Nobody takes the pieces any more."""


def streamed(
    engine: NativeEngine,
    decode: Callable[[Sequence[int]], str],
    query: Query,
    sampling: SamplingSettings,
    seed: int,
) -> Iterator[str]:
    """The text of a completion in pieces, without white space at its ends.

    The completion is drawn in a thread, so that the caller's code between two pieces runs as it
    would without (the draw holds modes of torch that are the thread's own).

    Args:
        engine: the engine, synced with the prompt; nobody else uses it until the end.
        decode: function from token ids to text.
        query: the conversation to answer.
        sampling: how tokens are drawn.
        seed: seed of the draw.

    Raises:
        InputError: see `NativeEngine.generate`.
    """
    drawn: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    unheard = threading.Event()

    def hear(token: int) -> None:
        if unheard.is_set():
            raise _Unheard
        drawn.put(token)

    def draw() -> None:
        try:
            engine.generate_one(query, sampling, seed, hear)
        except BaseException as error:  # raised again where the pieces are taken
            drawn.put(error)
        else:
            drawn.put(None)

    thread = threading.Thread(target=draw, name="rlprompt-stream", daemon=True)
    thread.start()
    try:
        yield from _pieces(drawn, decode)
    finally:
        unheard.set()
        thread.join()


def _pieces(
    drawn: queue.SimpleQueue[int | BaseException | None], decode: Callable[[Sequence[int]], str]
) -> Iterator[str]:
    """The new text after each token; what may still change is kept back."""
    tokens: list[int] = []
    given = ""
    while (each := drawn.get()) is not None:
        if isinstance(each, BaseException):
            raise each
        tokens.append(each)
        text = decode(tokens).strip()
        if not text.endswith(_HALF_A_CHARACTER) and text.startswith(given) and text != given:
            yield text[len(given) :]
            given = text
    rest = decode(tokens).strip()[len(given) :]
    if rest:
        yield rest
