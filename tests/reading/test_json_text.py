"""JSON that only Python would take is refused, and nothing ends in another exception."""

from __future__ import annotations

import json

import pytest

from rlprompt.reading.json_text import MOST_LEVELS, loads

REFUSED = {
    "deep lists": ("[" * 100_000, "levels"),
    "deep objects": ('{"a":' * 5000 + "1" + "}" * 5000, "levels"),
    "one level too many": ("[" * (MOST_LEVELS + 2) + "]" * (MOST_LEVELS + 2), "levels"),
    "5000 digits": ("9" * 5000, "64 bits"),
    "more than 64 bits": ('{"a": 18446744073709551616}', "64 bits"),
    "NaN": ('{"a": NaN}', "NaN is no number"),
    "minus infinity": ("-Infinity", "Infinity is no number"),
    "a float beyond range": ("1e400", "too large"),
    "a key twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
    "half of a pair": ('["\\ud800"]', "surrogate"),
    "half of a pair as a key": ('{"\\udc00": 1}', "surrogate"),
    "nothing": ("", "Expecting value"),
    "more data": ("{} {}", "Extra data"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused(name: str) -> None:
    text, reason = REFUSED[name]
    for given in (text, text.encode()):
        with pytest.raises(json.JSONDecodeError) as caught:
            loads(given)
        assert reason in caught.value.msg


def test_other_encodings_are_refused_and_a_byte_order_mark_is_not() -> None:
    with pytest.raises(json.JSONDecodeError, match="UTF-8"):
        loads('{"a": 1}'.encode("utf-16"))
    assert loads(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    "value",
    [{"a": [1, -2.5e-3, None, True, "\u2028 \U0001f600"]}, [], "x", 2**64 - 1, -(2**63), 0.1],
    ids=["nested", "empty", "text", "largest", "smallest", "float"],
)
def test_what_is_json_comes_back(value: object) -> None:
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value, ensure_ascii=False).encode()) == value


def test_logs_may_hold_halves_of_pairs_and_other_programs_nan() -> None:
    assert loads('"\\ud800"', surrogates=True) == "\ud800"
    assert loads('{"a": Infinity, "a": 1e400}', lenient=True) == {"a": float("inf")}
    with pytest.raises(json.JSONDecodeError, match="levels"):
        loads("[" * 100_000, lenient=True)
