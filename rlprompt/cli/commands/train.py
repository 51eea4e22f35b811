"""`rlprompt train`: one recipe into one run folder, and what came of it on the terminal."""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Sequence
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
from rlprompt.recipe.schema import Recipe, load_recipe, with_new_settings
from rlprompt.runs.claim_folder import RECIPE_FILE, check_output, claim_output, default_output
from rlprompt.runs.interrupt import StopRequest
from rlprompt.runs.learner import NotFiniteError
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.runs.stop_reason import FAILED, StopReason
from rlprompt.runs.summary import Summary
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole
from rlprompt.user_code import absolute

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


def run(recipe_path: Path, overrides: Sequence[str], options: TrainOptions) -> int:
    """Train; returns the exit code.

    Nothing is written before recipe, data, rewards and model are known to be good.

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
    outlive_output()
    # A scheduler may ask to stop while the model is still being loaded.
    with StopRequest(keyboard=False) as stop:
        recipe = load_recipe(recipe_path, overrides)
        again = ["rlprompt", "train", str(recipe_path), *overrides]
        try:
            with join_ranks(recipe.distributed) as ranks:
                return _train(recipe, recipe_path.parent, options, ranks, stop, again)
        except RankLostError as error:
            report_error(error)
            return 1


def _train(
    recipe: Recipe,
    base_dir: Path,
    options: TrainOptions,
    ranks: Ranks,
    stop: StopRequest,
    again: Sequence[str],
) -> int:
    """Train among these ranks; every rank returns the same code.

    Args:
        recipe: the run.
        base_dir: the recipe's folder.
        options: what the command line asks for.
        ranks: the processes that share the work.
        stop: a signal that came since the command began.
        again: the command, for the sentence that says how to go on.
    """
    # Only the first rank has something to say; the others warn.
    console = PlainConsole() if ranks.is_first else PlainConsole(quiet=True)
    level = logging.INFO if ranks.is_first else logging.WARNING
    setup_logging(console if ranks.is_first else PlainConsole(stderr=True), level, options.verbose)
    folder = default_output(recipe.name) if options.output is None else options.output

    updated = partial(with_new_settings, kind=type(recipe))

    def check() -> bool:
        resume = options.resume or (options.auto_resume and (folder / RECIPE_FILE).is_file())
        check_output(folder, recipe.plain(), resume, updated)
        return resume

    resume = ranks.first(check)
    with console.status("loading data, rewards and model"):
        built = build_run(recipe, base_dir, folder, console, ranks)
    signal = ranks.agree(stop.reason)
    if signal is not None:
        console.print(f"stopped by {signal} before the first step")
        return options.stop_exit_code
    with ExitStack() as claimed:
        claim = partial(claim_output, folder, recipe.plain(), base_dir, resume, updated=updated)
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
        go_on = [*again, "--output", str(folder), "--resume"]
        _show_ending(summary, recipe.training.steps, go_on, console)
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


def _show_ending(summary: Summary, steps: int, go_on: Sequence[str], console: Console) -> None:
    """Say why a run ended before its last step."""
    reason = StopReason.parse(summary["stopped_because"])
    if reason is None:
        return
    if reason.kind == "guard":
        alarm = next(each for each in summary["alarms"] if each["stop"])
        text = f"stopped by guard '{alarm['guard']}' at step {alarm['step']}: {alarm['reason']}"
    elif reason.kind == "signal":
        text = (
            f"stopped by {reason} after {summary['steps']} of {steps} steps; go on with:\n"
            f"  {shlex.join(go_on)}"
        )
    else:
        return
    console.print(Text(text), soft_wrap=True)


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
