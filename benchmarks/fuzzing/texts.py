"""Recipes, overrides, data and templates: inputs that are text."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.fuzzing.judge import Case
from benchmarks.fuzzing.mutate import STRANGE, encoded, mutated_bytes, mutated_text, mutated_tree
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.recipe.schema import load_recipe
from tests.fixtures.tiny import TEMPLATE, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
GOOD = "name: x\ndata: {rows: [a, b, c]}\nrewards: [{path: 'builtin:length', options: {max: 4}}]\n"
_LEVELS = "".join(f"- &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
_BOMB = f"- &a0 [l,l,l,l,l,l,l,l,l]\n{_LEVELS}"
_MERGES = "".join(f"  a{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9))

INVALID_RECIPES: dict[str, str] = {
    "alias bomb in an unknown key": f"{GOOD}zz:\n{_BOMB}",
    "alias bomb in rows": GOOD.replace("{rows: [a, b, c]}", "\n  rows:\n" + _BOMB),
    "merge bomb": f"{GOOD}zz:\n  a0: &m0 {{x: 1, y: 2}}\n{_MERGES}",
    "alias of itself": f"{GOOD}augment: &a [*a]\n",
    "alias of itself in a mapping": GOOD.replace("{max: 4}", "&o {max: 4, x: *o}"),
    "merge of itself": f"a: &a {{<<: *a}}\n{GOOD}",
    "a date that is none": GOOD.replace("name: x", "name: 2024-13-45"),
    "a hexadecimal without digits": f"{GOOD}seed: 0x_\n",
    "5000 digits": f"{GOOD}seed: {'9' * 5000}\n",
    "a tag that does not fit": f"{GOOD}seed: !!int abc\n",
    "a character beyond Unicode": GOOD.replace("name: x", 'name: "\\U00110000"'),
    "half of a pair": GOOD.replace("name: x", 'name: "a\\ud800b"'),
    "20,000 lists": f"{GOOD}seed: {'[' * 20000}{']' * 20000}\n",
    "3,000 mappings": f"{GOOD}seed: {'{a: ' * 3000}1{'}' * 3000}\n",
    "1,500 blocks": f"{GOOD}seed:\n" + "".join(" " * i + "-\n" for i in range(1, 1500)),
    "deep options": GOOD.replace("{max: 4}", "{max: 4, x: " + "[" * 200 + "]" * 200 + "}"),
    "a user who is not there": f"{GOOD}model: {{template: ~nosuchuser/x}}\n",
    "a device as template": f"{GOOD}model: {{template: /dev/zero}}\n",
    "a group of 10^20": f"{GOOD}algorithm: {{group_size: 99999999999999999999}}\n",
    "a group of 10^9": f"{GOOD}algorithm: {{group_size: 1000000000}}\n",
    "10^23 steps": f"{GOOD}training: {{steps: 99999999999999999999999}}\n",
    "a stop token below 0": f"{GOOD}sampling: {{stop_token_ids: [-1]}}\n",
    "the name ..": GOOD.replace("name: x", "name: '..'"),
    "a NUL in the name": GOOD.replace("name: x", 'name: "a\\0b"'),
    "a line break in the name": GOOD.replace("name: x", 'name: "a\\nb"'),
    "a name of 300": GOOD.replace("name: x", f"name: {'a' * 300}"),
    "NaN": f"{GOOD}training: {{optimizer: {{lr: .nan}}}}\n",
    "NaN in options": GOOD.replace("{max: 4}", "{max: 4, x: .nan}"),
    "a float beyond range": f"{GOOD}training: {{optimizer: {{lr: 1e400}}}}\n",
    "a key twice": f"{GOOD}name: y\n",
    "two documents": f"{GOOD}---\n{GOOD}",
    "an object of Python": f"{GOOD}seed: !!python/object/apply:os.system ['id']\n",
    "bytes": GOOD.replace("name: x", "name: !!binary aGVsbG8="),
    "a set": f"{GOOD}seed: !!set {{a, b}}\n",
    "an empty file": "",
}
"""Recipes that must be refused."""

_KEYS = (
    "training.steps", "rewards.0.weight", "rewards.9.weight", "rewards.x", "name", "model.path",
    "prompt.num_virtual_tokens", "prompt.type", "algorithm", "algorithm.type", "data.rows",
    "data.rows.0", "a..b", ".", " x", "seed.x", "rewards.0.options.max", "", "=",
    "rewards." + "9" * 4400, "rewards.\u0663", "rewards.-1", "rewards.\u00b2", "rewards.999999",
    "sampling.stop_token_ids.0", "tracking.tags.0", "training.optimizer.betas.0",
    "population.0.changes.seed", "\n", "a\nb", "guards.0", "robust", "constraints.lr",
    "evaluation.select_by", "search.type", "engine.type", "data.too_long", "augment.0.type",
)  # fmt: skip
_VALUES = (
    "1", "-1", "[", "{", "}", "'", '"', "*a", "&a [*a]", "!!int x", "!!timestamp x", "!!bool x",
    "2024-99-99", "9" * 4400, "0x_", "[" * 500 + "]" * 500, "["*2000, "{a: 1}", "[1,2]", "", "null",
    "~", "1e400", ".nan", "\t", "\\", '"\\ud800"', '"\\U00110000"', "a\nb: c", "%", "@", "true",
    "yes", "1:30", "0o7", "\u00e9", "\x1b[2J", "\0", "!!python/object/apply:os.system ['id']", "=",
    "<<", "{<<: 1}", "? ", "- a", "|", "> x", "soft", "off", "~nosuchuser/x", "1e308",
)  # fmt: skip
INVALID_OVERRIDES = (
    "rewards.999999=1", "seed=&a [*a]", "seed=0x_", f"seed={'9' * 4400}", "name=2024-13-45",
    f"seed={'[' * 500}{']' * 500}", "algorithm.group_size=99999999999999999999", 'name="a\\0b"',
    "name='..'", "sampling.stop_token_ids=[-1]", "training.optimizer.lr=.nan", "seed", "=1",
    "model.template=~nosuchuser/x", "model.template=/dev/zero", "seed=!!int abc",
)  # fmt: skip


def _trees() -> list[Any]:
    texts = [path.read_text() for path in sorted((ROOT / "recipes").glob("*/*.yaml"))]
    return [yaml.safe_load(text) for text in texts if "rewards" in text and len(text) < 4000]


def recipes(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Recipes: those of the repository with changes, and what must be refused."""
    file = folder / "recipe.yaml"
    trees = _trees()
    dumped = [yaml.safe_dump(tree, sort_keys=False) for tree in trees]

    def case(label: str, content: bytes, invalid: bool) -> Case:
        def run() -> None:
            file.write_bytes(content)
            json.dumps(load_recipe(file).plain())

        return Case(label, run, invalid)

    for label, text in INVALID_RECIPES.items():
        yield case(label, text.encode(), True)
    yield _pipe_case("a pipe as recipe", folder / "pipe.yaml", load_recipe)
    while True:
        if draw.random() < 0.6:
            tree = mutated_tree(draw.choice(trees), draw)
            text = yaml.safe_dump(tree, default_flow_style=draw.choice([None, True, False]))
        else:
            text = mutated_text(draw.choice(dumped), draw)
        yield case(text, encoded(text), False)


def overrides(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Overrides of a good recipe."""
    file = folder / "good.yaml"
    file.write_text(GOOD)

    def case(given: list[str], invalid: bool) -> Case:
        return Case(repr(given), lambda: load_recipe(file, given).plain(), invalid)

    yield from (case([each], True) for each in INVALID_OVERRIDES)
    while True:
        marks = ["=", "=", "=", "= ", ":", ""]
        parts = [
            draw.choice(_KEYS) + draw.choice(marks) + draw.choice(_VALUES)
            for _ in range(draw.choice([1, 1, 2]))
        ]
        yield case(parts, False)


_ROWS: list[dict[str, Any]] = [
    {"query": "What is rain?", "answer": "Water.", "level": 1, "tags": ["a", None]},
    {"query": 'Why, "so"?\nTwo lines', "answer": "", "level": 2.5, "tags": []},
    {"query": "\u00fcber \U0001f600", "answer": "x" * 200, "level": None, "tags": [{"a": 1}]},
]
INVALID_DATA: dict[str, bytes] = {
    "deep.jsonl": b'{"query": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "digits.jsonl": b'{"query": "a", "x": 1}\n{"query": "b", "x": ' + b"9" * 5000 + b"}\n",
    "nan.jsonl": b'{"query": "a", "x": 1}\n{"query": "b", "x": NaN}\n',
    "twice.jsonl": b'{"query": "a", "query": "b"}\n{"query": "c"}\n',
    "half.jsonl": b'{"query": "a\\ud800"}\n{"query": "c"}\n',
    "array.jsonl": b'[{"query": "a"}, {"query": "b"}]\n',
    "lines.json": b'{"query": "a"}\n{"query": "b"}\n',
    "deep.json": b"[" * 100_000,
    "latin.csv": b"query\ncaf\xe9\nb\n",
    "open.csv": b'query\n"a\nb\n',
    "cells.csv": b"query,x\na\nb,1\n",
    "text.parquet": b"PAR1" + b"\0" * 100 + b"PAR1",
    "empty.jsonl": b"",
}
"""Datasets that must be refused, by file name."""


def data(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Datasets in every format."""
    import pyarrow
    import pyarrow.parquet

    sources: dict[str, bytes] = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in _ROWS).encode(),
        "rows.json": json.dumps(_ROWS).encode(),
        "rows.csv": b'query,answer\nWhat is rain?,Water.\n"Why, so?","a ""b"""\nx,\n',
    }
    plain = [{"query": row["query"], "answer": row["answer"]} for row in _ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), folder / "rows.parquet")
    sources["rows.parquet"] = (folder / "rows.parquet").read_bytes()

    def load(path: Path) -> None:
        load_queries(DataSettings(path=path.name, heldout=1), folder)

    def case(name: str, content: bytes, invalid: bool) -> Case:
        def run() -> None:
            (folder / name).write_bytes(content)
            load(folder / name)

        return Case(f"{name}: {content[:150]!r}", run, invalid)

    yield from (case(name, content, True) for name, content in INVALID_DATA.items())
    for suffix in ("jsonl", "json", "csv", "parquet"):
        yield _pipe_case(f"a pipe as .{suffix}", folder / f"pipe.{suffix}", load)
    while True:
        name = draw.choice(list(sources))
        content = sources[name]
        if name.endswith(".parquet") or draw.random() < 0.3:
            content = mutated_bytes(content, draw)
        elif draw.random() < 0.5 and name.endswith("json"):
            content = json.dumps(mutated_tree(_ROWS, draw, STRANGE, ("query",))).encode()
        elif draw.random() < 0.5 and name.endswith("jsonl"):
            rows = mutated_tree(_ROWS, draw, STRANGE, ("query",))
            content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        else:
            content = encoded(mutated_text(content.decode(), draw))
        yield case(name, content, False)


INVALID_TEMPLATES: dict[str, str] = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "multiplied": "{{ 'a' * 10000000000 }}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "centred": "{{ 'a' | center(10000000000) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "endless macro": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "branching macro": "{% macro m(n) %}{% if n < 60 %}{{ m(n + 1) }}{{ m(n + 1) }}{% endif %}"
    "{% endmacro %}{{ m(0) }}",
    "parentheses": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__()[1] }}{{ undefined_name.x }}",
}
"""Pieces of Jinja that no template may begin with."""


def templates(draw: random.Random, folder: Path) -> Iterator[Case]:
    """Chat templates: those of the field with changes, and endless ones."""
    del folder
    files = sorted((ROOT / "tests" / "fixtures" / "templates").glob("*.jinja"))
    sources = [TEMPLATE, *(path.read_text() for path in files)]
    tokenizer = tiny_tokenizer()

    def case(label: str, template: str, invalid: bool) -> Case:
        def run() -> None:
            tokenizer.chat_template = template
            ChatSlot.from_tokenizer(tokenizer)

        return Case(label, run, invalid)

    for label, start in INVALID_TEMPLATES.items():
        yield case(label, start + TEMPLATE, True)
    while True:
        text = mutated_text(draw.choice(sources), draw)
        yield case(text, text.encode("utf-8", "replace").decode(), False)


def _pipe_case(label: str, path: Path, read: Callable[[Path], object]) -> Case:
    """A named pipe that nobody writes to."""

    def run() -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        try:
            read(path)
        finally:
            path.unlink()

    return Case(label, run, invalid=True)
