"""`rlprompt export` on the command line: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import VERBOSE


def export(
    artifact: Path = typer.Argument(
        ..., metavar="ARTIFACT", help="The folder of an artifact, or of a run."
    ),
    to: str = typer.Option(
        ...,
        "--to",
        metavar="FORMAT",
        help="peft, merged, vocabulary, vllm-embeds, kv or text; see docs/export.md.",
    ),
    output: Path = typer.Option(
        ..., "--output", "-o", metavar="DIR", help="The folder to make; its README.md says more."
    ),
    model: str | None = typer.Option(
        None, "--model", metavar="PATH", help="Base in place of the one that the artifact names."
    ),
    force: bool = typer.Option(
        False, "--force", help="Load the artifact although it was made on another base."
    ),
    trust_remote_code: bool = typer.Option(
        False, "--trust-remote-code", help="Let Python code that comes with the base run."
    ),
    prompt_class: list[str] = typer.Option(
        None, "--prompt-class", metavar="FILE:CLASS", help="As of `rlprompt chat`."
    ),
    verbose: bool = VERBOSE,
) -> None:
    """Write a prompt in the format of another program, with an example that loads it."""
    from rlprompt.cli.commands.export import run

    run(
        artifact,
        to,
        output,
        model=model,
        force=force,
        trust_remote_code=trust_remote_code,
        prompt_classes=prompt_class or (),
        verbose=verbose,
    )
