"""The command line of `rlprompt artifact`: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import CONTEXT

artifact_app = typer.Typer(
    help="Check, sign and migrate artifacts.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)

_ARTIFACT = typer.Argument(
    ..., metavar="ARTIFACT", help="The folder of an artifact, or of a run that has one."
)


@artifact_app.command("sign")
def sign(
    artifact: Path = _ARTIFACT,
    key: Path = typer.Option(
        ..., "--key", metavar="FILE", help="Ed25519 private key: ssh-keygen -t ed25519, or PEM."
    ),
) -> None:
    """Vouch for an artifact's files: writes signature.json beside them."""
    from rlprompt.cli.commands import artifact as commands

    commands.sign(artifact, key)


@artifact_app.command("verify")
def verify(
    artifact: Path = _ARTIFACT,
    key: Path | None = typer.Option(
        None, "--key", metavar="FILE", help="The public key that must have signed it."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check an artifact's files without loading a model, and with --key who signed them.

    Checked are description, tensors, certificate and signature; that it acts on its base is for
    `rlprompt chat` and `rlprompt eval` to find out.
    """
    from rlprompt.cli.commands import artifact as commands

    commands.verify(artifact, key, as_json=as_json)


@artifact_app.command("migrate")
def migrate(
    artifact: Path = _ARTIFACT,
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="DIR", help="Migrate a copy there; by default in its place."
    ),
) -> None:
    """Bring an artifact of an earlier version to the present one; its prompt stays, to the byte."""
    from rlprompt.cli.commands import artifact as commands

    commands.migrate(artifact, output)
