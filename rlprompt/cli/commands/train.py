"""`rlprompt train` and `rlprompt resume`: a recipe into a run folder, and what came of it."""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rlprompt.cli.commands.results import show_results
from rlprompt.cli.commands.terminal import report_error, setup_logging
from rlprompt.distributed.ranks import RankLostError, Ranks, join_ranks
from rlprompt.errors import InputError
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.recipe.stored import check_folder, claim_folder, remembered
from rlprompt.runs.claim_folder import RECIPE_FILE, default_output, recipe_folder, require_run
from rlprompt.runs.guards import GuardWatch
from rlprompt.runs.interrupt import StopRequest
from rlprompt.runs.learner import NotFiniteError
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.runs.stop_reason import FAILED, StopReason
from rlprompt.runs.summary import Summary
from rlprompt.slurm.frozen import differing_version
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole
from rlprompt.user_code import absolute

logger = logging.getLogger(__name__)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


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


@dataclass(frozen=True)
class _Asked:
    """What is to be run, and where."""

    recipe: Recipe
    base_dir: Path
    """Folder that relative paths of the recipe are relative to."""
    folder: Path
    """The run folder."""
    resume: bool
    """Whether the run in it goes on."""
    overridden: Sequence[str]
    """Dotted keys that were set on the command line."""


def run(recipe_path: Path, overrides: Sequence[str], options: TrainOptions) -> int:
    """Train; returns the exit code.

    Nothing is written before recipe, data, rewards and model are known to be good. A run that goes
    on keeps what earlier commands set beside the recipe.

    Args:
        recipe_path: a YAML file.
        overrides: `key.path=value` strings.
        options: what the command line asks for beside the recipe.

    Returns:
        0 for a complete run, `stop_exit_code` for one that a signal stopped, 1 where loss or prompt
        was not finite (in a population: of any member) or another rank was lost.

    Raises:
        InputError: something the recipe names is wrong, the folder holds another run, or there is
            nothing to resume.
    """

    def asked() -> _Asked:
        recipe = load_recipe(recipe_path, overrides)
        folder = default_output(recipe.name) if options.output is None else options.output
        resume = options.resume or (options.auto_resume and (folder / RECIPE_FILE).is_file())
        if resume:
            recipe = load_recipe(recipe_path, overrides, remembered(folder))
        return _Asked(recipe, recipe_folder(recipe_path), folder, resume, _keys(overrides))

    return _run(asked, options)


def resume(folder: Path, overrides: Sequence[str], options: TrainOptions) -> int:
    """Go on with the run in a folder, as it was begun; returns the exit code.

    Args:
        folder: a run folder.
        overrides: `key.path=value` strings: what changes from here on.
        options: what the command line asks for; the output is `folder`.

    Returns:
        The exit code, as of `run`.

    Raises:
        InputError: the folder holds no run, or its recipe cannot change so.
    """
    folder = folder.parent if folder.name == RECIPE_FILE else folder

    def asked() -> _Asked:
        require_run(folder)
        stored = folder / RECIPE_FILE
        recipe = load_recipe(stored, overrides)
        return _Asked(recipe, recipe_folder(stored), folder, True, _keys(overrides))

    return _run(asked, options)


def _keys(overrides: Sequence[str]) -> list[str]:
    return [override.partition("=")[0].strip() for override in overrides]


def _run(asked: Callable[[], _Asked], options: TrainOptions) -> int:
    """Train what is asked for; a scheduler may ask to stop while it is still being loaded."""
    outlive_output()
    with StopRequest(keyboard=False) as stop:
        wanted = asked()
        try:
            with join_ranks(wanted.recipe.distributed) as ranks:
                return _train(wanted, options, ranks, stop)
        except RankLostError as error:
            report_error(error)
            return 1


def _train(asked: _Asked, options: TrainOptions, ranks: Ranks, stop: StopRequest) -> int:
    """Train among these ranks; every rank returns the same code.

    Args:
        asked: the run.
        options: what the command line asks for beside it.
        ranks: the processes that share the work.
        stop: a signal that came since the command began.
    """
    # Only the first rank has something to say; the others warn.
    console = PlainConsole() if ranks.is_first else PlainConsole(quiet=True)
    level = logging.INFO if ranks.is_first else logging.WARNING
    setup_logging(console if ranks.is_first else PlainConsole(stderr=True), level, options.verbose)
    recipe, base_dir, folder, resume = asked.recipe, asked.base_dir, asked.folder, asked.resume
    other = differing_version() if ranks.is_first else ""
    if other:
        logger.warning("%s", other)
    for line in ranks.first(lambda: check_folder(folder, recipe, base_dir, resume)):
        logger.info("%s", line)
    with console.status("loading data, rewards and model"):
        built = build_run(recipe, base_dir, folder, console, ranks)
    signal = ranks.agree(stop.reason)
    if signal is not None:
        console.print(f"stopped by {signal} before the first step")
        return options.stop_exit_code
    with ExitStack() as claimed:
        claim = partial(claim_folder, folder, recipe, base_dir, resume, asked.overridden)
        started = ranks.first(lambda: claimed.enter_context(claim()))
        try:
            summary = built.run(resume=started)
        except NotFiniteError as error:
            report_error(_stopped_at(error, built))
            return FAILED.exit_code()
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
    if ranks.is_first:
        own = [absolute(path, base_dir) for path in recipe.own_prompts]
        show_results(folder, summary, console, own)
        _show_ending(summary, recipe, folder, console)
    return _exit_code(summary, options.stop_exit_code)


def _exit_code(summary: Summary, when_signalled: int) -> int:
    """The worst of what the run and its members ended with."""
    reasons = [summary["stopped_because"]]
    reasons += [row["stopped_because"] for row in summary.get("members", {}).values()]
    codes = [
        reason.exit_code(when_signalled)
        for reason in map(StopReason.parse, reasons)
        if reason is not None
    ]
    return next((code for code in codes if code), 0)


def _show_ending(summary: Summary, recipe: Recipe, folder: Path, console: Console) -> None:
    """Say why a run ended before its last step, and how it could go on."""
    reason = StopReason.parse(summary["stopped_because"])
    steps, done = recipe.training.steps, summary["steps"]
    go_on = f"rlprompt resume {shlex.quote(str(folder))}"
    if reason is None:
        return
    if reason.kind == "guard":
        alarm = next(each for each in summary["alarms"] if each["stop"])
        place = GuardWatch(recipe.guards).place_of(alarm["guard"])
        text = (
            f"stopped by guard '{alarm['guard']}' at step {alarm['step']}: {alarm['reason']}\n"
            f"to go on all the same: {go_on} guards.{place}.action=warn"
        )
    elif reason.kind == "signal":
        text = f"stopped by {reason} after {done} of {steps} steps; go on with:\n  {go_on}"
    elif reason.kind == "early_stopping":
        text = (
            f"stopped after {done} of {steps} steps, as no evaluation was better any more\n"
            f"to go on all the same: {go_on} training.early_stopping=null"
        )
    elif reason.kind == "max_seconds":
        limit = 2.0 * (recipe.training.max_seconds or 0.0)
        text = (
            f"stopped after {done} of {steps} steps, as its time was over\n"
            f"to go on: {go_on} training.max_seconds={limit:g}"
        )
    elif reason.kind == "budget":
        text = (
            f"stopped after {done} of {steps} steps, as the budget for endpoints is spent; what "
            f"was paid for is kept\nto go on: {go_on} {_larger_budget(recipe)}"
        )
    else:
        return
    console.print(Text(text), soft_wrap=True)


def _larger_budget(recipe: Recipe) -> str:
    """Overrides that double what a run may spend."""
    budget = recipe.budget
    given = {} if budget is None else budget.model_dump(exclude_none=True)
    return " ".join(f"budget.{name}={2 * limit:.12g}" for name, limit in given.items())


def _stopped_at(error: NotFiniteError, run: Run | Population) -> NotFiniteError:
    if isinstance(run, Population):
        where = (
            f"{error}; their data is in 'failed_step_*' of each folder in '{run.folder}/members'"
        )
    else:
        step = run.state.progress.step + 1
        where = (
            f"step {step}: {error}; its data is in '{run.folder / f'failed_step_{step}'}', the "
            "state before it in the newest checkpoint"
        )
    told = NotFiniteError(f"{where}; lower the learning rate in a new run")
    return told.with_traceback(error.__traceback__)
