"""The command line of `rlprompt registry`: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import CONTEXT

registry_app = typer.Typer(
    help="Versions of learned prompts, and names that point to them.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)

_REGISTRY = typer.Option(
    Path("registry"),
    "--registry",
    envvar="RLPROMPT_REGISTRY",
    metavar="DIR",
    help="The registry's folder.",
)
_WHY = typer.Option("", "--why", metavar="TEXT", help="The reason; the history keeps it.")
_JSON = typer.Option(False, "--json", help="Print JSON.")
_REFERENCE = typer.Argument(..., metavar="NAME@ALIAS", help="Or NAME:NUMBER.")
_NAME = typer.Argument(..., metavar="NAME", help="Name of the prompt.")


@registry_app.command("add")
def add(
    artifact: Path = typer.Argument(
        ..., metavar="ARTIFACT", help="The artifact/ folder of a run, or the run."
    ),
    name: str = _NAME,
    message: str = typer.Option("", "--message", "-m", metavar="TEXT", help="Why it is added."),
    tag: list[str] = typer.Option(
        None, "--tag", metavar="TAG", help="A word to find it by; may be given again."
    ),
    registry: Path = _REGISTRY,
) -> None:
    """Take an artifact in as the next version of a name; equal content gets no second one."""
    from rlprompt.cli.commands import registry as commands

    commands.add(registry, artifact, name, message, tag or [])


@registry_app.command("list")
def list_(
    tag: str | None = typer.Option(None, "--tag", metavar="TAG", help="Only versions with it."),
    registry: Path = _REGISTRY,
    as_json: bool = _JSON,
) -> None:
    """All names with their versions and aliases."""
    from rlprompt.cli.commands import registry as commands

    commands.show_all(registry, tag, as_json)


@registry_app.command("show")
def show(reference: str = _REFERENCE, registry: Path = _REGISTRY, as_json: bool = _JSON) -> None:
    """What a version is, what was measured and certified of it, and where its files are."""
    from rlprompt.cli.commands import registry as commands

    commands.show(registry, reference, as_json)


@registry_app.command("diff")
def diff(
    one: str = _REFERENCE,
    other: str = typer.Argument(..., metavar="NAME@ALIAS", help="Or NAME:NUMBER."),
    registry: Path = _REGISTRY,
    as_json: bool = _JSON,
) -> None:
    """How the second version differs from the first: text, tensors, numbers, recipe."""
    from rlprompt.cli.commands import registry as commands

    commands.diff(registry, one, other, as_json)


@registry_app.command("promote")
def promote(
    name: str = _NAME,
    alias: str = typer.Argument(..., metavar="ALIAS", help="Such as prod or staging."),
    versions: list[str] = typer.Argument(
        None, metavar="NUMBER", help="The version; several as NUMBER=SHARE, such as 3=0.9 4=0.1."
    ),
    why: str = _WHY,
    force: bool = typer.Option(False, "--force", help="Overrule the protection; needs --why."),
    remove: bool = typer.Option(False, "--remove", help="Remove the alias."),
    registry: Path = _REGISTRY,
) -> None:
    """Let an alias point to a version, if its protection allows it."""
    from rlprompt.cli.commands import registry as commands

    commands.promote(registry, name, alias, versions or [], why, force=force, remove=remove)


@registry_app.command("protect")
def protect(
    name: str = _NAME,
    alias: str = typer.Argument(..., metavar="ALIAS", help="Such as prod."),
    verdict: bool = typer.Option(
        False, "--verdict", help="Demand a run that has shown it better than its start."
    ),
    certificate: float | None = typer.Option(
        None,
        "--certificate",
        min=0.0,
        max=1.0,
        metavar="ALPHA",
        help="Demand one for this or less.",
    ),
    reward: str | None = typer.Option(
        None, "--reward", metavar="NAME", help="What the certificate must be about."
    ),
    registry: Path = _REGISTRY,
) -> None:
    """Demand something of all versions that an alias will point to; with no option, nothing."""
    from rlprompt.cli.commands import registry as commands

    commands.protect(registry, name, alias, verdict, certificate, reward)


@registry_app.command("rollback")
def rollback(
    name: str = _NAME,
    alias: str = typer.Argument(..., metavar="ALIAS", help="Such as prod."),
    why: str = _WHY,
    registry: Path = _REGISTRY,
) -> None:
    """Let an alias point to what it pointed to before its last change."""
    from rlprompt.cli.commands import registry as commands

    commands.roll_back(registry, name, alias, why)


@registry_app.command("history")
def history(
    name: str = _NAME,
    alias: str | None = typer.Argument(None, metavar="[ALIAS]", help="Only this one's."),
    registry: Path = _REGISTRY,
    as_json: bool = _JSON,
) -> None:
    """Who changed which alias, when, from what, to what, and why."""
    from rlprompt.cli.commands import registry as commands

    commands.history(registry, name, alias, as_json)


@registry_app.command("push")
def push(
    reference: str = _REFERENCE,
    to: str = typer.Argument(
        ..., metavar="PLACE", help="A registry's folder, hf://OWNER/REPO or wandb://ENTITY/PROJECT."
    ),
    registry: Path = _REGISTRY,
) -> None:
    """Copy a version to another place."""
    from rlprompt.cli.commands import registry as commands

    commands.push(registry, reference, to)


@registry_app.command("pull")
def pull(
    source: str = typer.Argument(
        ...,
        metavar="PLACE",
        help="A registry's folder, hf://OWNER/REPO or wandb://ENTITY/PROJECT/NAME:ALIAS.",
    ),
    reference: str = typer.Argument(
        "", metavar="[NAME@ALIAS]", help="Which version of a registry; or NAME:NUMBER."
    ),
    name: str | None = typer.Option(
        None, "--name", metavar="NAME", help="Name here; by default that of the reference."
    ),
    registry: Path = _REGISTRY,
) -> None:
    """Take a version in from another place."""
    from rlprompt.cli.commands import registry as commands

    commands.pull(registry, source, reference, name)
