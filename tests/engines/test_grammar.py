"""Rows that are held to JSON of a schema, beside rows that are not; and hostile schemas."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from rlprompt.engines import grammar
from rlprompt.engines.continuous import Ask, ContinuousDecoder, Token
from rlprompt.engines.grammar import GrammarFaultError, JsonGrammar, JsonGrammars
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Query
from tests.fixtures.server import tiny_policy

Schema = dict[str, Any]
PERSON: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "old": {"type": "boolean"},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "old", "kind"],
    "additionalProperties": False,
}
SCHEMAS: list[Schema] = [
    {},
    {"type": "object"},
    PERSON,
    {"type": "object", "maxProperties": 1, "minProperties": 1},
    {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 3},
    {"type": "string", "minLength": 4, "pattern": "^a"},
    {"type": "integer", "multipleOf": 7, "minimum": 30},
    {"type": ["string", "null"], "x-guidance": {"whitespace_flexible": True}},
    {"const": {"a": [1, 2]}},
    {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "array", "items": {"$ref": "#"}}],
     "$defs": {"leaf": {"type": "number", "minimum": 0, "maximum": 1}}},
]  # fmt: skip


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def grammars(policy: Policy) -> JsonGrammars:
    return JsonGrammars(policy)


def walked(policy: Policy, made: JsonGrammar, seed: int) -> str:
    """A random answer that ends as soon as it may, and closes what it can."""
    draws = random.Random(seed)
    tokenizer = policy.base.tokenizer
    closing = {tokenizer.convert_tokens_to_ids(mark) for mark in '}]"'}
    row, ids = made.begin(), list[int]()
    for _ in range(300):
        allowed = row.allowed().nonzero()[:, 0].tolist()
        ends = [each for each in allowed if each in policy.stop_ids]
        closes = [each for each in allowed if each in closing]
        token = draws.choice(ends or (closes if draws.random() < 0.7 and closes else allowed))
        if ends:
            return policy.decode(ids)
        ids.append(token)
        row.push(token)
    raise AssertionError(f"no end: {policy.decode(ids)}")


@pytest.mark.parametrize("place", range(len(SCHEMAS)))
def test_whatever_a_row_draws_is_json_of_the_schema(
    policy: Policy, grammars: JsonGrammars, place: int
) -> None:
    made = grammars.of(SCHEMAS[place])
    for seed in range(10):
        text = walked(policy, made, seed)
        jsonschema.validate(json.loads(text), SCHEMAS[place])
        assert not text[:1].isspace()
    assert grammars.of(SCHEMAS[place]) is made, "the grammar of a schema is kept"


def ask_of(policy: Policy, text: str, made: JsonGrammar | None = None, **values: Any) -> Ask:
    query = Query(messages=({"role": "user", "content": text},))
    prompt = TextPrompt("Answer in one line.")
    with torch.no_grad():
        prefix = policy.prefix(prompt).snapshot()
    sampling = SamplingSettings(**{"temperature": 0.0, "max_tokens": 40, **values})
    ids = tuple(policy.query_ids(query, prompt))
    return Ask(prefix, ids, sampling, seed=3, top_logprobs=3, grammar=made)


def decoded(decoder: ContinuousDecoder) -> dict[tuple[Ask, int], list[Token]]:
    found: dict[tuple[Ask, int], list[Token]] = {}
    while decoder.num_rows:
        for token in decoder.step():
            found.setdefault((token.ask, token.copy), []).append(token)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beside_it_keep_every_bit(family: str, temperature: float) -> None:
    policy = tiny_policy(family)
    made = JsonGrammars(policy).of(PERSON)
    values: dict[str, Any] = {"temperature": temperature, "max_tokens": 20}
    beside = [ask_of(policy, text, **values) for text in ("the sun", "the rain and the land")]
    free = ask_of(policy, "the men", **values)
    runs = []
    for other in (free, replace(free, grammar=made)):
        decoder = ContinuousDecoder(policy)
        decoder.join([beside[0], other, beside[1]])
        runs.append(decoded(decoder))
    for ask in beside:
        # Log-probabilities are compared as numbers: equal to the last bit.
        first, second = (
            [(t.token_id, t.logprob, t.top, t.finish) for t in run[ask, 0]][:8] for run in runs
        )
        assert first == second


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_all_copies_of_a_request_are_held(policy: Policy, temperature: float) -> None:
    made = JsonGrammars(policy).of(PERSON)
    ask = replace(
        ask_of(policy, "the sun", made, temperature=temperature, top_p=0.9, max_tokens=60), copies=3
    )
    decoder = ContinuousDecoder(policy)
    decoder.join([ask, ask_of(policy, "the rain", max_tokens=5)])
    found = decoded(decoder)
    for copy in range(3):
        tokens = found[ask, copy]
        assert tokens[-1].finish == "stop"
        text = policy.decode([token.token_id for token in tokens])
        jsonschema.validate(json.loads(text), PERSON)


def test_a_stop_token_of_the_prompt_does_not_end_it_in_the_middle(policy: Policy) -> None:
    made = JsonGrammars(policy).of({"type": "string", "maxLength": 3})
    tokenizer = policy.base.tokenizer
    letter, quote, other = (tokenizer.encode(each)[0] for each in ("a", '"', "b"))
    row = made.begin([letter, quote])
    assert row.allowed()[quote], "the only token that goes on"
    row.push(quote)
    assert not row.allowed()[letter] and row.allowed()[other]


class _Faulty(JsonGrammar):
    """One whose rows cannot go on after two tokens."""

    def begin(self, stop_token_ids: Any = ()) -> Any:
        row = super().begin(stop_token_ids)
        allowed, steps = row.allowed, iter(range(2))

        def failing() -> torch.Tensor:
            if next(steps, None) is None:
                raise GrammarFaultError("too much")
            return allowed()

        row.allowed = failing  # type: ignore[method-assign]
        return row


def test_a_row_that_cannot_go_on_leaves_and_the_others_stay(policy: Policy) -> None:
    made = JsonGrammars(policy).of(PERSON)
    faulty = _Faulty(made._matcher, policy)
    bad, good = ask_of(policy, "the sun", faulty), ask_of(policy, "the rain", max_tokens=6)
    alone = ContinuousDecoder(policy)
    alone.join([good])
    decoder = ContinuousDecoder(policy)
    decoder.join([bad, good])
    found = decoded(decoder)
    assert [each.fault for each in found[bad, 0]] == [None, None, "too much"]
    ids = [each.token_id for each in found[good, 0]]
    assert ids == [each.token_id for each in decoded(alone)[good, 0]]


def _chain(length: int) -> Schema:
    links: Schema = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}


_LAST: Schema = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
_EITHER: list[Schema] = [
    {"anyOf": [{"properties": {f"a{i}": {"const": 1}}}, {"properties": {f"b{i}": {}}}]}
    for i in range(22)
]
HOSTILE: Mapping[str, tuple[Schema, str]] = {
    "huge": ({"enum": [str(i) for i in range(9000)]}, "characters"),
    "chain": (_chain(300), r"\$refs"),
    "itself": ({"$ref": "#"}, "no JSON fits"),
    "circle": ({"$ref": "#/$defs/a", "$defs": _LAST}, "no JSON fits"),
    "choices": ({"allOf": _EITHER}, "too large"),
    "regexes": (
        {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b"} for i in range(10, 20)]},
        "regex",
    ),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "file": ({"$ref": "file:///etc/passwd"}, "not present"),
    "keyword": ({"if": {}, "then": {}}, "Unimplemented"),
    "nothing": ({"enum": []}, "Unsatisfiable"),
    "type": ({"type": "strin"}, "Invalid type"),
    "shape": ({"type": "object", "properties": 5}, "object"),
    "surrogate": ({"type": "string", "pattern": "\ud800"}, "escape"),
    "twice": ({"type": "object", "minProperties": 3}, "minProperties"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_schema_that_cannot_be_used_is_one_sentence(grammars: JsonGrammars, name: str) -> None:
    schema, why = HOSTILE[name]
    with pytest.raises(InputError, match=why) as caught:
        grammars.of(schema)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 400 and "simplify it; simplify" not in said


def test_what_ends_the_reader_does_not_end_us(
    grammars: JsonGrammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="to read it takes more than"):
        grammar._try_out(json.dumps(_chain(20_000)))
    monkeypatch.setattr(grammar, "_SECONDS", 0.001)
    with pytest.raises(InputError, match="to read it takes more than"):
        grammar._try_out("{}")


def test_without_the_library_it_is_said_what_to_install(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InputError, match=r"pip install 'rlprompt\[serve\]'"):
        JsonGrammars(policy).of(PERSON)
