"""`rlprompt serve` on the command line: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import VERBOSE

_PROMPTS = typer.Argument(
    None,
    metavar="NAME=ARTIFACT|NAME=REGISTRY@ALIAS",
    help="Prompts, each with the name that clients use; REGISTRY#PROMPT@ALIAS where the registry "
    "knows it under another name. Without any, the base alone is served.",
)
_MODEL = typer.Option(
    None, "--model", metavar="PATH", help="The base; by default that of the first artifact."
)
_HOST = typer.Option("127.0.0.1", "--host", help="0.0.0.0 = every address; needs --keys.")
_PORT = typer.Option(8000, "--port", min=0, max=65535, help="0 = any free one.")
_KEYS = typer.Option(
    None, "--keys", metavar="FILE", help="JSON with API keys, scopes and rates; docs/serving.md."
)
_CERTIFICATE = typer.Option(
    None, "--certificate", metavar="FILE", help="PEM with certificate and key, for https."
)
_ENGINE = typer.Option(
    "native", "--engine", metavar="NAME", help="What draws the answers: native, or vllm."
)
_VLLM_URL = typer.Option(
    None,
    "--vllm-url",
    metavar="URL",
    help="The vLLM server of --engine vllm, on this machine; its key is VLLM_API_KEY's.",
)
_VLLM_WAIT = typer.Option(
    None,
    "--vllm-wait",
    min=0,
    max=86400,
    metavar="SECONDS",
    help="How long to wait for it at the start; by default not at all.",
)
_DTYPE = typer.Option("auto", "--dtype", metavar="NAME", help="auto, float32, bfloat16 or float16.")
_REWARD = typer.Option(
    None, "--reward", metavar="PATH", help="Scores answers on request; may be given again."
)
_MONITOR = typer.Option(
    None, "--monitor", metavar="NAME", help="The --reward that watches the answers."
)
_MONITOR_LIMIT = typer.Option(
    None,
    "--monitor-limit",
    metavar="A",
    help="Rate of failures that is promised; by default the certificate's.",
)
_MONITOR_DELTA = typer.Option(
    0.05, "--monitor-delta", metavar="D", help="Probability of a false alarm, ever."
)
_MONITOR_SHARE = typer.Option(
    1.0, "--monitor-share", metavar="S", help="Share of the answers that are scored."
)
_FAILS_ABOVE = typer.Option(
    None, "--fails-above", metavar="X", help="A failure is a value above X."
)
_FAILS_BELOW = typer.Option(
    None, "--fails-below", metavar="X", help="A failure is a value below X."
)
_ROLLBACK = typer.Option(
    False, "--rollback", help="On an alarm, move the alias back, or take the prompt away."
)
_MAX_ROWS = typer.Option(64, "--max-rows", min=1, max=4096, help="Answers decoded at once.")
_MAX_POSITIONS = typer.Option(
    65536, "--max-positions", min=64, max=2**30, help="Positions of all of them together."
)
_MAX_WAITING = typer.Option(
    256, "--max-waiting", min=0, max=2**20, help="Requests that may wait; others get 429."
)
_MAX_TOKENS = typer.Option(1024, "--max-tokens", min=1, max=2**20, help="Longest answer.")
_MAX_BODY_MB = typer.Option(1.0, "--max-body-mb", min=0.001, max=1000, help="Longest request.")
_DEADLINE = typer.Option(
    300.0, "--deadline", min=0.001, max=1e6, metavar="SECONDS", help="For one request."
)
_DRAIN = typer.Option(
    30, "--drain", min=0, max=86400, metavar="SECONDS", help="For requests in progress at the end."
)
_FOLLOW = typer.Option(
    5.0, "--follow", min=0, max=1e6, metavar="SECONDS", help="Between looks at aliases; 0 = never."
)
_REGISTRY = typer.Option(
    None,
    "--registry",
    metavar="FOLDER",
    help="Let clients read the texts of a registry, also those of Langfuse and MLflow.",
)
_LOG_REQUESTS = typer.Option(
    None,
    "--log-requests",
    metavar="FILE",
    help="Add a line of JSON per request, without what was said; - = standard output.",
)
_FORCE = typer.Option(
    False, "--force", help="Serve artifacts although they were made on another base."
)
_TRUST = typer.Option(
    False, "--trust-remote-code", help="Let Python code that comes with the base run."
)
_PROMPT_CLASS = typer.Option(
    None, "--prompt-class", metavar="FILE:CLASS", help="As of `rlprompt chat`."
)


def serve(
    prompts: list[str] = _PROMPTS,
    model: str | None = _MODEL,
    host: str = _HOST,
    port: int = _PORT,
    keys: Path | None = _KEYS,
    certificate: Path | None = _CERTIFICATE,
    engine: str = _ENGINE,
    vllm_url: str | None = _VLLM_URL,
    vllm_wait: float | None = _VLLM_WAIT,
    dtype: str = _DTYPE,
    reward: list[str] = _REWARD,
    monitor: str | None = _MONITOR,
    monitor_limit: float | None = _MONITOR_LIMIT,
    monitor_delta: float = _MONITOR_DELTA,
    monitor_share: float = _MONITOR_SHARE,
    fails_above: float | None = _FAILS_ABOVE,
    fails_below: float | None = _FAILS_BELOW,
    rollback: bool = _ROLLBACK,
    max_rows: int = _MAX_ROWS,
    max_positions: int = _MAX_POSITIONS,
    max_waiting: int = _MAX_WAITING,
    max_tokens: int = _MAX_TOKENS,
    max_body_mb: float = _MAX_BODY_MB,
    deadline: float = _DEADLINE,
    drain: int = _DRAIN,
    follow: float = _FOLLOW,
    registry: Path | None = _REGISTRY,
    log_requests: str | None = _LOG_REQUESTS,
    force: bool = _FORCE,
    trust_remote_code: bool = _TRUST,
    prompt_class: list[str] = _PROMPT_CLASS,
    verbose: bool = VERBOSE,
) -> None:
    """Serve prompts on one base, in the form of OpenAI's API; swap them while requests run.

    SIGTERM and Ctrl-C end it after the requests in progress.
    """
    from rlprompt.cli.commands import serve as command

    options = command.ServeOptions(
        model=model,
        host=host,
        port=port,
        keys=keys,
        certificate=certificate,
        engine=engine,
        vllm_url=vllm_url,
        vllm_wait=vllm_wait,
        dtype=dtype,
        rewards=tuple(reward or ()),
        monitor=monitor,
        monitor_limit=monitor_limit,
        monitor_delta=monitor_delta,
        monitor_share=monitor_share,
        fails_above=fails_above,
        fails_below=fails_below,
        rollback=rollback,
        max_rows=max_rows,
        max_positions=max_positions,
        max_waiting=max_waiting,
        max_tokens=max_tokens,
        max_body_bytes=int(max_body_mb * 1_000_000),
        deadline=deadline,
        drain=drain,
        follow=follow,
        registry=registry,
        log_requests=log_requests,
        force=force,
        trust_remote_code=trust_remote_code,
        prompt_classes=tuple(prompt_class or ()),
    )
    command.run(prompts or [], options, verbose=verbose)
