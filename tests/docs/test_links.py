"""What the documents and docstrings point at is there: links, files, modules.

A file that is gone may be named with a commit that had it: "`scripts/results.py` as of 54bbbdf".
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)
SOURCES = sorted(
    path
    for folder in ("rlprompt", "benchmarks", "experiments", "examples", "tests", "reward_models")
    for path in (ROOT / folder).rglob("*.py")
)
MADE = set(re.findall(r"^/(\w+)/$", (ROOT / ".gitignore").read_text("utf-8"), re.MULTILINE))
"""Folders that commands make and git ignores: what lies there is a user's own."""
FOLDERS = sorted(
    path.name
    for path in ROOT.iterdir()
    if path.is_dir() and not path.name.startswith(".") and path.name not in MADE
)
"""What stands before the first slash of a path from the root of the repository."""
SHORT = (ROOT, ROOT / "rlprompt", ROOT / "benchmarks", ROOT / "tests")
"""A path to code may leave these out: `kernels/dispatch.py`."""
CODE = (".py", ".cpp", ".h", ".jinja")
EXAMPLES = {"path/file.py", "file.py", "FILE.py", "my_reward.py", "first/reward.py", "waits.py"}
"""Files of a user."""
PLACEHOLDER = re.compile(r"_[A-Z]+\b|\b(?!README|CONTRIBUTING|CHANGELOG)[A-Z]+\.\w+$")
PACKAGES = [path.name for path in (ROOT / "rlprompt").iterdir() if (path / "__init__.py").exists()]
REFERENCES = [ROOT / "docs" / name for name in ("recipe.md", "reward_options.md")]
"""Pages that list every setting; a test writes them."""
WRONG_INPUTS = ROOT / "docs" / "errors.md"
"""Names what users get wrong."""
NOT_NAMES = ("yaml", "json", "jsonl", "py", "md", "toml", "conf")

FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+(?:\n[^`\n]+)*)`")
PAST = re.compile(r"`[^`]+`\s+as\s+of\s+[0-9a-f]{7,40}\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PAGE = re.compile(r"\bdocs/[\w/.-]+\.md\b")
DOTTED = re.compile(r"\b[a-z_]+(?:\.[A-Za-z_]\w*)+")


def quoted(text: str) -> Iterator[str]:
    """The words that stand in backquotes, blocks of code included."""
    text = PAST.sub("", text)
    for block in FENCE.finditer(text):
        yield from block[0].split()
    yield from in_line(text)


def in_line(text: str) -> Iterator[str]:
    """The words in backquotes outside of blocks."""
    for span in QUOTED.finditer(FENCE.sub("", text)):
        yield from span[1].split()


def alternatives(path: str) -> list[str]:
    """The paths that one with braces stands for."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return [path]
    front, back = path[: braces.start()], path[braces.end() :]
    return [whole for part in braces[1].split(",") for whole in alternatives(front + part + back)]


def exists(path: str, places: tuple[Path, ...]) -> bool:
    """Whether a path, which may hold `*`, is in one of the places."""
    return any(
        any(place.glob(path)) if "*" in path else (place / path).exists() for place in places
    )


def missing_file(word: str, page: Path) -> bool:
    """Whether a word in backquotes names a file of this repository that is not there."""
    path = re.split(r"::|:|#", word.strip("()[],;.\"'"))[0].removesuffix("/")
    if path in EXAMPLES or PLACEHOLDER.search(path) or re.search(r"[^\w./{},*-]", path):
        return False
    if "/" in path and path.split("/")[0] in FOLDERS:
        return not all(exists(each, (ROOT,)) for each in alternatives(path))
    if path.startswith(("/", ".")) or not path.endswith(CODE):
        return False
    if "/" not in path:
        return not all(each in file_names() for each in alternatives(path))
    return not all(exists(each, (*SHORT, page.parent)) for each in alternatives(path))


@cache
def file_names() -> frozenset[str]:
    """Names of all files, without their folders."""
    return frozenset(path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))


@cache
def setting_names() -> frozenset[str]:
    """Settings of recipes and reward models, and the sections that they are in."""
    keys = [
        key
        for page in REFERENCES
        for key in re.findall(r"^\| `([\w.]+)`", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    parts = [key.split(".") for key in keys]
    return frozenset(".".join(part[:count]) for part in parts for count in range(1, len(part) + 1))


@cache
def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("rlprompt"):  # an optional package is missing
                return set(parts[count:][:1]) <= set(defined(".".join(parts[:count])))
            continue
        for name in parts[count:]:
            fields = getattr(found, "__annotations__", {})
            if not hasattr(found, name) and name not in fields:
                return False
            found = getattr(found, name, None)
        return True
    return False


def defined(module: str) -> list[str]:
    """What a module that cannot be imported here makes at its top."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in body if isinstance(node, kinds)]


def missing_names(text: str) -> list[str]:
    """Dotted names in backquotes that are no module or object of the package, and no setting.

    `rlprompt.` may be left out where a package of it comes next: `kernels.cpu.ops`.
    """
    full = {name for word in quoted(text) for name in DOTTED.findall(word)}
    found = {name: name for name in full if name.startswith("rlprompt.")}
    for name in {name for word in in_line(text) for name in DOTTED.findall(word)}:
        is_file = name.split(".")[-1] in NOT_NAMES
        if name.split(".")[0] in PACKAGES and not is_file and name not in setting_names():
            found[name] = f"rlprompt.{name}"
    return sorted(name for name, whole in found.items() if not resolves(whole))


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", title).strip().lower() for title in titles)
    return frozenset(re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain)


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links whose file or heading is not there."""
    wrong = []
    for target in LINK.findall(QUOTED.sub("", FENCE.sub("", text))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    return wrong


def prose(source: str) -> str:
    """Docstrings and comments of a module; a comment of several lines stays one text."""
    pieces = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            pieces.append(str(node.value.value))
    comments = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    return "\n\n".join([*pieces, "\n".join(comments)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_points_at_what_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(text, page) == []
    if page != WRONG_INPUTS:
        assert sorted({word for word in quoted(text) if missing_file(word, page)}) == []
        assert page in REFERENCES or missing_names(text) == []


def test_docstrings_and_comments_name_files_and_modules_that_are_there() -> None:
    wrong: dict[str, list[str]] = {}
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        text = prose(source)
        found = {word for word in quoted(text) if missing_file(word, path)}
        found |= {page for page in PAGE.findall(PAST.sub("", source)) if not (ROOT / page).exists()}
        found |= set(missing_names(text))
        if found:
            wrong[str(path.relative_to(ROOT))] = sorted(found)
    assert wrong == {}


def test_what_is_not_there_is_found() -> None:
    page = ROOT / "docs" / "page.md"
    text = "[no](no.md), [no](log.md#no-such-heading), [yes](log.md#contents), [web](http://a.b)"
    assert broken_links(text, page) == ["no.md", "log.md#no-such-heading"]
    text = (
        "`rlprompt/no.py`, `python tests/docs/pages.py -x`, `kernels/{dispatch,no}.py`, `docs/*.md`"
    )
    assert [word for word in quoted(text) if missing_file(word, page)] == [
        "rlprompt/no.py",
        "kernels/{dispatch,no}.py",
    ]
    text = "`no_such_file.py`, `links.py`, `pages.py`"
    assert [word for word in quoted(text) if missing_file(word, page)] == [
        "no_such_file.py",
        "links.py",
    ]
    text = "`rlprompt.no`, `kernels.no`, `rlprompt.types.PrefixKV.keys`, `model.cpu_kernels`, `a.b`"
    assert missing_names(text) == ["kernels.no", "rlprompt.no"]


def test_what_is_past_may_be_named_with_its_commit() -> None:
    assert list(quoted("`scripts/gone.py` as of 54bbbdf, then `docs/log.md`")) == ["docs/log.md"]
