"""`rlprompt serve`: prompts behind HTTP until a signal ends it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError, choices
from rlprompt.model.base import ModelSettings
from rlprompt.model.cpu.row_blocks import fix_rows
from rlprompt.policy import open_policy
from rlprompt.prompts.make import named_classes
from rlprompt.registry.catalog import Catalog
from rlprompt.rewards import build_rewards
from rlprompt.rewards.base import RewardSettings
from rlprompt.serving.access import Access, open_access
from rlprompt.serving.chat_requests import RequestLimits
from rlprompt.serving.http_server import Address, Limits
from rlprompt.serving.loaded import base_of_artifact
from rlprompt.serving.prompt_server import PromptServer, PromptServerOptions
from rlprompt.serving.request_log import RequestLog
from rlprompt.serving.scheduler import SchedulerLimits
from rlprompt.serving.sources import Source, parse_source
from rlprompt.serving.vllm.client import VllmSettings, vllm_settings
from rlprompt.serving.watch import Scorer, WatchSettings
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole

logger = logging.getLogger(__name__)

ENGINES = ("native", "vllm")
"""What can draw the answers."""


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; see `rlprompt.cli.serve_command`."""

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    certificate: Path | None = None
    engine: str = "native"
    vllm_url: str | None = None
    vllm_wait: float | None = None
    dtype: str = "auto"
    rewards: tuple[str, ...] = ()
    monitor: str | None = None
    monitor_limit: float | None = None
    monitor_delta: float = 0.05
    monitor_share: float = 1.0
    fails_above: float | None = None
    fails_below: float | None = None
    rollback: bool = False
    max_rows: int = 64
    max_positions: int = 65536
    max_waiting: int = 256
    max_tokens: int = 1024
    max_body_bytes: int = 1_000_000
    deadline: float = 300.0
    drain: int = 30
    follow: float = 5.0
    registry: Path | None = None
    log_requests: str | None = None
    force: bool = False
    trust_remote_code: bool = False
    prompt_classes: tuple[str, ...] = ()

    def vllm(self) -> VllmSettings | None:
        """The vLLM server that draws the answers.

        Raises:
            InputError: there is no such engine, its server is not named, or an option has no effect
                on it.
        """
        if self.engine not in ENGINES:
            raise InputError(f"--engine is '{self.engine}'; {choices(self.engine, ENGINES)}")
        given = {"--vllm-url": self.vllm_url, "--vllm-wait": self.vllm_wait}
        for name in (name for name, value in given.items() if value is not None):
            if self.engine != "vllm":
                raise InputError(f"{name} has no effect without --engine vllm; add that")
        if self.engine == "native":
            return None
        if self.vllm_url is None:
            raise InputError(
                "--engine vllm asks a vLLM server, and none is named; add --vllm-url "
                "http://127.0.0.1:PORT"
            )
        return vllm_settings(self.vllm_url, self.vllm_wait or 0.0)

    def watch(self) -> WatchSettings | None:
        """What is watched.

        Raises:
            InputError: an option has no effect without --monitor.
        """
        if self.monitor is not None:
            return WatchSettings(
                reward=self.monitor,
                limit=self.monitor_limit,
                delta=self.monitor_delta,
                share=self.monitor_share,
                fails_above=self.fails_above,
                fails_below=self.fails_below,
                roll_back=self.rollback,
            )
        given = {
            "--monitor-limit": self.monitor_limit is not None,
            "--monitor-delta": self.monitor_delta != 0.05,
            "--monitor-share": self.monitor_share != 1.0,
            "--fails-above": self.fails_above is not None,
            "--fails-below": self.fails_below is not None,
            "--rollback": self.rollback,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise InputError(
                f"{name} has no effect without --monitor; name the reward that watches"
            )
        return None


def run(prompts: Sequence[str], options: ServeOptions, *, verbose: bool) -> None:
    """Serve prompts until Ctrl-C or SIGTERM.

    Args:
        prompts: `NAME=ARTIFACT` or `NAME=REGISTRY@ALIAS`, each.
        options: how they are served.
        verbose: whether every request is logged.

    Raises:
        InputError: a prompt, the base, a reward or the keys cannot be loaded, or the address cannot
            be used.
    """
    outlive_output()
    console = PlainConsole()
    setup_logging(console, logging.WARNING, verbose)
    sources: dict[str, Source] = {}
    for text in prompts:
        name, source = parse_source(text)
        if name in sources:
            raise InputError(f"two prompts are named '{name}'; give each a name of its own")
        sources[name] = source
    vllm = options.vllm()
    watch = options.watch()
    if watch is not None and not options.rewards:
        raise InputError("--monitor has no effect without --reward; give the reward that watches")
    access = open_access(options.keys, options.host)  # before the minutes that a base may take
    settings = _base(sources, options)
    log = _request_log(options.log_requests)
    server_options = replace(_server_options(options, access, watch, log), vllm=vllm)
    scorer = _scorer(options.rewards)
    try:
        policy = open_policy(settings)
        if vllm is None and policy.device.type == "cpu" and not fix_rows(policy.base.model):
            logger.info("answers may differ in near ties with what is decoded beside them")
        with PromptServer(policy, sources, server_options, scorer) as server:
            _until_signal(server, console)
    finally:
        if scorer is not None:
            scorer.close()
        if log is not None:
            log.close()


def _server_options(
    options: ServeOptions, access: Access, watch: WatchSettings | None, log: RequestLog | None
) -> PromptServerOptions:
    limits = Limits(
        stop_seconds=max(1, options.drain), connections=2048, connections_per_address=1024
    )
    return PromptServerOptions(
        address=Address(options.host, options.port, options.certificate, limits),
        access=access,
        requests=RequestLimits(tokens=options.max_tokens),
        queue=SchedulerLimits(options.max_rows, options.max_positions, options.max_waiting),
        max_body_bytes=options.max_body_bytes,
        deadline_seconds=options.deadline,
        follow_seconds=options.follow,
        watch=watch,
        force=options.force,
        kinds=named_classes(options.prompt_classes),
        catalog=None if options.registry is None else Catalog(options.registry),
        log=log,
    )


def _base(sources: Mapping[str, Source], options: ServeOptions) -> ModelSettings:
    """What to load: the base that is named, or that of the first artifact."""
    if options.dtype not in (known := _dtypes()):
        raise InputError(f"--dtype is '{options.dtype}'; {choices(options.dtype, known)}")
    # The accelerator is vLLM's.
    changes: dict[str, Any] = {"device": "cpu"} if options.engine == "vllm" else {}
    if options.dtype != "auto":
        changes["dtype"] = options.dtype
    if not sources and options.model is None:
        raise InputError("nothing is to be served; name a prompt, or a base with --model")
    if not sources:
        changes |= {"path": options.model, "trust_remote_code": options.trust_remote_code}
        return ModelSettings(**changes)
    folder = next(iter(sources.values())).find()[0].folder
    info = read_artifact_info(folder)
    settings = base_of_artifact(info, folder, options.model, options.trust_remote_code)
    return settings.model_copy(update=changes)


def _dtypes() -> tuple[str, ...]:
    return get_args(ModelSettings.model_fields["dtype"].annotation)


def _scorer(paths: Sequence[str]) -> Scorer | None:
    if not paths:
        return None
    settings = [
        RewardSettings(path=f"{path}:reward" if path.endswith(".py") else path) for path in paths
    ]
    return Scorer(build_rewards(settings, Path.cwd()))


def _request_log(given: str | None) -> RequestLog | None:
    return None if given is None else RequestLog(None if given == "-" else Path(given))


def _until_signal(server: PromptServer, console: Console) -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    models = ", ".join(server.shelf.models())
    console.print(Text(f"serving {models} at {server.origin}/v1"), soft_wrap=True)
    stop.wait()
    console.print(Text("stopping: requests in progress are answered"), soft_wrap=True)
    server.shutdown()
    thread.join()
