"""What rule rewards share: TRL's two formats as text, words, sentences, light English stems."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from rlprompt.rewards.rules.stopwords import STOP_WORDS

# Scripts written without spaces count one word per character.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+(?:'[^\W_]+)*"
)
_SENTENCE_BREAK = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+")
_CURLY_APOSTROPHE = "\u2019"

_SENTENCE_ENDS = ".!?\u3002\uff01\uff1f\u061f\u0964"
_CLOSERS = "\"'*_)]}\u201d\u2019\u00bb "
_ABBREVIATIONS = frozenset({"e.g.", "i.e.", "mr.", "mrs.", "ms.", "dr.", "prof.", "vs.", "st."})

_REQUEST_WORDS = """answer best brief briefly define describe difference explain find get give go
    good help know let like list make many mean much name need one please provide question recommend
    say sentence short show suggest summarize tell thing think use want way word work write"""
_EMPTY_TALK = """answer ask aspect assist assistant different explain fine find great happy help
    important interest interesting language let matter model query question reply request simple
    subject sure talk tell thing think topic understand various wonderful"""


def message_text(value: str | Sequence[dict[str, Any]]) -> str:
    """The text of one TRL prompt or completion: the string itself, or its last message."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def message_texts(values: Iterable[str | Sequence[dict[str, Any]]]) -> list[str]:
    """`message_text` of each."""
    return [message_text(value) for value in values]


def words(text: str) -> list[str]:
    """Lower-cased words in order, without punctuation; CJK characters are words of their own."""
    return _WORD.findall(text.replace(_CURLY_APOSTROPHE, "'").lower())


def sentences(text: str) -> list[str]:
    """The text split after sentence ends and at line breaks, without empty pieces."""
    return [piece.strip() for piece in _SENTENCE_BREAK.split(text) if piece.strip()]


@functools.lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """A crude English stem: `volcanoes` -> `volcano`, `making`, `makes`, `make` -> `mak`."""
    word = word.removesuffix("'s")
    for suffix, replacement, shortest in (
        ("ies", "y", 5),
        ("sses", "ss", 5),
        ("ingly", "", 8),
        ("edly", "", 7),
        ("ing", "", 6),
        ("ed", "", 5),
        ("es", "", 5),
        ("ly", "", 6),
        ("s", "", 4),
    ):
        if (
            word.endswith(suffix)
            and len(word) >= shortest
            and not word.endswith(("ss", "us", "is"))
        ):
            word = word.removesuffix(suffix) + replacement
            break
    if len(word) >= 4 and word[-1] == word[-2] and word[-1] in "bdgkmnprt":
        return word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


def content_stems(text: str) -> list[str]:
    """Stems of an English text's words that are no function words, in order."""
    return [stem(word) for word in words(text) if word not in STOP_WORDS["en"]]


def topic_stems(query: str) -> set[str]:
    """Stems of what an English query is about: content words without those that only ask."""
    return set(content_stems(query)) - _REQUEST_STEMS


def own_stems(query: str, completion: str) -> set[str]:
    """Stems that an English completion adds to its query, without talk that fits every query."""
    return set(content_stems(completion)) - set(content_stems(query)) - _EMPTY_TALK_STEMS


def distinct_share(items: Sequence[Any], ngram: int) -> float:
    """Distinct n-grams / n-grams, in (0, 1]; 1.0 when there are fewer than `ngram` items."""
    ngrams = list(zip(*(items[start:] for start in range(ngram)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def ends_complete(text: str, min_words: int = 2) -> bool:
    """True when the text stops where a writer would: at a sentence end or a closed code fence.

    Closing quotes, brackets, emphasis and emoji may follow the end. An ellipsis, an abbreviation, a
    list number and a last sentence of fewer than `min_words` words are no end.
    """
    text = text.rstrip()
    if text.endswith("```"):
        return text.count("```") % 2 == 0 and len(text) > 6
    end = len(text)
    while end and (
        text[end - 1] in _CLOSERS
        or unicodedata.category(text[end - 1])[0] in "SM"
        or unicodedata.category(text[end - 1]) == "Cf"
    ):
        end -= 1
    text = text[:end]
    if not text or text[-1] not in _SENTENCE_ENDS or text.endswith(".."):
        return False
    last_sentence = sentences(text[-2000:])[-1]
    last_word = last_sentence.split()[-1].lower()
    return last_word not in _ABBREVIATIONS and len(words(last_sentence)) >= min_words


_REQUEST_STEMS = frozenset(stem(word) for word in _REQUEST_WORDS.split())
_EMPTY_TALK_STEMS = frozenset(stem(word) for word in _EMPTY_TALK.split())
