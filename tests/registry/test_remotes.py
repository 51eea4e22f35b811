"""Versions to and from other places; the hub and W&B stand in for themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from rlprompt.errors import InputError
from rlprompt.registry.remotes import pull, push
from rlprompt.registry.store import Registry
from rlprompt.tracking import wandb_tracker
from tests.registry.test_store import artifact


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "mine")
    made.add(artifact(tmp_path / "a"), "brief", message="first", tags=["x"], by="ann")
    return made


def test_between_two_registries(registry: Registry, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    assert push(registry, "brief:1", str(theirs)) == "brief:1"
    (version,) = Registry(theirs).versions("brief")
    assert (version.message, version.tags, version.by) == ("first", ("x",), "ann")
    assert version.content == registry.version("brief", 1).content
    back = Registry(tmp_path / "third")
    assert pull(back, str(theirs), "other", reference="brief:1").content == version.content
    with pytest.raises(InputError, match="is a registry and has brief; say which version"):
        pull(back, str(theirs), "other")


def test_the_hub(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"

    class Api:
        def create_repo(self, repo: str, exist_ok: bool) -> None:
            assert repo == "me/prompts" and exist_ok

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **_: Any) -> Any:
            for name in allow_patterns:
                (hub / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder_path / name, hub / name)
            return SimpleNamespace(oid="abc")

    def download(repo: str, *, revision: str, local_dir: str, allow_patterns: list[str]) -> None:
        assert (repo, revision) == ("me/prompts", "abc")
        shutil.copytree(hub, local_dir, dirs_exist_ok=True)
        (Path(local_dir) / ".cache").mkdir()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert push(registry, "brief:1", "hf://me/prompts") == "hf://me/prompts@abc"
    pulled = pull(Registry(tmp_path / "other"), "hf://me/prompts@abc", "brief")
    assert pulled.content == registry.version("brief", 1).content


def test_wandb(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "wandb"

    class Artifact:
        version = "v3"

        def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
            assert (name, type, metadata["number"]) == ("brief", "prompt", 1)

        def add_dir(self, folder: str) -> None:
            shutil.copytree(folder, kept)

        def wait(self) -> None:
            pass

    class Run:
        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def log_artifact(self, artifact: Artifact) -> Artifact:
            return artifact

    class Api:
        def artifact(self, reference: str) -> Any:
            assert reference == "me/project/brief:v3"
            return SimpleNamespace(
                download=lambda root: shutil.copytree(kept, root, dirs_exist_ok=True)
            )

    fake = SimpleNamespace(init=lambda **_: Run(), Artifact=Artifact, Api=Api)
    monkeypatch.setattr(wandb_tracker, "optional_import", lambda *_: fake)
    place = push(registry, "brief:1", "wandb://me/project")
    assert place == "wandb://me/project/brief:v3"
    pulled = pull(Registry(tmp_path / "other"), place, "brief")
    assert pulled.content == registry.version("brief", 1).content


def test_places_that_are_none_or_refuse(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("hf://me", "hf://", "hf://a/b/c", "wandb://me", "wandb://a/"):
        with pytest.raises(InputError, match="is no place; write"):
            push(registry, "brief:1", place)
    with pytest.raises(InputError, match="names nothing in it"):
        pull(registry, "hf://me/prompts", "brief", reference="brief:1")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"refused \(no route to host\); check .* HF_TOKEN"):
        pull(registry, "hf://me/prompts", "brief")
    assert len(registry.versions("brief")) == 1
