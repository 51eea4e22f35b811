"""docs/errors.md: what a person is told for each of many wrong inputs, as the command line says it.

Every sentence comes from the real command in a folder where everything else is right.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.runs import rlprompt, write_recipe
from tests.docs.bad_inputs import CASES, Case, Project
from tests.docs.pages import DOCS, UPDATE, code
from tests.fixtures.tiny import save_tiny

HEAD = """# What you are told when an input is wrong

A wrong recipe, model, reward, dataset, artifact or run folder ends a command with exit code 2 and
one line on stderr, `error: ...`, that says what is wrong, where, and what to do. Each line below
was printed by the command: `tests/docs/test_bad_input.py` runs them all and writes this page. Paths
are shown as if the project lay in `/home/me/project`; hashes and completions are replaced. With
`RLPROMPT_DEBUG=1` a traceback comes before the line.
"""
HOME = "/home/me/project"
FINGERPRINT = re.compile(r"\b[0-9a-f]{12}\b")
COMPLETION = re.compile(r"with completion '.*?'(?=[;)])")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run."""
    folder = tmp_path_factory.mktemp("template") / "project"
    save_tiny(folder / "model")
    recipe = write_recipe(folder, Path("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shown = rlprompt("train", recipe.name, "--output", "run")
    assert shown.code == 0, shown.err
    return folder


def sentence_of(case: Case, template: Path, folder: Path) -> str:
    """The line on stderr for a case, with paths and hashes that are the same everywhere."""
    project = folder / "project"
    shutil.copytree(template, project)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.delenv("RLPROMPT_DEBUG", raising=False)
        shown = rlprompt(*case.arguments(Project(project)))
    assert shown.code == 2, shown
    assert shown.err.startswith("error: ")
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1
    assert "Traceback" not in shown.err + shown.out
    text = shown.err.removeprefix("error: ").removesuffix("\n")
    for path in {str(project), str(project.resolve()), str(template), str(template.resolve())}:
        text = text.replace(path, HOME)
    hashes = list(dict.fromkeys(FINGERPRINT.findall(text)))
    for known, letter in zip(hashes, "abc", strict=False):
        text = text.replace(known, letter * 12)
    return COMPLETION.sub("with completion '(what the model wrote)'", text)


def row(title: str, sentence: str) -> str:
    return f"| {title} | {code(sentence)} |"


def page(sentences: dict[tuple[str, str], str]) -> str:
    parts = [HEAD]
    for section in dict.fromkeys(case.section for case in CASES):
        parts.append(f"\n## {section}\n\n| wrong | error |\n|---|---|")
        parts += [row(t, text) for (s, t), text in sentences.items() if s == section]
    return "\n".join(parts) + "\n"


def test_the_page_has_a_row_for_every_case_and_no_other(template: Path, tmp_path: Path) -> None:
    if UPDATE:
        sentences = {
            (case.section, case.title): sentence_of(case, template, tmp_path / str(number))
            for number, case in enumerate(CASES)
        }
        (DOCS / "errors.md").write_text(page(sentences), encoding="utf-8")
    shown = (DOCS / "errors.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!wrong \||---)(.+?) \| ", shown, re.MULTILINE)
    assert rows == [case.title for case in CASES]
    assert shown.startswith(HEAD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.section}: {case.title}")
def test_a_wrong_input_gets_the_sentence_on_the_page(
    case: Case, template: Path, tmp_path: Path
) -> None:
    lines = (DOCS / "errors.md").read_text(encoding="utf-8").splitlines()
    expected = row(case.title, sentence_of(case, template, tmp_path))
    assert expected in lines
