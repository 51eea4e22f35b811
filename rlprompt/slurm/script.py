"""The batch scripts: text files with holes, filled here.

The templates in `slurm/` hold no conditions: everything that depends on settings is decided in this
file and arrives as finished lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlprompt.errors import InputError
from rlprompt.slurm.settings import ClusterSettings

_HOLE = re.compile(r"\{\{(\w+)\}\}")
_PACKAGED = Path(__file__).parent / "templates"
_CHECKOUT = Path(__file__).parents[2] / "slurm"
SERVER = "{server}"
"""In the words of a command: the address of the first server node, known when the job runs."""
_OWN_TRITON_CACHE = (
    'case "$TRITON_CACHE_DIR" in */rlprompt_triton_*) mkdir -p -m 700 "$TRITON_CACHE_DIR" && '
    '[ -O "$TRITON_CACHE_DIR" ] || export TRITON_CACHE_DIR=$(mktemp -d) ;; esac; '
)
"""Before a rank: a cache below /tmp that somebody else has made is not used."""


@dataclass(frozen=True)
class FrozenCode:
    """What a job runs, as it was when the job was submitted; see `rlprompt.slurm.frozen`."""

    folder: Path
    """With the recipe and the user's code, absolute."""
    package: Path | None = None
    """Folder that holds a copy of rlprompt; None where the nodes have one of their own."""


@dataclass(frozen=True)
class TrainJob:
    """A training job, or an array of them."""

    name: str
    """In the queue."""
    folder: Path
    """Absolute; gets scripts and logs."""
    commands: Sequence[Sequence[str]]
    """Words of what every rank runs; more than one makes a job array."""
    outputs: Sequence[Path]
    """The run folder of each command; a command has ended when there is a summary in it."""
    cluster: ClusterSettings
    """Resources."""
    max_parallel: int | None = None
    """Most tasks of the array at a time."""
    server: str | None = None
    """Shell line that the server nodes run beside the training."""
    server_nodes: int = 0
    """How many those are."""
    frozen: FrozenCode | None = None
    """None runs what the nodes find when the job starts."""


def train_script(job: TrainJob) -> str:
    """The script of a training job.

    Raises:
        InputError: a path cannot stand in a script.
    """
    cluster = job.cluster
    python = shlex.join([*cluster.container, cluster.python])
    served: dict[str, object] = {
        "server_nodes": job.server_nodes,
        "nodes": cluster.nodes,
        "srun_arguments": _srun_arguments(cluster),
        "server_command": shlex.join([*cluster.container, "bash", "-c", job.server or ""]),
    }
    limits = {"max_restarts": cluster.max_restarts, "max_kills": cluster.max_kills}
    has_copy = job.frozen is not None and job.frozen.package is not None
    awaited = {
        "python": f"{python} -P" if has_copy else python,
        "server_wait_s": cluster.server_wait_s,
    }
    return _fill(
        "train.sbatch",
        {
            "directives": _directives(job.name, job.folder, cluster, _array(job), job.server_nodes),
            "signal_lead_s": cluster.signal_lead_s,
            "fate": _fill("fate.sh", limits),
            "setup": "\n".join(cluster.setup),
            "code": _frozen(job.frozen),
            "environment": _environment(cluster),
            "commands": "\n".join(
                f"{number}) OUTPUT={shlex.quote(str(output))}\n"
                f"  set -- {_words([*cluster.container, *command])} ;;"
                for number, (command, output) in enumerate(
                    zip(job.commands, job.outputs, strict=True)
                )
            ),
            "folder": shlex.quote(str(job.folder)),
            "python": python,
            "server": _fill("server.sh", served) if job.server else "",
            "await_server": _fill("await_server.sh", awaited) if job.server else "",
            "nodes": cluster.nodes,
            "ntasks": cluster.num_ranks,
            "wait_s": cluster.wait_s,
            "srun_arguments": _srun_arguments(cluster),
            "rank_setup": _OWN_TRITON_CACHE if cluster.gpus_per_node else "",
        },
    )


def command_script(
    name: str,
    folder: Path,
    command: str,
    cluster: ClusterSettings,
    frozen: FrozenCode | None = None,
) -> str:
    """The script of one command on one node, after a training job.

    Args:
        name: the name in the queue.
        folder: the folder for the logs, absolute.
        command: a shell line.
        cluster: the resources; nodes and ranks beyond the first are left out.
        frozen: the code that it runs; None is what the node finds.

    Raises:
        InputError: a path cannot stand in a script.
    """
    gpus = min(1, cluster.gpus_per_node)
    single = cluster.model_copy(update={"nodes": 1, "tasks_per_node": None, "gpus_per_node": gpus})
    return _fill(
        "command.sbatch",
        {
            "directives": _directives(name, folder, single),
            "setup": "\n".join(cluster.setup),
            "code": _frozen(frozen),
            "environment": _environment(single),
            "srun_arguments": _srun_arguments(cluster),
            "command": shlex.join([*cluster.container, "bash", "-c", command]),
            "folder": shlex.quote(str(folder)),
        },
    )


def _frozen(frozen: FrozenCode | None) -> str:
    if frozen is None:
        return ""
    lines = [
        "# Recipe and code are those of the submission.",
        f"export RLPROMPT_FROZEN={shlex.quote(str(frozen.folder))}",
    ]
    if frozen.package is not None:
        if ":" in str(frozen.package):
            raise InputError(
                f"'{frozen.package}' cannot stand in PYTHONPATH, which is divided at colons; name "
                "a plainer path with --output"
            )
        # With -P Python does not look in the working directory first, where a checkout may be.
        path = f"{shlex.quote(str(frozen.package))}${{PYTHONPATH:+:$PYTHONPATH}}"
        lines.append(f'export PYTHONPATH={path}:"$PWD"')
    return "\n".join(lines)


def _environment(cluster: ClusterSettings) -> str:
    gpus = cluster.gpus_per_node
    of_gpus = _fill("gpu_environment.sh", {"gpus_per_node": gpus}) if gpus else ""
    values = {"ranks_per_node": cluster.ranks_per_node, "gpu_environment": of_gpus}
    return _fill("environment.sh", values).strip()


def _array(job: TrainJob) -> str | None:
    if len(job.commands) == 1:
        return None
    limit = "" if job.max_parallel is None else f"%{job.max_parallel}"
    return f"0-{len(job.commands) - 1}{limit}"


def _directives(
    name: str,
    folder: Path,
    cluster: ClusterSettings,
    array: str | None = None,
    server_nodes: int = 0,
) -> str:
    for path in (folder, Path.cwd()):
        if re.search(r"[\"\n\r\\]", str(path)):
            raise InputError(f"'{path}' cannot stand in a Slurm script; use a plainer path")
    word = re.sub(r"[^\w.+-]", "_", name)
    options: dict[str, object] = {
        "job-name": word,
        "nodes": cluster.nodes + server_nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": f'"{cluster.constraint}"' if cluster.constraint else None,
        "array": array,
        "chdir": f'"{Path.cwd()}"',
        "output": '"' + str(folder).replace("%", "%%") + '/job_%j.log"',
    }
    lines = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return "\n".join(f"#SBATCH {line}" for line in [*lines, *cluster.directives])


def _words(words: Sequence[str]) -> str:
    """Words quoted for a shell, in which `{server}` is a variable."""
    return " ".join(
        '"$SERVER"'.join(shlex.quote(part) if part else "" for part in word.split(SERVER)) or "''"
        for word in words
    )


def _srun_arguments(cluster: ClusterSettings) -> str:
    # Since 22.05 srun does not take this over from the job.
    cpus = [] if cluster.cpus_per_task is None else [f"--cpus-per-task={cluster.cpus_per_task}"]
    return shlex.join([*cpus, *cluster.srun_arguments])


def _fill(name: str, values: Mapping[str, object]) -> str:
    folder = _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT
    text = (folder / name).read_text(encoding="utf-8")
    holes = set(_HOLE.findall(text))
    if holes != set(values):
        raise ValueError(f"{folder / name} and its values differ: {sorted(holes ^ set(values))}")
    return _HOLE.sub(lambda hole: str(values[hole[1]]), text)
