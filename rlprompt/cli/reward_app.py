"""The command line of `rlprompt reward`: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

CONTEXT = {"help_option_names": ["-h", "--help"]}
VERBOSE = typer.Option(False, "--verbose", "-v", help="Show more of what happens.")

reward_app = typer.Typer(
    help="Try rewards out.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@reward_app.command("check")
def reward_check(
    path: str = typer.Argument(
        ..., metavar="PATH", help="As in a recipe: my_reward.py:reward, builtin:NAME, ..."
    ),
    option: list[str] = typer.Option(
        None, "--option", metavar="KEY=VALUE", help="An option of the reward; may be given again."
    ),
    column: list[str] = typer.Option(
        None, "--column", metavar="KEY=VALUE", help="A dataset column that it reads."
    ),
    pairs: Path | None = typer.Option(
        None, "--pairs", metavar="FILE", help="JSONL with query, good and bad in each line."
    ),
    timeout: float = typer.Option(
        60.0, "--timeout", min=0.001, metavar="SECONDS", help="For one call."
    ),
) -> None:
    """Run a reward on its own examples and on adversarial ones, as training would call it.

    Exit code 1 when a check fails.
    """
    from rlprompt.cli.commands.reward import check

    raise typer.Exit(check(path, option or [], column or [], pairs, timeout))


@reward_app.command("train")
def reward_train(
    recipe: Path = typer.Argument(..., metavar="RECIPE", help="A YAML file; see docs/rewards.md."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes to the recipe, such as learning.epochs=1."
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="DIR", help="An empty folder; by default runs/<name>."
    ),
    verbose: bool = VERBOSE,
) -> None:
    """Train a preference model on judged answers, and test it on queries that it never saw."""
    from rlprompt.cli.commands.reward_train import train

    train(recipe, overrides or [], output, verbose=verbose)


@reward_app.command("serve")
def reward_serve(
    path: str = typer.Argument(
        ..., metavar="PATH", help="As in a recipe: my_reward.py:reward, builtin:NAME, ..."
    ),
    option: list[str] = typer.Option(
        None, "--option", metavar="KEY=VALUE", help="An option of the reward; may be given again."
    ),
    host: str = typer.Option("127.0.0.1", "--host", help="0.0.0.0 = every address."),
    port: int = typer.Option(8770, "--port", min=0, max=65535, help="0 = any free one."),
    token_env: str | None = typer.Option(
        None, "--token-env", metavar="VARIABLE", help="Variable with the token clients must send."
    ),
    no_token: bool = typer.Option(
        False, "--no-token", help="Let other machines in without a token."
    ),
    certificate: Path | None = typer.Option(
        None, "--certificate", metavar="FILE", help="PEM with certificate and key, for https."
    ),
    max_body_mb: float = typer.Option(16.0, "--max-body-mb", min=0.001, help="Longest request."),
    timeout: float = typer.Option(
        60.0, "--timeout", min=0.001, metavar="SECONDS", help="For one call of the reward."
    ),
    isolate: bool = typer.Option(False, "--isolate", help="Run it in a worker process."),
    verbose: bool = VERBOSE,
) -> None:
    """Serve a reward over HTTP, for runs that name it as `builtin:http` with its url."""
    from rlprompt.cli.commands.reward_serve import Serving, serve

    access = Serving(host, port, token_env, no_token, certificate, max_body_mb)
    serve(path, option or [], access, timeout=timeout, isolate=isolate, verbose=verbose)
