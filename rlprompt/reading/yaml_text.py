"""YAML as plain values, read more strictly than PyYAML does, and within limits.

Numbers are those of YAML 1.2 beside those of 1.1 (`1e-3` is a number). Refused are: a key that is
given twice; aliases that refer to what holds them, or that make a small text stand for a huge tree;
nesting beyond `MOST_LEVELS`; tags of other types than JSON has; dates, which would be text to
whoever wrote them; NaN, integers beyond 64 bits and floats beyond their range; NUL and halves of
surrogate pairs in texts. A recipe is plain values, so nothing is lost.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from rlprompt.reading.json_text import MOST_LEVELS, is_text

MOST_NODES = 100_000
"""Keys and values that a text may stand for, aliases written out."""

_TAG = "tag:yaml.org,2002:"
_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "null": "null"}
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def load(text: str, most_nodes: int = MOST_NODES) -> Any:
    """The value of a YAML text: nested dicts, lists and scalars.

    Args:
        text: text of one document.
        most_nodes: keys and values that it may stand for.

    Raises:
        yaml.YAMLError: it is no YAML, or what this module refuses.
    """
    loader = None
    try:
        loader = _Loader(text)
        loader.most_nodes = most_nodes
        return loader.get_single_data()
    except (ValueError, OverflowError) as error:  # the scanner's own, such as of "\\U00110000"
        mark = loader.get_mark() if loader is not None else None
        raise ConstructorError(
            None, None, f"an escape or number that cannot be read ({error})", mark
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def dump(value: Any, **options: Any) -> str:
    """Plain values as YAML that `load` reads back as they are.

    Args:
        value: nested dicts, lists and scalars.
        options: options of `yaml.dump`; keys keep their order unless these say otherwise.
    """
    text: str = yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, **options})
    return text


def reason(error: yaml.YAMLError) -> str:
    """What is wrong, with line and column, in words that fit into a sentence."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{problem(error)}; mend it"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem(error)}; mend that line"


def problem(error: yaml.YAMLError) -> str:
    """What is wrong, without its place."""
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.most_nodes = MOST_NODES
        self._nodes = 0
        self._levels = 0
        self._open: set[str] = set()
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and count what it stands for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML's stubs lack it
        mark: Any = event.start_mark
        anchor: str | None = getattr(event, "anchor", None)
        before = self._nodes
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise ComposerError(
                    None, None, f"the alias *{anchor} refers to what holds it", mark
                )
            self._nodes += self._sizes.get(anchor or "", 0)
        else:
            self._nodes += 1
            self._levels += 1
            if anchor is not None:
                self._open.add(anchor)
        if self._nodes > self.most_nodes or self._levels > MOST_LEVELS:
            raise ComposerError(None, None, self._too_much(), mark)
        node = super().compose_node(parent, index)
        if not isinstance(event, yaml.AliasEvent):
            self._levels -= 1
            if anchor is not None:
                self._open.discard(anchor)
                self._sizes[anchor] = self._nodes - before
        return node

    def _too_much(self) -> str:
        if self._levels > MOST_LEVELS:
            return f"there are more than {MOST_LEVELS} levels inside one another"
        return f"it stands for more than {self.most_nodes:,} keys and values, aliases written out"

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping, and refuse a key that is given twice."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(
                        None, None, f"the key '{key.value[:80]}' is given twice", key.start_mark
                    )
                seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        """Compose a scalar, and refuse what is no text."""
        node = super().compose_scalar_node(anchor)
        # JSON writes what lies beyond 16 bits as two escapes.
        node.value = _PAIR.sub(_joined, node.value)
        if "\0" in node.value or not is_text(node.value):
            raise ComposerError(
                None, None, "a NUL or half of a surrogate pair, which is no text", node.start_mark
            )
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Construct a value, and refuse what is not plain."""
        kind = node.tag.removeprefix(_TAG)
        if kind == "timestamp":
            raise ConstructorError(
                None,
                None,
                f"{node.value[:40]!r} looks like a date, put it in quotes",
                node.start_mark,
            )
        if kind in ("binary", "set", "omap", "pairs"):
            raise ConstructorError(
                None, None, f"the tag !!{kind} gives no plain value, remove it", node.start_mark
            )
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, OverflowError, AttributeError) as error:
            shown = node.value[:40] if isinstance(node.value, str) else "this"
            raise ConstructorError(
                None,
                None,
                f"{shown!r} is not {_WORDS.get(kind, 'a value')}, put text in quotes",
                node.start_mark,
            ) from error
        if isinstance(value, int | float):
            _check_number(value, node)
        return value


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would not read as text."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        f"{_TAG}float",
        re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z"),
        list("-+.0123456789"),
    )


def _joined(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16", "surrogatepass").decode("utf-16")


def _check_number(value: float, node: yaml.ScalarNode) -> None:
    """Refuse NaN, and numbers that are larger than what can be counted with."""
    shown = node.value[:24]
    problem = ""
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            problem = f"the integer {shown} needs more than 64 bits"
    elif math.isnan(value):
        problem = f"{shown} is not a number, write null or a number"
    elif math.isinf(value) and "inf" not in node.value.lower():
        problem = f"the number {shown} is too large"
    if problem:
        raise ConstructorError(None, None, problem, node.start_mark)
