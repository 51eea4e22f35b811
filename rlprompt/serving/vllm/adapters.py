"""LoRA adapters that a vLLM server holds for us, each under a name that is used once.

vLLM keeps keys and values by the name of an adapter: the same name with other content would meet
old ones (vLLM issue 42125). So content never changes under a name: what is loaded again, after a
swap or after vLLM was started anew, has a new one.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rlprompt.serving.vllm.client import VllmClient, VllmError

logger = logging.getLogger(__name__)

_UNLOAD_SECONDS = 5.0


class LoadedAdapter:
    """One adapter, there as long as anybody holds this object."""

    def __init__(self, names: dict[str, str], key: str) -> None:
        """Stand for an adapter.

        Args:
            names: names at vLLM, by key.
            key: its key.
        """
        self._names, self.key = names, key

    @property
    def name(self) -> str:
        """What vLLM calls it now."""
        return self._names[self.key]


class AdapterLoader:
    """Loads adapters, again where vLLM has lost them, and lets them go; used by one event loop."""

    def __init__(self, client: VllmClient, loop: asyncio.AbstractEventLoop) -> None:
        """Hold none.

        Args:
            client: the server.
            loop: the event loop of the client.
        """
        self._client, self._loop = client, loop
        self._root: Path | None = None
        self._names: dict[str, str] = {}
        self._folders: dict[str, Path] = {}
        self._again = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, files: Mapping[str, bytes]) -> LoadedAdapter:
        """Load an adapter.

        Args:
            files: PEFT's two files, by name.

        Raises:
            VllmError: vLLM refuses it.
            OSError: its files cannot be written.
        """
        key = uuid.uuid4().hex
        folder = self._written(key, files)
        try:
            await self._load(key, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        made = LoadedAdapter(self._names, key)
        weakref.finalize(made, self._forget_soon, key).atexit = False
        return made

    async def load_again(self, adapter: LoadedAdapter, lost: str) -> None:
        """Load an adapter under a new name, unless somebody has done that already.

        Args:
            adapter: the adapter.
            lost: the name under which vLLM does not know it any more.

        Raises:
            VllmError: vLLM refuses it.
        """
        async with self._again:
            if adapter.name == lost:
                await self._load(adapter.key, self._folders[adapter.key])
                logger.warning("an adapter that vLLM has lost is loaded again")

    async def close(self) -> None:
        """Let all adapters go."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_UNLOAD_SECONDS):
                for key in list(self._names):
                    await self._forget(key)
        if self._root is not None:
            shutil.rmtree(self._root, ignore_errors=True)

    def _written(self, key: str, files: Mapping[str, bytes]) -> Path:
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="rlprompt-lora-"))
        folder = self._root / key
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return folder

    async def _load(self, key: str, folder: Path) -> None:
        name = f"rlprompt-{uuid.uuid4().hex}"
        await self._client.load_adapter(name, str(folder))
        self._names[key], self._folders[key] = name, folder

    def _forget_soon(self, key: str) -> None:
        """Let an adapter go that nobody holds; called by whichever thread collects garbage."""

        def begin() -> None:
            task = self._loop.create_task(self._forget(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        with suppress(RuntimeError):  # the loop has ended, and `close` has let all go
            self._loop.call_soon_threadsafe(begin)

    async def _forget(self, key: str) -> None:
        name, folder = self._names.pop(key, None), self._folders.pop(key, None)
        if name is not None:
            with suppress(VllmError):  # vLLM has gone, or has lost it
                await self._client.unload_adapter(name)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
