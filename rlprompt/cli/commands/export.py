"""`rlprompt export`: a prompt in the format of another program."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rlprompt.api import export
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.tracking.console import PlainConsole


def run(
    artifact: Path,
    to: str,
    output: Path,
    *,
    model: str | None,
    force: bool,
    trust_remote_code: bool,
    prompt_classes: Sequence[str],
    verbose: bool = False,
) -> None:
    """Write the folder and say what is in it.

    Args:
        artifact: folder of an artifact, or of a run.
        to: name of the format.
        output: folder to make.
        model: base in place of the artifact's; None = its own.
        force: whether another base or template is accepted.
        trust_remote_code: whether Python code of the base may run.
        prompt_classes: paths of classes of the user's own.
        verbose: whether to log more.

    Raises:
        InputError: see `rlprompt.export`.
    """
    setup_logging(PlainConsole(stderr=True), logging.WARNING, verbose)
    folder = export(
        artifact,
        to,
        output,
        model=model,
        force=force,
        trust_remote_code=trust_remote_code,
        prompt_classes=tuple(prompt_classes),
    )
    names = sorted(path.name for path in folder.iterdir())
    sys.stdout.write(f"wrote '{folder}' ({to}): {', '.join(names)}\n")
    sys.stdout.write("README.md says how to load it, and where it equals rlprompt\n")
