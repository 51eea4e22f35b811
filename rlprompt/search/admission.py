"""Which texts a search may try: no control tokens, no copies of training data, no endless ones.

A prompt that quotes the training queries scores well on them and on nothing else, and shows to
everybody what it was trained on. So a text is refused where it has, in any case and punctuation
and over the ends of sentences,

- six words in a row of a training query or answer, or all words of a shorter one in a row; or
- more than four fifths of the words that carry its meaning, in any order, in a stretch of the text
  at most twice as long as it. That is the measure of `data.near_duplicates`, on words that are not
  among the commonest.

Texts that carry no meaning of their own are let through ("why", "tell me more"): those of fewer
than three words, or twelve letters, or without a word that is not among the commonest. A
paraphrase in other words is not found. What the user's own texts quote (`prompt`, `search.texts`,
`search.components`) is the user's choice, and is no reason to refuse.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from rlprompt.types import Query

Refusal = Literal["empty", "long", "control", "leak", "known"]
"""Why a text is not tried: it says nothing, is longer than allowed, has characters or markers that
a prompt must not have, copies training data, or was tried before."""

RUN = 6
"""Words in a row that are a copy."""
_FEWEST_WORDS, _FEWEST_LETTERS = 3, 12
_SHARE = (4, 5)
_FEWEST_TELLING = 3
"""Fewest meaningful words of a text that is looked for in any order."""
_MOST_SOURCE_WORDS = 20_000
"""Words of one answer that are looked at."""

_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0e7f]")
_WORD = re.compile(r"[^\W_]+")
_COMMON_WORDS = (
    "a about all also am an and any are as at be been being but by can could did do does don for "
    "from get give had has have he her here him his how i if in into is it its just let like make "
    "me more most much my no not of on one or other our out say she should so some tell than that "
    "the their them then there these they this to too up us use want was way we well were what "
    "when where which who whom whose why will with without would write you your answer answers "
    "question questions reply sentence sentences short word words user assistant please help need "
)
_COMMON = frozenset(_COMMON_WORDS.split())
"""Words that say little of what a text is about, in English; in other languages every word counts
as meaningful, which refuses somewhat less in any order, and the same in a row."""

_MARKERS = re.compile(
    r"<\s*[|\uff5c][^<>\n]{1,60}?[|\uff5c]\s*>"
    r"|\[\s*/?\s*(?:INST|SYS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\s*\]"
    r"|<<\s*/?\s*SYS\s*>>"
    r"|<\s*/?\s*(?:s|bos|eos|pad|unk|mask|sep|cls|think|tool_call|tool_response)\s*>"
    r"|<\s*(?:start|end)_of_(?:turn|image|text)\s*>"
    r"|^\s*#{2,4}\s*(?:human|user|system|assistant|instruction|response|input)\s*:",
    re.IGNORECASE | re.MULTILINE,
)
"""What templates of well-known models put between turns."""
_KEPT = frozenset("\n\t\u200c\u200d")
"""Of control and format characters: line ends, tabs, and the joiners of scripts and emoji."""


def words(text: str) -> list[str]:
    """The words of a text without case, accents, punctuation and invisible characters, in order."""
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c) not in ("Mn", "Cf"))
    return _WORD.findall(_UNSPACED.sub(lambda match: f" {match.group()} ", plain))


class Copies:
    """Finds copies of training queries and answers in a text; see the module."""

    def __init__(self, sources: Iterable[str], own: Sequence[str] = ()) -> None:
        """Index what must not be copied.

        Args:
            sources: queries and answers of the training data.
            own: texts of the user's, whose quotes are no reason to refuse.
        """
        self._runs: dict[str, set[tuple[str, ...]]] = {}
        self._telling: list[tuple[frozenset[str], int]] = []
        self._holders: defaultdict[str, list[int]] = defaultdict(list)
        seen: set[tuple[str, ...]] = set()
        mine = [words(text) for text in own]
        allowed = {run for each in mine for run in _runs(each, RUN)}
        for text in sources:
            source = tuple(words(text)[:_MOST_SOURCE_WORDS])
            if source in seen or not _has_meaning(source):
                continue
            seen.add(source)
            for run in _runs(source, RUN):
                held = any(_holds(each, run) for each in mine) if len(run) < RUN else run in allowed
                if not held and any(word not in _COMMON for word in run):
                    self._runs.setdefault(run[0], set()).add(run)
            self._add_telling(source, mine)

    def _add_telling(self, source: tuple[str, ...], mine: Sequence[Sequence[str]]) -> None:
        telling = frozenset(source) - _COMMON
        if len(telling) < _FEWEST_TELLING:
            return
        if any(_has_stretch(each, telling, 2 * len(source)) for each in mine):
            return
        for word in telling:
            self._holders[word].append(len(self._telling))
        self._telling.append((telling, 2 * len(source)))

    def found_in(self, text: str) -> bool:
        """Whether a text copies one of the sources."""
        candidate = words(text)
        for place, word in enumerate(candidate):
            for run in self._runs.get(word, ()):
                if tuple(candidate[place : place + len(run)]) == run:
                    return True
        telling = self._holders.keys() & set(candidate)
        shared = Counter(number for word in telling for number in self._holders[word])
        return any(
            _exceeds(count, len(self._telling[number][0]))
            and _has_stretch(candidate, *self._telling[number])
            for number, count in shared.items()
        )


class Admission:
    """Says why a text may not be tried, before anything is spent on it."""

    def __init__(
        self,
        copies: Copies,
        measure: Callable[[str], int],
        most_tokens: int,
        control_tokens: Iterable[str] = (),
    ) -> None:
        """Keep what it needs.

        Args:
            copies: what finds training data in a text.
            measure: function from a text to its length in tokens; InputError where the text cannot
                be a system text.
            most_tokens: the most of them that a text may have.
            control_tokens: control tokens of the base, as they are spelled.
        """
        self._copies = copies
        self._measure = measure
        self._most_tokens = most_tokens
        self._control_tokens = tuple(each for each in control_tokens if each.strip())

    def refusal(self, text: str) -> Refusal | None:
        """Why a text is refused, by all that a text alone says; None = it may be tried."""
        if not any(unicodedata.category(c)[0] in "LN" for c in text):
            return "empty"
        # Cheap before dear: no tokenizer has more than a token for a byte of UTF-8 and a space.
        if len(text) > 64 * self._most_tokens:
            return "long"
        if _has_control(text) or any(each in text for each in self._control_tokens):
            return "control"
        try:
            if self._measure(text) > self._most_tokens:
                return "long"
        except ValueError:  # the template or the tokenizer does not take it
            return "control"
        return "leak" if self._copies.found_in(text) else None


def text_key(text: str) -> str:
    """What two texts share that are one text but for white space."""
    return " ".join(text.split())


def sources_of(queries: Iterable[Query]) -> Iterator[str]:
    """All that a training query says: its turns, and texts and turns in its columns."""
    for query in queries:
        for message in query.messages:
            yield message["content"]
        yield from _texts(list(query.columns.values()))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


def _has_control(text: str) -> bool:
    if _MARKERS.search(unicodedata.normalize("NFKC", text)) or "\ufffd" in text:
        return True
    return any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") and c not in _KEPT for c in text)


def _has_meaning(source: Sequence[str]) -> bool:
    letters = sum(map(len, source))
    telling = any(word not in _COMMON for word in source)
    return len(source) >= _FEWEST_WORDS and letters >= _FEWEST_LETTERS and telling


def _runs(source: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """Every run of so many words, or the whole where it is shorter."""
    for start in range(max(1, len(source) - length + 1)):
        yield tuple(source[start : start + length])


def _holds(text: Sequence[str], run: tuple[str, ...]) -> bool:
    return any(tuple(text[i : i + len(run)]) == run for i in range(len(text) - len(run) + 1))


def _exceeds(count: int, size: int) -> bool:
    return _SHARE[1] * count > _SHARE[0] * size


def _has_stretch(text: Sequence[str], telling: frozenset[str], length: int) -> bool:
    """Whether a stretch of the text has more than four fifths of some words."""
    inside: Counter[str] = Counter()
    for place, word in enumerate(text):
        if word in telling:
            inside[word] += 1
        if place >= length and text[place - length] in telling:
            inside[text[place - length]] -= 1
        if word in telling and _exceeds(sum(1 for n in inside.values() if n), len(telling)):
            return True
    return False
