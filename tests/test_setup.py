"""scripts/setup.sh: which build of torch it installs, with a Python that only writes down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSION = next(
    line.removeprefix("torch==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("torch==")
)
PYTHON = """#!/bin/bash
case "$*" in
*version_info*) exit 0 ;;
*importlib.metadata*torch) cat "$FAKE/torch" 2>/dev/null ;;
*--dry-run*) for WORD in $OFFERED; do [[ " $* " != *"$WORD"* ]] || exit 0; done; exit 1 ;;
*"pip install"*)
  echo "$*" >>"$FAKE/installed"
  for WORD in "$@"; do [[ "$WORD" != torch==* ]] || echo "${WORD#torch==}" >"$FAKE/torch"; done ;;
esac
"""


def set_up(
    folder: Path, *arguments: str, torch: str = "", gpu: bool = False, offered: str = "+cpu"
) -> subprocess.CompletedProcess[str]:
    """Run the script in a copy of what it reads; a second call finds what the first one left."""
    commands = folder / "commands"
    commands.mkdir(parents=True, exist_ok=True)
    (commands / "nvidia-smi").write_text(f"#!/bin/sh\nexit {0 if gpu else 1}\n")
    (folder / "scripts").mkdir(exist_ok=True)
    for name in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    for path in (commands / "nvidia-smi", python):
        path.chmod(0o755)
    if torch:
        (folder / "torch").write_text(torch + "\n")
    return subprocess.run(
        ["bash", folder / "scripts" / "setup.sh", *arguments],
        env={
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RLPROMPT_VENV": "venv",
            "FAKE": str(folder),
            "OFFERED": offered,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


def torch_of(folder: Path) -> str:
    return (folder / "torch").read_text().strip()


def test_a_login_node_without_a_gpu_gets_the_build_that_is_named(tmp_path: Path) -> None:
    done = set_up(tmp_path, "--cuda", "cu130", "wandb", offered="+cu130")
    assert done.returncode == 0, done.stderr
    assert torch_of(tmp_path) == f"{VERSION}+cu130"
    assert "-e .[wandb]" in (tmp_path / "installed").read_text()
    again = set_up(tmp_path)
    assert "up to date" in again.stdout and torch_of(tmp_path) == f"{VERSION}+cu130"


def test_the_cpu_build_says_how_to_get_another_and_is_replaced(tmp_path: Path) -> None:
    done = set_up(tmp_path)
    assert torch_of(tmp_path) == f"{VERSION}+cpu"
    assert "run this again with --cuda" in done.stdout
    assert "up to date" in set_up(tmp_path).stdout
    replaced = set_up(tmp_path, "--cuda=cu126", offered="+cu126")
    assert replaced.returncode == 0, replaced.stderr
    assert "replacing it" in replaced.stdout and torch_of(tmp_path) == f"{VERSION}+cu126"
    assert "--force-reinstall --no-deps" in (tmp_path / "installed").read_text()


def test_a_gpu_that_is_found_replaces_a_cpu_build(tmp_path: Path) -> None:
    assert set_up(tmp_path, torch=f"{VERSION}+cpu", gpu=True).returncode == 0
    assert torch_of(tmp_path) == VERSION


def test_a_build_that_nobody_offers_leaves_what_is_there(tmp_path: Path) -> None:
    done = set_up(tmp_path, "--cuda", "cu999", torch=f"{VERSION}+cpu")
    assert done.returncode == 1
    assert f"no torch {VERSION}+cu999 is offered" in done.stderr and "--cuda pypi" in done.stderr
    assert torch_of(tmp_path) == f"{VERSION}+cpu"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cuda", "13"), "--cuda is '13'"),
        (("--cudda", "cpu"), "there is no option '--cudda'"),
        (("wandb", "deepspeed"), "give EXTRAS once"),
        (("--cuda",), "--cuda needs"),
    ],
    ids=["no-build", "no-option", "extras-twice", "no-value"],
)
def test_wrong_arguments_are_told(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = set_up(tmp_path, *arguments)
    assert done.returncode != 0 and told in done.stderr
    assert not (tmp_path / "installed").exists()
