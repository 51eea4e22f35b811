"""The site of docs/: it builds without a warning, and every page and public name is in it."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import rlprompt
from scripts.docs_links import anchor, on_page_markdown
from tests.docs.pages import DOCS
from tests.docs.test_links import anchors

ROOT = DOCS.parent
SETTINGS: dict[str, Any] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
HAS_MKDOCS = all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings"))


def pages_of(entries: list[Any]) -> Iterator[str]:
    """Paths that a navigation names."""
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages_of(value)


def test_every_page_has_one_place_in_the_navigation() -> None:
    named = list(pages_of(SETTINGS["nav"]))
    assert sorted(named) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name_and_no_other() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    found = [getattr(import_module(path.rpartition(".")[0]), path.split(".")[-1]) for path in named]
    public = [getattr(rlprompt, name) for name in rlprompt.__all__ if name != "__version__"]
    assert found == public


def test_headings_have_the_anchors_of_github() -> None:
    titles = {"TRL + PEFT, `x_y`": "trl--peft-x_y", "What is so?": "what-is-so"}
    for title, wanted in titles.items():
        assert anchor(title.replace("`", ""), "-") == wanted
    assert "in-short" in anchors(DOCS / "performance.md") and anchor("In short", "-") == "in-short"


class File:
    src_uri = "page.md"


class Page:
    file = File()


def test_links_out_of_the_docs_go_to_the_repository() -> None:
    config = {"docs_dir": str(DOCS), "repo_url": "https://example.org/me/repo/"}

    def moved(text: str) -> str:
        return on_page_markdown(text, page=Page(), config=config)

    assert moved("[a](../README.md#x)") == "[a](https://example.org/me/repo/blob/main/README.md#x)"
    assert moved("[a](../examples)") == "[a](https://example.org/me/repo/tree/main/examples)"
    for same in ("[a](../no_such.md)", "[a](data.md)", "```\n[a](../README.md)\n```\n"):
        assert moved(same) == same


def built(folder: Path, *, settings: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", str(settings), "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


class Resources(HTMLParser):
    """What a page loads by itself, from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.loaded.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(given.get("href") or "")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_MKDOCS, reason="the extra `docs` is not installed")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    done = built(tmp_path / "site", settings=ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "Learn a system prompt; returns the finished run." in reference
    for path in (tmp_path / "site").rglob("*.html"):
        parser = Resources()
        parser.feed(path.read_text(encoding="utf-8"))
        outside = [each for each in parser.loaded if re.match(r"(\w+:)?//", each)]
        assert outside == [], path.name


@pytest.mark.skipif(not HAS_MKDOCS, reason="the extra `docs` is not installed")
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# Title\n\n[gone](gone.md)\n", encoding="utf-8")
    small = {
        "site_name": "small",
        "docs_dir": str(docs),
        "validation": SETTINGS["validation"],
        "nav": [{"Home": "index.md"}],
    }
    settings = tmp_path / "mkdocs.yml"
    settings.write_text(yaml.safe_dump(small), encoding="utf-8")
    done = built(tmp_path / "site", settings=settings)
    assert done.returncode != 0 and "gone.md" in done.stdout + done.stderr
