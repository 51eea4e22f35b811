"""Every command that prints text of others prints it as it is, and nothing that acts."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from tests.cli.runs import Shown, rlprompt, write_recipe

ROOT = Path(__file__).parents[2]
WORD = "x[/y]"
HOSTILE = f"{WORD} [bold] :smile: [link=file:///etc]z[/link] \x1b]0;owned\x07\u202e\x9b2J"
READ = "[bold] :smile: [link=file:///etc]z[/link]"
"""What of it is to be read as it stands."""


def assert_harmless(shown: Shown, *words: str) -> None:
    text = shown.out + shown.err
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(text)
    assert "Traceback" not in text
    flat = "".join(text.split())
    for word in words:
        assert "".join(word.split()) in flat, text


@pytest.fixture
def recipe(model_dir: Path, tmp_path: Path) -> Path:
    return write_recipe(
        tmp_path / WORD.replace("/", "_"),
        model_dir,
        name=WORD,
        evaluation__handwritten=HOSTILE,
        data__rows=[f"{letter} {HOSTILE}" for letter in "abcdef"],
        training__steps=1,
    )


def test_train_eval_and_chat(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run [x]"
    shown = rlprompt("train", recipe, "--output", run)
    assert shown.code == 0, shown.err
    assert_harmless(shown, WORD, READ, f"{run}/report.html")
    shown = rlprompt("eval", run / "artifact", "-r", recipe)
    assert shown.code == 0, shown.err
    assert_harmless(shown, WORD)
    shown = rlprompt("chat", run / "artifact", "--compare", "-q", HOSTILE, "-q", "what is sun")
    assert shown.code == 0, shown.err
    assert_harmless(shown, READ)
    shown = rlprompt("train", recipe, "--output", run)
    assert shown.code == 2
    assert_harmless(shown, "run [x]")


def test_submit_and_status(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, says in (("sbatch", "17"), ("squeue", ""), ("sacct", "")):
        (tools / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    run = tmp_path / "run [x]"
    then = f"echo '{WORD} {READ}'"
    shown = rlprompt("submit", recipe, "--output", run, "--then", then)
    assert shown.code == 0, shown.err
    assert_harmless(shown, WORD, READ, f"{run}/slurm")
    logs = run / "slurm" / "job_17" / "attempt_0"
    logs.mkdir(parents=True)
    (logs / "exit_code").write_text("1\n")
    (logs / "rank_0.log").write_text(f"fine\nerror: {HOSTILE}\n")
    (logs.parent / "latest").symlink_to(logs)
    shown = rlprompt("submit", recipe, "--output", run, "--status")
    assert shown.code == 1, shown.err
    assert_harmless(shown, WORD, "[bold] :smile:")
    shown = rlprompt("submit", recipe, "--output", run, "--status", "--wait")
    assert_harmless(shown, WORD, "[bold] :smile:")
    shown = rlprompt("submit", recipe, "--output", tmp_path / "other", "--dry-run")
    assert (shown.code, "#SBATCH" in shown.out) == (0, True)


def test_plan(recipe: Path) -> None:
    shown = rlprompt("plan", recipe, "--gpus", 1)
    assert shown.code == 0, shown.err
    assert_harmless(shown, WORD)


def test_reward_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a[b].py").write_text(
        "def reward(completions, **kwargs):\n"
        f"    if 'a' in ''.join(map(str, completions)): raise ValueError({HOSTILE!r})\n"
        "    return [1.0] * len(completions)\n"
    )
    shown = rlprompt("reward", "check", "a[b].py")
    assert shown.code == 2
    assert_harmless(shown, "a[b].py", READ)


@pytest.mark.parametrize("command", [("doctor",), ("model", "list")])
def test_paths_of_the_machine(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / HOSTILE.replace("\x1b]0;", "\x1b")))
    assert_harmless(rlprompt(*command), WORD)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", HOSTILE),
        ("plan", HOSTILE),
        ("chat", HOSTILE, "-q", "x"),
        ("reward", "check", HOSTILE),
        ("reward", "serve", HOSTILE),
        ("reward", "train", HOSTILE),
        ("model", "fetch", HOSTILE),
        ("submit", HOSTILE),
        ("eval", HOSTILE, "-r", HOSTILE),
    ],
    ids=lambda arguments: "-".join(arguments[:2]) if arguments[1] != HOSTILE else arguments[0],
)
def test_errors(arguments: tuple[str, ...]) -> None:
    shown = rlprompt(*arguments)
    assert shown.code == 2
    assert_harmless(shown, WORD)


def test_there_is_one_kind_of_console() -> None:
    """What reads markup by default is made in one module, which turns it off."""
    for path in sorted((ROOT / "rlprompt").rglob("*.py")):
        if path.name == "console.py" and path.parent.name == "tracking":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("Console", "Panel", "Status", "Live"), path
                assert "from_markup" not in called and "Prompt.ask" not in called, path
