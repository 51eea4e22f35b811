"""Answers that are JSON of a schema: which tokens a row may draw next.

The library llguidance reads the schema and follows the row, byte by byte; a token is allowed where
its bytes go on with some JSON of the schema. Schemas come from clients, so what they may cost is
bounded: their size here, their first reading by a process of its own (`grammar_check`), and every
later step by the library's own limits.

Letters: V vocabulary.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlprompt.engines.grammar_check import LIMITS, OPTIONS
from rlprompt.errors import InputError
from rlprompt.policy import Policy

MOST_CHARACTERS = 32_768
"""Of a schema as JSON."""
_MOST_REFERENCES = 200
"""`$ref`s of a schema: each may be a call that the library makes inside of another."""
_MOST_KEPT = 32
"""Schemas whose grammars are kept for the next request."""
_CHECK = Path(__file__).with_name("grammar_check.py")
_CPU_SECONDS, _SECONDS, _MEMORY_BYTES = 5, 20, 2**30
"""What trying a schema out may take."""


class GrammarFaultError(Exception):
    """A row cannot go on under its grammar; the sentence says why."""


class GrammarRow:
    """The place of one row in its grammar; used by one thread."""

    def __init__(self, matcher: Any, vocab_size: int, banned: Sequence[int]) -> None:
        """Begin before the first token.

        Args:
            matcher: an `llguidance.LLMatcher` of its own.
            vocab_size: number of tokens, V.
            banned: tokens that would end the answer in the middle of it.
        """
        self._matcher, self._vocab, self._banned = matcher, vocab_size, list(banned)

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [V] on the CPU; at least one.

        Raises:
            GrammarFaultError: the schema asks for more than a step may take.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocab, bitorder="little").astype(bool)
        self._require_no_fault()
        others = mask.copy()
        others[self._banned] = False
        kept = others if others.any() else mask
        if not kept.any():
            raise GrammarFaultError("no token of the model goes on with JSON of it; change it")
        return torch.from_numpy(kept)

    def push(self, token_id: int) -> None:
        """Go on by a token.

        Args:
            token_id: one that `allowed` allows.

        Raises:
            GrammarFaultError: the schema asks for more than a step may take.
        """
        self._matcher.consume_token(token_id)
        self._require_no_fault()

    def _require_no_fault(self) -> None:
        if not self._matcher.is_error():
            return
        why = _one_line(self._matcher.get_error().removesuffix("<non-verbose/>"))
        if why.startswith("NoExtension"):
            raise GrammarFaultError("no JSON fits the schema; correct it")
        raise GrammarFaultError(f"the JSON schema takes too much work ({why}); simplify it")


class JsonGrammar:
    """A schema that rows of one base can be held to."""

    def __init__(self, matcher: Any, policy: Policy) -> None:
        """Take a matcher as the one that rows copy.

        Args:
            matcher: an `llguidance.LLMatcher` that has not begun.
            policy: the policy over the base.
        """
        self._matcher = matcher
        self._vocab, self._ends = policy.base.vocab_size, policy.stop_ids

    def begin(self, stop_token_ids: Sequence[int] = ()) -> GrammarRow:
        """A row that has drawn nothing.

        Args:
            stop_token_ids: further tokens that end an answer; they are not drawn in JSON.
        """
        others = [each for each in stop_token_ids if each not in self._ends and each < self._vocab]
        return GrammarRow(self._matcher.deep_copy(), self._vocab, others)


class JsonGrammars:
    """Reads schemas for one base and keeps what it has read last; used by one thread."""

    def __init__(self, policy: Policy) -> None:
        """Begin without a schema; the tokenizer is read at the first.

        Args:
            policy: the policy over the base.
        """
        self._policy = policy
        self._tokenizer: Any = None
        self._kept: OrderedDict[str, JsonGrammar] = OrderedDict()

    def of(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """The grammar of a JSON schema.

        Args:
            schema: the schema, as parsed JSON.

        Raises:
            InputError: llguidance is not installed, or the schema cannot be used.
        """
        text = json.dumps(schema)
        if text in self._kept:
            self._kept.move_to_end(text)
            return self._kept[text]
        library = _library()
        _require_plain(text, schema)
        _try_out(text)
        if self._tokenizer is None:
            self._tokenizer = _tokenizer(library, self._policy)
        made = library.LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
        limits = library.LLParserLimits(**LIMITS)
        matcher = library.LLMatcher(self._tokenizer, made, log_level=0, limits=limits)
        grammar = JsonGrammar(matcher, self._policy)
        _require_json(matcher, grammar)
        self._kept[text] = grammar
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return grammar


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise InputError(
            "llguidance is not installed where the server runs, so answers cannot be held to JSON; "
            "run `pip install 'rlprompt[serve]'` there, or ask for text"
        ) from error


def _tokenizer(library: Any, policy: Policy) -> Any:
    """The base's tokenizer as llguidance reads it."""
    described = json.loads(policy.base.tokenizer.backend_tokenizer.to_str())
    described |= {"padding": None, "truncation": None}
    size = max(policy.base.vocab_size, len(policy.base.tokenizer))
    try:
        return library.LLTokenizer(
            json.dumps(described),
            n_vocab=size,
            eos_token=sorted(policy.stop_ids),
            slices=library.LLTokenizer.json_slices(),
        )
    except ValueError as error:
        raise InputError(
            f"the tokenizer of {policy.base.id} cannot be held to JSON "
            f"({_one_line(str(error))}); ask for text"
        ) from error


def _require_plain(text: str, schema: Mapping[str, Any]) -> None:
    if len(text) > MOST_CHARACTERS:
        raise _unusable(
            f"it has {len(text)} characters, and {MOST_CHARACTERS} is the most", "shorten it"
        )
    count, parts = 0, [schema]
    while parts:
        part: Any = parts.pop()
        if isinstance(part, dict):
            count += "$ref" in part
            least = part.get("minProperties")
            if isinstance(least, int | float) and least > 1:
                # A key may come twice, and then there are fewer than it seems.
                raise _unusable("it has minProperties above 1", "name the properties as required")
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    if count > _MOST_REFERENCES:
        raise _unusable(f"it has {count} $refs, and {_MOST_REFERENCES} is the most", "simplify it")


def _try_out(text: str) -> None:
    """Let another process read the schema first."""
    limits = [str(_CPU_SECONDS), str(_MEMORY_BYTES)]
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(_CHECK), *limits],
            input=text.encode(),
            capture_output=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _unusable(f"to read it takes more than {_SECONDS} s", "simplify it") from error
    if done.returncode < 0:
        raise _unusable(
            f"to read it takes more than {_CPU_SECONDS} s, or more memory than there is for it",
            "simplify it",
        )
    told = done.stdout.decode("utf-8", "replace") or ("its reader failed" * (done.returncode != 0))
    if told:
        raise _unusable(_one_line(told), "correct it")


def _require_json(matcher: Any, grammar: JsonGrammar) -> None:
    """Refuse what the grammar of a schema cannot begin, or may end before it has begun."""
    if not matcher.is_error() and matcher.is_accepting():
        raise _unusable("an empty answer would fit it, as with a $ref to itself", "correct it")
    try:
        grammar.begin().allowed()
    except GrammarFaultError as error:
        raise InputError(str(error)) from error


def _unusable(why: str, advice: str) -> InputError:
    return InputError(f"answers cannot be held to this JSON schema: {why}; {advice}")


def _one_line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else f"{words[:197]}..."
