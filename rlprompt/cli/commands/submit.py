"""`rlprompt submit`: a recipe as a Slurm job, a sweep as an array, and what becomes of them."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.errors import InputError
from rlprompt.files import write_atomic
from rlprompt.reading import yaml_text
from rlprompt.recipe.division import require_work
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.recipe.secrets import secret_in_command
from rlprompt.recipe.stored import check_folder, remembered
from rlprompt.runs.claim_folder import RECIPE_FILE, default_output, recipe_folder
from rlprompt.slurm.frozen import Frozen, freeze
from rlprompt.slurm.jobs import Submitted, TaskStatus, read_jobs, task_statuses, write_jobs
from rlprompt.slurm.queue import queued_jobs, submit_script
from rlprompt.slurm.script import SERVER, TrainJob, command_script, train_script
from rlprompt.slurm.settings import ClusterSettings, load_cluster
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole, format_number

logger = logging.getLogger(__name__)

STOP_CODE = 85
"""What `rlprompt train` ends with when a signal stopped it; slurm/train.sbatch knows it too."""
_POLL_SECONDS = (0.5, 10.0)
"""First and longest pause between two looks at the queue."""


@dataclass(frozen=True)
class SubmitOptions:
    """What the command line asks for."""

    output: Path | None = None
    cluster_file: Path | None = None
    cluster: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ClusterSettings; None leaves one alone."""
    sweep: Sequence[str] = ()
    """`key=[a, b]`, each a dimension."""
    max_parallel: int | None = None
    then: Sequence[str] = ()
    """Shell lines that follow, with {output}, {artifact} and {recipe}."""
    after: Sequence[str] = ()
    """Jobs that must end well first."""
    server: str | None = None
    server_nodes: int = 1


def submit(
    recipe_path: Path,
    overrides: Sequence[str],
    options: SubmitOptions,
    *,
    dry_run: bool = False,
    wait: bool = False,
) -> int:
    """Check the recipe, write the scripts, and submit them; returns the exit code.

    Args:
        recipe_path: a YAML file; the job reads a copy.
        overrides: `key.path=value` strings.
        options: what the command line asks for beside the recipe.
        dry_run: whether the scripts are only printed.
        wait: whether to show what happens until the jobs end.

    Raises:
        InputError: recipe, overrides or options are wrong, or Slurm refuses.
    """
    console = PlainConsole()
    setup_logging(PlainConsole(stderr=True) if dry_run else console, logging.INFO)
    cluster = load_cluster(options.cluster_file, options.cluster)
    points = [[*overrides, *point] for point in _points(options.sweep)]
    name = load_recipe(recipe_path, points[0]).name
    folder = (default_output(name) if options.output is None else options.output).absolute()
    outputs = [folder / f"{i:03d}" if options.sweep else folder for i in range(len(points))]
    recipes = []
    for point, output in zip(points, outputs, strict=True):
        recipe = load_recipe(recipe_path, point, remembered(output))  # as the job will find it
        _check_resources(recipe, cluster)
        has_begun = (output / RECIPE_FILE).exists()
        for line in check_folder(output, recipe, recipe_folder(recipe_path), has_begun):
            console.print(line, soft_wrap=True)
        recipes.append(recipe)
    own = cluster.python == sys.executable and not cluster.container
    frozen = freeze(recipe_path, recipes, points, folder / "slurm", with_package=own)
    job = _train_job(frozen, recipes[0], points, outputs, cluster, options)
    scripts = [train_script(job)]
    for number, command in enumerate(options.then):
        line = _following(command, folder, outputs if options.sweep else [], frozen.recipe)
        name = f"{job.name}-then-{number + 1}"
        scripts.append(command_script(name, job.folder, line, cluster, frozen.code))
    _warn_of_secrets(options, cluster)
    if dry_run:
        for text in scripts:
            console.out(text, highlight=False, end="")
        return 0
    outlive_output()  # half of the jobs submitted would be worse
    frozen.write()
    jobs = _submit_all(job, scripts, points, recipes[0].training.steps, options, console)
    return _wait(job.folder, jobs, console) if wait else 0


def _check_resources(recipe: Recipe, cluster: ClusterSettings) -> None:
    """Refuse what the job would refuse after hours in the queue, or would not use."""
    require_work(recipe, cluster.num_ranks)
    if cluster.gpus_per_node and recipe.model.device == "cpu":
        raise InputError(
            f"gpus_per_node is {cluster.gpus_per_node}, but model.device of the recipe is cpu; "
            "write model.device=auto, or ask for no GPUs"
        )


def _following(command: str, folder: Path, runs: Sequence[Path], recipe: Path) -> str:
    """A command of --then as a shell line.

    Args:
        command: the line, with {output}, {artifact} and {recipe}.
        folder: the folder of the run, or of the sweep.
        runs: the runs of a sweep; a command that names {artifact} runs for each in turn.
        recipe: the recipe as submitted.
    """
    each = runs if runs and "{artifact}" in command else [folder]
    lines = []
    for output in each:
        line = command
        values = {"{output}": output, "{artifact}": output / "artifact", "{recipe}": recipe}
        for hole, value in values.items():
            line = line.replace(hole, shlex.quote(str(value)))
        lines.append(line)
    return lines[0] if len(lines) == 1 else " && ".join(f"{{ {line}; }}" for line in lines)


def _submit_all(
    job: TrainJob,
    scripts: Sequence[str],
    points: Sequence[Sequence[str]],
    steps: int,
    options: SubmitOptions,
    console: Console,
) -> list[Submitted]:
    """Hand the training job and what follows it to Slurm."""
    submitted = Submitted(
        id=_submit(job.folder / "train.sbatch", scripts[0], options.after),
        kind="train",
        outputs=[str(output) for output in job.outputs],
        overrides=points,
        steps=steps,
    )
    write_jobs(job.folder, [submitted])
    said = f"job {submitted.id}: {job.name}, scripts and logs in {job.folder}"
    console.print(said, soft_wrap=True)
    jobs, before = [submitted], submitted.id
    for number, text in enumerate(scripts[1:]):
        before = _submit(job.folder / f"then_{number + 1}.sbatch", text, [before])
        jobs.append(Submitted(id=before, kind=options.then[number]))
        write_jobs(job.folder, jobs[-1:])
        console.print(f"job {before}: {options.then[number]}", soft_wrap=True)
    return jobs


def status_folder(recipe: Path | None, overrides: Sequence[str], output: Path | None) -> Path:
    """The run folder whose jobs are asked for.

    Raises:
        InputError: neither recipe nor output is named, or the recipe is wrong.
    """
    if output is not None:
        return output
    if recipe is None:
        raise InputError("--status needs a recipe or --output, the run folder; name one")
    return default_output(load_recipe(recipe, overrides).name)


def show_status(output: Path, *, wait: bool = False) -> int:
    """Print how the jobs of a run folder fare; returns 0 if none has failed.

    Raises:
        InputError: nothing was submitted from there, or Slurm does not answer.
    """
    console = PlainConsole()
    folder = output.absolute() / "slurm"
    jobs = read_jobs(folder)
    if wait:
        return _wait(folder, jobs, console)
    statuses = task_statuses(folder, jobs, queued_jobs([job.id for job in jobs]))
    _show(statuses, console)
    return int(any(status.ended and not status.succeeded for status in statuses))


def _train_job(
    frozen: Frozen,
    recipe: Recipe,
    points: Sequence[Sequence[str]],
    outputs: Sequence[Path],
    cluster: ClusterSettings,
    options: SubmitOptions,
) -> TrainJob:
    uses_server = any(SERVER in word for point in points for word in point)
    if uses_server and options.server is None:
        raise InputError(f"an override names {SERVER} but there is none; give --server")
    if options.max_parallel is not None and len(points) == 1:
        raise InputError("--max-parallel has no effect without --sweep; remove it")
    python = [cluster.python, "-P"] if frozen.code.package else [cluster.python]
    command = [*python, "-m", "rlprompt", "train", str(frozen.recipe)]
    ends = ["--auto-resume", "--stop-exit-code", str(STOP_CODE)]
    folder = outputs[0].parent if options.sweep else outputs[0]
    return TrainJob(
        name=recipe.name,
        folder=folder / "slurm",
        commands=[
            [*command, *point, "--output", str(output), *ends]
            for point, output in zip(points, outputs, strict=True)
        ],
        outputs=outputs,
        cluster=cluster,
        max_parallel=options.max_parallel,
        server=options.server,
        server_nodes=options.server_nodes if options.server else 0,
        frozen=frozen.code,
    )


def _warn_of_secrets(options: SubmitOptions, cluster: ClusterSettings) -> None:
    """Say where a command holds a secret: everybody on its node sees the words of a process."""
    lines = [("--server", options.server or ""), *(("--then", line) for line in options.then)]
    for where, line in [*lines, *(("setup of the cluster", line) for line in cluster.setup)]:
        name = secret_in_command(line)
        if name is not None:
            logger.warning(
                "the value of %s in %s looks like a secret, and others on its node can read it; "
                'write "$VARIABLE" there and export the variable before submitting',
                name,
                where,
            )


def _points(sweep: Sequence[str]) -> Iterator[list[str]]:
    """Every combination of the values of a sweep, as overrides; one empty point without a sweep."""
    axes = []
    for text in sweep:
        key, equals, values = text.partition("=")
        try:
            parsed = yaml_text.load(values) if equals else None
        except yaml.YAMLError:
            parsed = None
        if not isinstance(parsed, list) or not parsed:
            raise InputError(f"--sweep '{text}' is not of the form key=[value, value]; write one")
        axes.append([f"{key.strip()}={_yaml(value)}" for value in parsed])
    return (list(point) for point in itertools.product(*axes))


def _yaml(value: Any) -> str:
    """A value on one line of YAML; text that looks like a number is quoted."""
    text = yaml_text.dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _submit(path: Path, text: str, after: Sequence[str]) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text, private=True)  # it may hold what a server is started with
    except OSError as error:
        raise InputError(
            f"'{path.parent}' cannot be written ({error.strerror}); name another with --output"
        ) from error
    return submit_script(path, after)


def _wait(folder: Path, jobs: Sequence[Submitted], console: Console) -> int:
    """Say what changes until every job has ended; returns 0 if all ended well."""
    shown: dict[str, str] = {}
    pause, longest = _POLL_SECONDS
    while True:
        statuses = task_statuses(folder, jobs, queued_jobs([job.id for job in jobs]))
        for status in statuses:
            line = _line(status)
            if shown.get(status.id) != line:
                console.print(line, soft_wrap=True)
                shown[status.id] = line
        if all(status.ended for status in statuses):
            return int(not all(status.succeeded for status in statuses))
        time.sleep(pause)
        pause = min(longest, pause * 1.2)


def _line(status: TaskStatus) -> str:
    parts = [f"{status.id} {status.state}"]
    if status.step is not None:
        parts.append(f"step {status.step}/{status.steps}")
    if status.reward is not None:
        parts.append(f"reward {format_number(status.reward)}")
    if status.reason:
        parts.append(status.reason)
        if status.ended:
            parts.append(f"see {status.log}")
    return ", ".join(parts)


def _show(statuses: Sequence[TaskStatus], console: Console) -> None:
    table = Table()
    for name in ("job", "what", "state", "step", "reward", "reason"):
        table.add_column(name, overflow="fold")
    for status in statuses:
        what = status.kind if not status.output else os.path.relpath(status.output)
        step = "" if status.step is None else f"{status.step}/{status.steps}"
        reward = "" if status.reward is None else format_number(status.reward)
        table.add_row(status.id, what, status.state, step, reward, status.reason)
    console.print(table)
    for status in statuses:
        if status.ended and not status.succeeded:
            console.print(f"{status.id}: see {status.log}", soft_wrap=True)
