"""A hook of MkDocs: links of docs/ are written for GitHub, and hold on the site too.

Headings get the anchors that they have on GitHub. A link to a file outside of docs/, on GitHub a
relative path, goes to the file's page there; one whose file is missing stays as it is, so that
MkDocs warns of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^ *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def anchor(title: str, separator: str) -> str:
    """The anchor that GitHub gives to a heading.

    Args:
        title: text of the heading, without marks.
        separator: what stands for a space.
    """
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", separator)


def on_config(config: Any) -> Any:
    """Have the headings' anchors made as GitHub makes them.

    Args:
        config: MkDocs' settings.
    """
    config["mdx_configs"].setdefault("toc", {})["slugify"] = anchor
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Replace the links of a page that leave the folder of the docs.

    Args:
        markdown: text of the page.
        page: MkDocs' page, whose source says where the links start from.
        config: MkDocs' settings, with `docs_dir` and `repo_url`.
    """
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent
    pieces = FENCE.split(markdown)
    for i in range(0, len(pieces), 2):  # fences are the odd ones
        pieces[i] = LINK.sub(lambda found: _moved(found, folder, docs, config), pieces[i])
    return "".join(pieces)


def _moved(found: re.Match[str], folder: Path, docs: Path, config: Any) -> str:
    target = Path(os.path.normpath(folder / found[2]))
    if target.is_relative_to(docs) or not target.exists():
        return found[0]
    kind = "tree" if target.is_dir() else "blob"
    path = target.relative_to(docs.parent).as_posix()
    return f"{found[1]}{config['repo_url'].rstrip('/')}/{kind}/main/{path}{found[3] or ''})"
