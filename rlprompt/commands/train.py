"""`rlprompt train`: one recipe into one run folder, and what came of it on the terminal."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlprompt.commands.results import show_results
from rlprompt.commands.run_output import RECIPE_FILE, check_output, claim_output, default_output
from rlprompt.commands.terminal import report_error, setup_logging
from rlprompt.recipe import load_recipe
from rlprompt.recipe_build import build_trainer
from rlprompt.training.interrupt import StopRequest
from rlprompt.training.update import NotFiniteError

_ENDINGS = ("finished", "early_stopping")


@dataclass(frozen=True)
class TrainOptions:
    """What the command line asks for beside the recipe."""

    output: Path | None = None
    """The run folder; `runs/<name>` when None."""
    resume: bool = False
    """Go on with the run in that folder."""
    auto_resume: bool = False
    """Go on with it if there is one."""
    stop_exit_code: int = 0
    """What to end with when a signal stopped the run before its end."""
    verbose: bool = False
    """Log more."""


def run(recipe_path: Path, overrides: Sequence[str], options: TrainOptions) -> int:
    """Train; returns the exit code.

    Nothing is written before recipe, data, rewards and model are known to be good.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        options: see there.

    Raises:
        InputError: something the recipe names is wrong, the folder holds another run, or there is
            nothing to resume.
    """
    console = Console()
    # A scheduler may ask while the model is still being loaded.
    with StopRequest(keyboard=False) as stop:
        setup_logging(console, logging.INFO, options.verbose)
        recipe = load_recipe(recipe_path, overrides)
        folder = default_output(recipe) if options.output is None else options.output
        resume = options.resume or (options.auto_resume and (folder / RECIPE_FILE).is_file())
        check_output(folder, recipe.plain(), resume)
        with console.status("loading data, rewards and model"):
            trainer = build_trainer(recipe, recipe_path.parent, folder, console)
        if stop.reason is not None:
            console.print(f"stopped by {stop.reason} before the first step")
            return options.stop_exit_code
        with claim_output(folder, recipe.plain(), recipe_path.parent, resume) as started:
            try:
                summary = trainer.run(resume=started)
            except NotFiniteError as error:
                step = trainer.state.progress.step + 1
                report_error(_stopped_at(error, step, folder / f"failed_step_{step}"))
                return 1
    show_results(folder, summary, console)
    if summary["stopped_because"].startswith("guard:"):
        alarm = next(each for each in summary["alarms"] if each["stop"])
        console.print(
            Text(f"stopped by guard '{alarm['guard']}' at step {alarm['step']}: {alarm['reason']}"),
            soft_wrap=True,
        )
    elif summary["stopped_because"] not in _ENDINGS:
        again = ["rlprompt", "train", str(recipe_path), *overrides, "--output", str(folder)]
        steps = f"{summary['steps']} of {recipe.training.steps} steps"
        console.print(
            Text(
                f"stopped by {summary['stopped_because']} after {steps}; go on with:\n"
                f"  {shlex.join([*again, '--resume'])}"
            ),
            soft_wrap=True,
        )
        return options.stop_exit_code
    return 0


def _stopped_at(error: NotFiniteError, step: int, data: Path) -> NotFiniteError:
    told = NotFiniteError(
        f"step {step}: {error}; its data is in '{data}', the state before it in the newest "
        "checkpoint; lower the learning rate in a new run"
    )
    return told.with_traceback(error.__traceback__)
