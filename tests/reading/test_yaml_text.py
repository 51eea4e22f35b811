"""YAML bombs and odd spellings are refused at reading, in little time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml

from rlprompt.reading.yaml_text import MOST_NODES, dump, load, reason


def _aliases(first: str, line: str) -> str:
    return first + "".join(line.format(i=i, j=i - 1) for i in range(1, 9))


REFUSED = {
    "alias bomb": (
        _aliases("a0: &a0 [l,l,l]\n", "a{i}: &a{i} [" + ",".join(["*a{j}"] * 9) + "]\n"),
        "aliases written out",
    ),
    "alias bomb of mappings": (
        _aliases(
            "a0: &a0 {{x: 1}}\n".format(),
            "a{i}: &a{i} {{" + ", ".join(f"k{n}: *a{{j}}" for n in range(9)) + "}}\n",
        ),
        "aliases written out",
    ),
    "merge bomb": (
        _aliases(
            "a0: &a0 {x: 1, y: 2}\n", "a{i}: &a{i} {{<<: [" + ",".join(["*a{j}"] * 9) + "]}}\n"
        ),
        "aliases written out",
    ),
    "itself in a list": ("a: &a [1, *a]", "refers to what holds it"),
    "itself in a mapping": ("a: &a {b: {c: *a}}", "refers to what holds it"),
    "itself by a merge": ("a: &a {<<: *a}", "refers to what holds it"),
    "a huge list": ("[" + "1," * (MOST_NODES + 1) + "1]", "aliases written out"),
    "deep lists": ("[" * 20_000 + "]" * 20_000, "levels"),
    "deep mappings": ("{a: " * 3000 + "1" + "}" * 3000, "levels"),
    "deep blocks": ("".join(" " * i + "-\n" for i in range(1500)), "levels"),
    "deep dashes": ("- " * 3000 + "a", "levels"),
    "deep keys": ("? " * 3000, "levels"),
    "no date": ("a: 2024-13-45", "looks like a date, put it in quotes"),
    "a date": ("a: 2024-01-02", "looks like a date, put it in quotes"),
    "a time that is none": ("a: 2024-01-02 25:61:61", "looks like a date"),
    "hexadecimal without digits": ("a: 0x_", "not an integer"),
    "binary without digits": ("a: 0b_", "not an integer"),
    "5000 digits": ("a: " + "9" * 5000, "not an integer"),
    "many hexadecimal digits": ("a: 0x" + "f" * 50_000, "64 bits"),
    "beyond 64 bits": ("a: 9223372036854775808", "64 bits"),
    "base 60 without end": ("a: 1" + ":59" * 3000, "64 bits"),
    "tagged integer": ("a: !!int abc", "not an integer"),
    "tagged number": ("a: !!float abc", "not a number"),
    "tagged truth": ("a: !!bool abc", "not true or false"),
    "bytes": ("a: !!binary aGVsbG8=", "no plain value"),
    "a set": ("a: !!set {b}", "no plain value"),
    "ordered pairs": ("a: !!omap [b: 1]", "no plain value"),
    "Python": ("a: !!python/object/apply:os.system ['true']", "constructor for the tag"),
    "beyond Unicode": ('a: "\\U00110000"', "cannot be read"),
    "half of a pair": ('a: "\\ud800"', "no text"),
    "half of a pair as a key": ('"\\udc00": 1', "no text"),
    "NUL": ('a: "b\\0c"', "no text"),
    "NaN": ("a: .nan", "not a number"),
    "a float beyond range": ("a: 1e400", "too large"),
    "a key twice": ("a: {b: 1, c: 2, b: 3}", "'b' is given twice"),
    "a list as key": ("? [a]\n: 1", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "an unknown alias": ("a: *b", "undefined alias"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_refused(name: str) -> None:
    text, why = REFUSED[name]
    begun = time.process_time()
    with pytest.raises(yaml.YAMLError) as caught:
        load(text)
    assert why in reason(caught.value)
    assert len(reason(caught.value).splitlines()) == 1
    assert time.process_time() - begun < 20


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {k: *b}\nd: {<<: *b, y: 3}",
         {"a": {"x": 1}, "b": {"x": 2}, "c": {"k": {"x": 2}}, "d": {"x": 2, "y": 3}}),
        ("a: [1e-3, 1.5, -0, .inf, 0x10, yes, ~, 'x', x y]",
         {"a": [0.001, 1.5, 0, float("inf"), 16, True, None, "x", "x y"]}),
        ('a: "\\ud83d\\ude00"', {"a": "\U0001f600"}),
        ("a: '2024-01-02'", {"a": "2024-01-02"}),
        ("a: [&x 1, *x, *x]", {"a": [1, 1, 1]}),
        ("", None),
    ],
    ids=["merges", "scalars", "escaped pair", "quoted date", "aliases", "empty"],
)  # fmt: skip
def test_what_is_read(text: str, value: Any) -> None:
    assert load(text) == value


def test_what_is_written_is_read_again() -> None:
    shared = {"texts": ["2024-01-02", "1e3", "0x10", "yes", "\U0001f600", "a\nb"], "none": None}
    tree = {"a": shared, "b": [shared, 1.0e-05, 3, True]}
    assert load(dump(tree, allow_unicode=True)) == tree
