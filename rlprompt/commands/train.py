"""`rlprompt train`: one recipe into one run folder, and what came of it on the terminal."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlprompt.commands.results import show_results
from rlprompt.commands.run_output import check_output, claim_output
from rlprompt.commands.terminal import report_error, setup_logging
from rlprompt.errors import InputError
from rlprompt.recipe import Recipe, load_recipe
from rlprompt.recipe_build import build_run
from rlprompt.training.loop import Trainer
from rlprompt.training.population import Population
from rlprompt.training.update import NotFiniteError

_ENDINGS = ("finished", "early_stopping")


def run(
    recipe_path: Path,
    overrides: Sequence[str],
    output: Path | None,
    *,
    resume: bool = False,
    verbose: bool = False,
) -> int:
    """Train; returns the exit code.

    Nothing is written before recipe, data, rewards and model are known to be good.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        output: the run folder; `runs/<name>` when None.
        resume: go on with the run in that folder.
        verbose: log more.

    Raises:
        InputError: something the recipe names is wrong, the folder holds another run, or there is
            nothing to resume.
    """
    console = Console()
    setup_logging(console, logging.INFO, verbose)
    recipe = load_recipe(recipe_path, overrides)
    folder = _default_output(recipe) if output is None else output
    check_output(folder, recipe.plain(), resume)
    with console.status("loading data, rewards and model"):
        built = build_run(recipe, recipe_path.parent, folder, console)
    with claim_output(folder, recipe.plain(), recipe_path.parent, resume) as started:
        try:
            summary = built.run(resume=started)
        except NotFiniteError as error:
            report_error(_stopped_at(error, built))
            return 1
    show_results(folder, summary, console)
    if summary["stopped_because"] not in _ENDINGS:
        again = ["rlprompt", "train", str(recipe_path), *overrides, "--output", str(folder)]
        steps = f"{summary['steps']} of {recipe.training.steps} steps"
        console.print(
            Text(
                f"stopped by {summary['stopped_because']} after {steps}; go on with:\n"
                f"  {shlex.join([*again, '--resume'])}"
            ),
            soft_wrap=True,
        )
    return 0


def _stopped_at(error: NotFiniteError, run: Trainer | Population) -> NotFiniteError:
    if isinstance(run, Population):
        where = (
            f"{error}; their data is in 'failed_step_*' of each folder in '{run.output}/members'"
        )
    else:
        step = run.state.progress.step + 1
        where = (
            f"step {step}: {error}; its data is in '{run.output / f'failed_step_{step}'}', the "
            "state before it in the newest checkpoint"
        )
    told = NotFiniteError(f"{where}; lower the learning rate in a new run")
    return told.with_traceback(error.__traceback__)


def _default_output(recipe: Recipe) -> Path:
    if Path(recipe.name).name != recipe.name:
        raise InputError(
            f"the name {recipe.name!r} cannot be a folder under runs/; change it, or name the run "
            "folder with --output"
        )
    return Path("runs") / recipe.name
