"""The wheel: what a `pip install` puts on a machine that has no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.metadata import Metadata
from packaging.version import Version

from rlprompt import __version__
from rlprompt.recipe.starter import STARTERS
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parent.parent
STARTER_FOLDER = "rlprompt/recipe/starters"
TIMEOUT = 240


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_files_of_every_target_travel_in_the_wheel() -> None:
    included = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = {path for each in STARTERS.values() for path in (each.recipe, each.data, each.reward)}
    assert all((ROOT / path).is_file() for path in wanted)
    assert included == {
        "slurm": "rlprompt/slurm/templates",
        **{path: f"{STARTER_FOLDER}/{path}" for path in sorted(wanted)},
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (path,) = builder.build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return zipfile.ZipFile(path)


def test_everything_that_the_package_reads_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "rlprompt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= names
    suffixes = {".py", ".cpp", ".h", ".jinja", ".typed", ".html", ".js", ".css"}
    assert {Path(name).suffix for name in sources} >= suffixes
    templates = {f"rlprompt/slurm/templates/{path.name}" for path in (ROOT / "slurm").iterdir()}
    assert templates <= names
    assert not [name for name in names if not name.startswith("rlprompt")]


def metadata_text(wheel: zipfile.ZipFile) -> bytes:
    (name,) = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
    return wheel.read(name)


def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_string(metadata_text(wheel).decode())


def test_a_package_index_would_take_the_metadata(wheel: zipfile.ZipFile) -> None:
    found = Metadata.from_email(metadata_text(wheel), validate=True)  # raises what is wrong
    assert found.name == "rlprompt" and found.version == Version(__version__)
    assert found.description_content_type == "text/markdown"
    assert found.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert found.summary and len(found.summary) <= 512 and "\n" not in found.summary


def test_the_sdist_holds_what_the_tests_read_and_gives_the_same_wheel(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    sdist = pytest.importorskip("hatchling.builders.sdist").SdistBuilder(str(ROOT))
    (path,) = sdist.build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = [each for each in tmp_path.iterdir() if each.is_dir()]
    for name in ("README.md", "LICENSE", "CITATION.cff", "docs/index.md", "tests/conftest.py"):
        assert (root / name).read_bytes() == (ROOT / name).read_bytes()
    assert not [each for each in root.rglob("*") if each.name in ("__pycache__", ".venv", ".git")]
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(root))
    (again,) = builder.build(directory=str(tmp_path / "dist"), versions=["standard"])
    with zipfile.ZipFile(again) as found:
        assert sorted(found.namelist()) == sorted(wheel.namelist())


def test_version_citation_and_changelog_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = next(line for line in changes.splitlines() if line.startswith("## "))
    assert newest.split()[1] == Version(__version__).base_version
    assert newest.endswith("(unreleased)") is Version(__version__).is_prerelease


def test_the_metadata_says_who_where_and_which_python(wheel: zipfile.ZipFile) -> None:
    found = metadata(wheel)
    urls = dict(line.split(", ", 1) for line in found.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Source", "Issues"} <= urls.keys()
    assert all(url.startswith("https://") for url in urls.values())
    assert found["Author"] and found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"


@pytest.mark.slow
def test_a_wheel_alone_writes_a_first_recipe_and_trains_it(
    wheel: zipfile.ZipFile, tmp_path: Path
) -> None:
    installed, model = tmp_path / "site", save_tiny(tmp_path / "model")
    wheel.extractall(installed)
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("-c", "import rlprompt; print(rlprompt.__file__)").strip()
    assert Path(where).is_relative_to(installed)
    run("-m", "rlprompt", "init", "mine", "--target", "safety")
    run(
        *("-m", "rlprompt", "train", "mine/recipe.yaml", f"model.path={model}"),
        *("model.device=cpu", "training.steps=2", "sampling.max_tokens=6"),
        *("prompt.init_text=be brief", "prompt.num_virtual_tokens=4"),
        *("evaluation.handwritten=be brief", "evaluation.max_queries=4", "--output", "run"),
    )
    assert (tmp_path / "run" / "artifact" / "prompt.json").is_file()
    assert run("-m", "rlprompt", "chat", "run/artifact", "--query", "what is rain").strip()


def dockerfile() -> list[str]:
    """The instructions, each on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_container_has_a_device_to_choose_and_ends_as_a_user() -> None:
    lines = dockerfile()
    assert "ARG DEVICE=cpu" in lines
    (torch,) = [line for line in lines if line.startswith("RUN case")]
    assert "cpu)" in torch and "cuda)" in torch and "exit 2" in torch
    user = next(i for i, line in enumerate(lines) if line.startswith("USER "))
    assert lines[user] != "USER root" and not any("RUN" in line for line in lines[user:])
    assert 'ENTRYPOINT ["rlprompt"]' in lines[user:]
    assert "EXPOSE 8000" in lines[user:]  # the port of `rlprompt serve`


def test_the_container_is_built_of_what_the_wheel_needs_and_nothing_else() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    kept = {line.removeprefix("!") for line in rules if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    settings = project()
    included = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    needed = {Path(path).parts[0] for path in included}
    needed |= {"pyproject.toml", settings["project"]["readme"], "rlprompt", "constraints.txt"}
    assert needed | set(settings["project"]["license-files"]) == kept
