"""LoRA adapters on vLLM servers: each version is a folder and a name of its own.

A name is made of the content, so that a server's prefix cache, which knows adapters by name, never
serves what an earlier version has computed. A version is loaded before the one before it is
unloaded and removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from rlprompt.endpoints.json_client import Call, JsonClient, StatusError
from rlprompt.errors import InputError, describe_error
from rlprompt.prompts.adapter import AdapterPrompt

_FILES = "adapter/"
"""Where PEFT's files lie in an artifact."""


class ServedAdapters:
    """The adapter that the servers have loaded for this run."""

    def __init__(self, client: JsonClient, folder: str | None) -> None:
        """Nothing is written or loaded yet.

        Args:
            client: client of the servers.
            folder: folder that they see under the same path; None = a temporary one.
        """
        self._client = client
        self._folder = None if folder is None else Path(folder).absolute()
        self._loaded: str | None = None

    def objection(self) -> str:
        """Why no adapter can be loaded, as the middle of a sentence; empty = one can be."""
        if self._folder is None and not self._client.is_local:
            return (
                "can load adapters only from a folder that the servers see, and some of "
                "engine.urls are on other machines; set engine.adapter_folder to a shared folder"
            )
        return ""

    def name_of(self, prompt: AdapterPrompt, base: str) -> str:
        """The name under which the servers have an adapter, which they load if they have not.

        Args:
            prompt: prompt with the adapter.
            base: id of the base.

        Raises:
            InputError: its folder cannot be written, or a server does not load it.
        """
        files = prompt.artifact_files(base)
        own = {
            name.removeprefix(_FILES): content
            for name, content in sorted(files.items())
            if name.startswith(_FILES)
        }
        digest = hashlib.sha256()
        for name, content in own.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        name = f"rlprompt-{digest.hexdigest()[:24]}"
        if name == self._loaded:
            return name
        path = self._write(name, own)
        self._load(name, path)
        before, self._loaded = self._loaded, name
        if before is not None:
            self._unload(before)
        return name

    def forget(self) -> None:
        """Load at the next call, whatever was loaded: a server has been started anew."""
        self._loaded = None

    def _write(self, name: str, files: dict[str, bytes]) -> Path:
        folder = self._within()
        path = folder / name
        if path.is_dir():  # another rank has written it
            return path
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder))
            part.chmod(0o755)  # the server may be another user's
            for each, content in files.items():
                (part / each).write_bytes(content)
            try:
                os.rename(part, path)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                if not path.is_dir():
                    raise
        except OSError as error:
            raise InputError(
                f"engine.adapter_folder: {folder} cannot be written ({describe_error(error)}); "
                "name a folder that can be, and that the servers see"
            ) from error
        return path

    def _within(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="rlprompt-adapters-"))
            self._folder.chmod(0o755)
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    def _load(self, name: str, path: Path) -> None:
        for server, shown in enumerate(self._client.shown):
            body = {"lora_name": name, "lora_path": str(path)}
            call = Call("/load_lora_adapter", body, server, is_text=True)
            try:
                self._client.ask([call], retries=0)
            except StatusError as error:
                if "already" in error.said and name in error.said:
                    continue
                if error.status in (404, 405) and "adapter" not in error.said.lower():
                    raise InputError(
                        f"engine: {shown} loads no adapters; start it with --enable-lora and the "
                        "environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
                    ) from error
                raise InputError(
                    f"engine: {error}; see that it was started with --enable-lora and "
                    "--max-lora-rank of at least prompt.method.rank, and that it can read "
                    f"{path} (engine.adapter_folder)"
                ) from error
            except InputError as error:
                raise InputError(
                    f"{error}; it may need --max-lora-rank of at least prompt.method.rank"
                ) from error

    def _unload(self, name: str) -> None:
        for server in range(len(self._client.shown)):
            call = Call("/unload_lora_adapter", {"lora_name": name}, server, is_text=True)
            with suppress(StatusError, InputError):  # another rank has done so, or it is down
                self._client.ask([call], retries=0)
        shutil.rmtree(self._within() / name, ignore_errors=True)
