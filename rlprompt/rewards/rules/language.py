"""Reward: the completion is written in one language, found from its script and function words."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field

from rlprompt.rewards.base import Example
from rlprompt.rewards.rules.stopwords import STOP_WORDS
from rlprompt.rewards.rules.text import message_texts, words
from rlprompt.settings import Settings

LanguageCode = Literal[
    "en", "de", "fr", "es", "it", "pt", "nl", "ru", "el", "ar", "he", "hi", "ja", "ko", "zh"
]

_SCRIPTS: dict[str, str] = {
    "latin": "A-Za-z\u00c0-\u024f",
    "ru": "\u0400-\u04ff",
    "el": "\u0370-\u03ff",
    "ar": "\u0600-\u06ff",
    "he": "\u0590-\u05ff",
    "hi": "\u0900-\u097f",
    "ja": "\u3040-\u30ff\u4e00-\u9fff",
    "ko": "\uac00-\ud7af",
    "zh": "\u4e00-\u9fff",
}
_SCRIPT_PATTERNS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
_LETTER = re.compile(f"[^\\W\\d_]|[{_SCRIPTS['hi']}]")  # vowel signs are no \w
_KANA = re.compile("[\u3040-\u30ff]")

_EXPECTED_SHARE = 0.15
"""Share of a text's distinct words that are function words in ordinary prose, at the least."""
_STUFFED_SHARE = 0.75
"""Above this share the text is a list of function words, not a language."""


class Language(Settings):
    """Evidence that the completion is in `language`, in [0, 1].

    Languages of the Latin script: script share * p * evidence * prose. There p is w**2 of the
    target over the sum of w**2 of all, w = distinct function words found, a shared one split
    between its languages; squared, because close languages share many. Evidence rises to 1 when
    15 % of the distinct words are function words of the target, and prose falls to 0 when more than
    75 % of them are, which only stuffing does. Other languages: share of letters in their script;
    Japanese needs some kana, Chinese none.

    Limits: texts of fewer than about five words are guesses, close languages (es/pt) share words,
    languages not listed are taken for the nearest one, and a script says nothing about which of
    its languages is written (Russian or Bulgarian).
    """

    language: LanguageCode = "en"
    """ISO 639-1 code of the language to write in."""
    min_words: int = Field(default=3, ge=1)
    """The value of a completion with fewer words is scaled down by words / min_words."""

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        """One value in [0, 1] per completion."""
        return [self._value(text) for text in message_texts(completions)]

    def _value(self, text: str) -> float:
        letters = len(_LETTER.findall(text))
        if letters == 0:
            return 0.0
        is_latin = self.language in STOP_WORDS
        script = _SCRIPT_PATTERNS["latin" if is_latin else self.language]
        share = min(1.0, len(script.findall(text)) / letters)
        if self.language in ("ja", "zh"):
            kana = len(_KANA.findall(text)) / letters
            share *= min(1.0, 5 * kana) if self.language == "ja" else max(0.0, 1 - 5 * kana)
        tokens = words(text)
        enough = min(1.0, len(tokens) / self.min_words)
        return share * enough * (function_word_evidence(tokens, self.language) if is_latin else 1.0)


def function_word_evidence(tokens: list[str], language: str) -> float:
    """How surely function words show `language` among those of the Latin script, in [0, 1]."""
    types = set(tokens)
    found = types & STOP_WORDS[language]
    if not found:
        return 0.0
    weight = dict.fromkeys(STOP_WORDS, 0.0)
    for word in types:
        sharing = [code for code, stop in STOP_WORDS.items() if word in stop]
        for code in sharing:
            weight[code] += 1 / len(sharing)
    share = len(found) / len(types)
    evidence = min(1.0, share / _EXPECTED_SHARE)
    prose = min(1.0, (1 - share) / (1 - _STUFFED_SHARE))
    part = weight[language] ** 2 / sum(each**2 for each in weight.values())
    return part * evidence * prose


_QUERY = "What is the moon?"
_DE = {"language": "de"}
_JA = {"language": "ja"}
EXAMPLES = [
    Example(_QUERY, "The moon is a ball of rock that moves around the Earth.", True, 0.6),
    Example(_QUERY, "Der Mond ist ein Himmelskörper, der um die Erde kreist.", False, high=0.35),
    Example(_QUERY, "the of and is that to in it was", False, high=0.1),
    Example(_QUERY, "moon rock moon rock moon rock", False, high=0.1),
    Example(_QUERY, "Луна вращается вокруг Земли.", False, high=0.0),
    Example(_QUERY, "", False, high=0.0),
    Example(
        _QUERY,
        "Der Mond ist ein Himmelskörper, der um die Erde kreist.",
        True,
        0.6,
        options=_DE,
    ),
    Example(_QUERY, "The moon is a rock that circles the Earth.", False, high=0.2, options=_DE),
    Example(_QUERY, "月は地球の周りを回っている。", True, 0.9, options=_JA),
    Example(_QUERY, "月亮绕着地球转。", False, high=0.1, options=_JA),
]
