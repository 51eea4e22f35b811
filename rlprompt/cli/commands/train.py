"""`rlprompt train`: one recipe into one run folder, and what came of it on the terminal."""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rlprompt.cli.commands.results import show_results
from rlprompt.cli.commands.terminal import report_error, setup_logging
from rlprompt.distributed.ranks import RankLostError, Ranks, join_ranks
from rlprompt.errors import InputError
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.runs.claim_folder import RECIPE_FILE, check_output, claim_output, default_output
from rlprompt.runs.interrupt import StopRequest
from rlprompt.runs.population import Population
from rlprompt.runs.run import Trainer
from rlprompt.training.update import NotFiniteError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_ENDINGS = ("finished", "early_stopping", "max_seconds")


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
        options: what the command line asks for beside the recipe.

    Raises:
        InputError: something the recipe names is wrong, the folder holds another run, or there is
            nothing to resume.
    """
    # A scheduler may ask to stop while the model is still being loaded.
    with StopRequest(keyboard=False) as stop:
        recipe = load_recipe(recipe_path, overrides)
        try:
            with join_ranks(recipe.distributed) as ranks:
                return _train(recipe, (recipe_path, overrides, options), ranks, stop)
        except RankLostError as error:
            report_error(error)
            return 1


def _train(
    recipe: Recipe,
    asked: tuple[Path, Sequence[str], TrainOptions],
    ranks: Ranks,
    stop: StopRequest,
) -> int:
    """Train among these ranks; every rank returns the same code."""
    recipe_path, overrides, options = asked
    # Only the first rank has something to say; the others warn.
    console = Console() if ranks.is_first else Console(quiet=True)
    level = logging.INFO if ranks.is_first else logging.WARNING
    setup_logging(console if ranks.is_first else Console(stderr=True), level, options.verbose)
    folder = default_output(recipe) if options.output is None else options.output

    def check() -> bool:
        resume = options.resume or (options.auto_resume and (folder / RECIPE_FILE).is_file())
        check_output(folder, recipe.plain(), resume)
        return resume

    resume = ranks.first(check)
    with console.status("loading data, rewards and model"):
        built = build_run(recipe, recipe_path.parent, folder, console, ranks)
    reason = ranks.agree(stop.reason)
    if reason is not None:
        console.print(f"stopped by {reason} before the first step")
        return options.stop_exit_code
    with ExitStack() as claimed:
        claim = partial(claim_output, folder, recipe.plain(), recipe_path.parent, resume)
        started = ranks.first(lambda: claimed.enter_context(claim()))
        try:
            summary = built.run(resume=started)
        except NotFiniteError as error:
            report_error(_stopped_at(error, built))
            return 1
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            report_error(
                InputError(
                    f"the run folder '{folder}' cannot be written any more ({error.strerror}); the "
                    "newest checkpoint is whole: make room and go on with --resume"
                )
            )
            return 1
    reason = summary["stopped_because"]
    again = ["rlprompt", "train", str(recipe_path), *overrides, "--output", str(folder)]
    if ranks.is_first:
        show_results(folder, summary, console)
        _show_ending(summary, recipe.training.steps, again, console)
    done = reason in _ENDINGS or reason.startswith("guard:")
    return 0 if done else options.stop_exit_code


def _show_ending(
    summary: Mapping[str, Any], steps: int, again: Sequence[str], console: Console
) -> None:
    """Say why a run ended before its last step."""
    reason = summary["stopped_because"]
    if reason.startswith("guard:"):
        alarm = next(each for each in summary["alarms"] if each["stop"])
        text = f"stopped by guard '{alarm['guard']}' at step {alarm['step']}: {alarm['reason']}"
    elif reason not in _ENDINGS:
        text = (
            f"stopped by {reason} after {summary['steps']} of {steps} steps; go on with:\n"
            f"  {shlex.join([*again, '--resume'])}"
        )
    else:
        return
    console.print(Text(text), soft_wrap=True)


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
