"""A pirate's voice that still answers. Copy this file, change the lexicon, name yours in a recipe.

    rewards:
      - path: ../reward_models/persona_pirate.py:reward

    value = voice * spread * content * complete * distinct           in [0, 1]

    voice     1 - 0.6 ** n, n = distinct strong markers + half of the distinct weak ones (at most
              4), so the fifth "arr" is worth nothing and each new marker less than the last;
              markers that the query holds do not count; above one marker in three words it falls,
              so a list of markers is no voice
    spread    0.5 + 0.5 * share of sentences that hold a marker: no pirate "hat" on a plain answer
    content   c / (c + 3), c = content words that are no markers and that neither the query nor
              empty talk holds, times 0.3 + 0.7 * word overlap with the query, so that one fine
              pirate sentence for all queries stays low
    complete  1.0 when the last sentence ends, 0.5 when it is cut off
    distinct  share of three-word sequences that are not repetitions

For another persona replace STRONG and WEAK. What it cannot see: whether the answer is true.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from rlprompt.rewards import Example
from rlprompt.rewards.rules.relevance import relevance
from rlprompt.rewards.rules.text import (
    distinct_share,
    ends_complete,
    message_texts,
    own_stems,
    sentences,
    stem,
    words,
)

_STRONG = """ahoy argh arr avast aye bilge blimey booty bosun buccaneer cap'n cutlass doubloon grog
    hearties landlubber matey mateys pirate plunder scallywag scurvy savvy shiver swab timbers yarr
    ye yer yo"""
_WEAK = """anchor briny captain cove crew deck horizon island port rum sail sea seas ship shore
    starboard tide treasure voyage"""
STRONG = {stem(word) for word in _STRONG.split()}
WEAK = {stem(word) for word in _WEAK.split()}
MAX_DENSITY = 1 / 3


def reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """One value in [0, 1] per completion."""
    pairs = zip(message_texts(prompts), message_texts(completions), strict=True)
    return [score(query, completion) for query, completion in pairs]


def score(query: str, completion: str) -> float:
    """The product above for one completion."""
    tokens = words(completion)
    if not tokens:
        return 0.0
    markers = (STRONG | WEAK) - set(_stems(query))
    used = [token for token in _stems(completion) if token in markers]
    distinct_markers = len(STRONG & set(used)) + 0.5 * min(4, len(WEAK & set(used)))
    voice = 1.0 - float(0.6**distinct_markers)
    voice *= min(1.0, MAX_DENSITY * len(tokens) / max(1, len(used)))
    parts = [piece for piece in sentences(completion) if words(piece)]
    marked = sum(bool(markers & set(_stems(piece))) for piece in parts)
    own = own_stems(query, completion) - STRONG - WEAK
    overlap = relevance(query, completion)
    content = len(own) / (len(own) + 3) * (1.0 if overlap is None else 0.3 + 0.7 * overlap)
    complete = 1.0 if ends_complete(completion) else 0.5
    spread = 0.5 + 0.5 * marked / max(1, len(parts))
    return voice * spread * content * complete * distinct_share(tokens, 3)


def _stems(text: str) -> list[str]:
    return [_marker_stem(word) for word in words(text)]


@functools.lru_cache(maxsize=65_536)
def _marker_stem(word: str) -> str:
    # "arrrr" is "arr": a longer growl is no other word.
    return stem(re.sub(r"(.)\1{2,}", r"\1\1", word))


_QUERY = "How do I boil an egg?"
_SHIP = "What does the crew of a ship do?"
_PLAIN = "Put the egg in boiling water for eight minutes, then cool it under the tap."
EXAMPLES = [
    Example(
        _QUERY,
        "Arr, matey, drop yer egg into bubblin' water, wait eight minutes, then cool it, aye.",
        True,
        0.5,
    ),
    Example(
        _QUERY,
        "Ahoy! Ye boil the egg eight minutes in a pot o' salty water. Aye, then plunder the shell.",
        True,
        0.5,
    ),
    Example(_QUERY, _PLAIN, False, high=0.0),
    Example(_QUERY, f"Arr! {_PLAIN}", False, high=0.35),
    Example(
        _QUERY,
        "Arr, matey, that be a fine question, and ye shall find the answer on the seas, savvy.",
        False,
        high=0.25,
    ),
    Example(_QUERY, "Arr arr arr arr arr arr arr arr.", False, high=0.05),
    Example(
        _QUERY, "Ahoy matey, avast ye scurvy scallywag, arr, shiver me timbers!", False, high=0.2
    ),
    Example(_QUERY, "Arr, matey, how do ye boil an egg? Aye, ye boil an egg.", False, high=0.2),
    Example(_QUERY, "Arr matey, boil yer egg in water, aye. " * 12, False, high=0.2),
    Example(_QUERY, "", False, high=0.0),
    Example(
        _SHIP,
        "Aye, the crew o' a ship hoist the canvas, scrub planks and keep watch, ye landlubber.",
        True,
        0.4,
    ),
    Example(_SHIP, "The crew of a ship sets the ropes and keeps watch.", False, high=0.0),
]
