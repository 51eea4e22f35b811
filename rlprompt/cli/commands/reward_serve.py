"""`rlprompt reward serve`: put one reward behind HTTP until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.process_exit import left_behind
from rlprompt.recipe.yaml_file import apply_override
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import IsolationSettings, RewardSettings
from rlprompt.serving.connections import is_loopback
from rlprompt.serving.reward_server import RewardServer, ServeOptions
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole


@dataclass(frozen=True)
class Serving:
    """What the command line says of address and access."""

    host: str
    port: int
    token_env: str | None
    no_token: bool
    certificate: Path | None
    max_body_mb: float

    def options(self) -> ServeOptions:
        """The server's options.

        Raises:
            InputError: other machines could call without a token, or its variable is not set.
        """
        token = None
        if self.token_env is not None:
            if self.no_token:
                raise InputError("--no-token has no effect with --token-env; remove one of them")
            token = os.environ.get(self.token_env, "").strip()
            if not token:
                raise InputError(f"the environment variable {self.token_env} is not set; set it")
        elif not self.no_token and not is_loopback(self.host):
            raise InputError(
                f"other machines could call a server on {self.host} without a token; set "
                f"--token-env, or --no-token on a network that you trust"
            )
        return ServeOptions(
            host=self.host,
            port=self.port,
            token=token,
            max_body_bytes=int(self.max_body_mb * 1_000_000),
            certificate=self.certificate,
        )


def serve(
    path: str,
    options: Sequence[str],
    access: Serving,
    *,
    timeout: float,
    isolate: bool,
    verbose: bool,
) -> None:
    """Serve a reward until Ctrl-C or SIGTERM.

    Args:
        path: the reward as in a recipe, relative to the working directory; `file.py` means
            `file.py:reward`.
        options: `key=value` strings, values parsed as YAML.
        access: the address and the token.
        timeout: seconds that one call of the reward may take.
        isolate: whether it runs in a worker process.
        verbose: whether every request is logged.

    Raises:
        InputError: the reward cannot be loaded, or the address cannot be used.
    """
    outlive_output()
    console = PlainConsole()
    setup_logging(console, logging.WARNING, verbose)
    tree: dict[str, Any] = {}
    for text in options:
        apply_override(tree, text)
    settings = RewardSettings(
        path=f"{path}:reward" if path.endswith(".py") else path,
        timeout=timeout,
        options=tree,
        isolation=IsolationSettings() if isolate else None,
    )
    server_options = access.options()
    runner = build_rewards([settings], Path.cwd())
    try:
        with RewardServer(runner, server_options) as server:
            _until_signal(server, console)
    finally:
        runner.close()


def _until_signal(server: RewardServer, console: Console) -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    console.print(Text(f"serving {server.reward_name} at {server.url}"), soft_wrap=True)
    stop.wait()
    server.shutdown()
    thread.join()
    left_behind()  # a request may still be in the reward
