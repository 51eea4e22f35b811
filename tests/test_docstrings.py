"""Every entry of an `Args:` section begins with what the argument is: a noun, or a clause for one.

"settings: the settings of AdamW", not "settings: of AdamW". A shape or a type counts ("[B, T]",
"int64 [B]"), and so does a clause ("whether ...", "what ...", "how ...", "where ..."). What None
means, where to read more and what happens follow after it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rlprompt"

WITHOUT_NOUN = """
    of whose whom which that those such as in to from under over by with without at on for per
    among beside before after above below between if when unless until then also afterwards never
    none see
"""
WHAT_IT_DOES = """
    add adds apply applies ask asks bounds call calls change changes continue continues decide
    decides divide divides do does draw draws end ends gets give gives go goes has have holds keep
    keeps lets load loads log logs make makes need needs print prints puts reads read say says score
    scores set sets show shows stands starts stops take takes tell tells trusts turn turns use uses
    wants write writes
"""
HOW_IT_IS = """
    absolute called dense dotted drawn entered finished fitted given held made measured plain raised
    renders resolved scored shared synced told trained unique wanted
"""


def one_of(words: str) -> str:
    """A pattern for any of some words."""
    return rf"(?:{'|'.join(words.split())})\b"


PATTERNS = [
    rf"{one_of(WITHOUT_NOUN)}",
    rf"{one_of(WHAT_IT_DOES)}(?! of\b)",  # "scores of the batch" are something
    rf"{one_of(HOW_IT_IS)}(?:[.,;]| {one_of(WITHOUT_NOUN)})",  # no noun follows
    r"[A-Z](?:_\w+)?[;.,]|[A-Za-z] (?:[<>]|in\b)|[\d<>=-]",  # a letter or a number alone
]
VERBS = "are become becomes can gets gives goes has have is may must needs trusts"
PATTERNS.append(rf"(?!what |whether |how |where |who )\S+ {one_of(VERBS)}")
"""A sentence about something else: "temperature: logits are divided by it"."""
UNNAMED = re.compile("|".join(PATTERNS), re.IGNORECASE)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Name and docstring of every class and function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, ast.get_docstring(node) or ""


def entries(docstring: str) -> Iterator[tuple[str, str]]:
    """Name and text of every argument in the `Args:` section."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{docstring}\n", re.MULTILINE)
    if section is not None:
        found = re.findall(r"^    (\*{0,2}\w[\w, *]*): (.*(?:\n {8}.*)*)", section[1], re.MULTILINE)
        for name, text in found:
            yield name, " ".join(text.split())


def is_named(text: str) -> bool:
    """Whether an entry begins with what the argument is."""
    return UNNAMED.match(text) is None


def unnamed(path: Path) -> Iterator[str]:
    """Entries of a module that do not say what the argument is."""
    for function, docstring in docstrings(path.read_text(encoding="utf-8")):
        for name, text in entries(docstring):
            if not is_named(text):
                yield f"{path.relative_to(PACKAGE)} {function}: {name}: {text[:60]}"


def test_every_argument_is_said_to_be_something() -> None:
    assert [entry for path in sorted(PACKAGE.rglob("*.py")) for entry in unnamed(path)] == []


def test_entries_are_read_with_their_further_lines() -> None:
    docstring = (
        "Do.\n\nArgs:\n    a, b: the one\n        and the other.\n    **c: of it.\n\nReturns:\n"
    )
    assert list(entries(docstring)) == [("a, b", "the one and the other."), ("**c", "of it.")]


def test_a_noun_a_shape_and_a_clause_name_an_argument() -> None:
    texts = ("the policy.", "[B, T].", "int64 [B].", "`key=value` strings.", "whether it is on.")
    assert all(
        map(
            is_named,
            (*texts, "what is kept.", "plain values.", "scores of rows.", "positions seen."),
        )
    )


def test_what_has_lost_its_noun_is_found() -> None:
    texts = ("of AdamW.", "whose prompt.", "None = all.", "see `X`.", "G; B is a multiple of it.")
    more = (
        "Called with a line.",
        "resolved, as values.",
        "logits are divided by it.",
        "0 trusts the value.",
        ">= 0.",
    )
    assert not any(map(is_named, (*texts, *more)))
