"""What a cluster is asked for: one YAML file per cluster, beside the recipes and not in them.

A recipe names a run and is the same everywhere; nodes, partitions and accounts are not part of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from rlprompt.errors import InputError
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text, reason
from rlprompt.recipe.yaml_file import explain
from rlprompt.settings import Settings

Word = Annotated[str, Field(pattern=r"^[^\s\"'`$\\]+$")]
"""Goes into a line of a script as it is."""
Line = Annotated[str, Field(pattern=r"^[^\n\r]+$")]
"""One line of shell."""


class ClusterSettings(Settings):
    """Resources of a training job, and how its scripts start on this cluster."""

    nodes: int = Field(default=1, ge=1)
    """Nodes that train."""
    gpus_per_node: int = Field(default=0, ge=0)
    """GPUs of each; every GPU gets a rank of its own. 0 trains on CPUs."""
    tasks_per_node: int | None = Field(default=None, ge=1)
    """Ranks per node without GPUs; 1 when not given."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """Cores of each rank; the cluster's default when not given."""
    memory: Word | None = None
    """Memory per node, such as 64G; the cluster's default when not given."""
    time: Word | None = None
    """Time limit, such as "04:00:00" (in quotes); the partition's when not given. A run that needs
    longer is requeued and goes on."""
    partition: Word | None = None
    """Partition, or several with commas."""
    account: Word | None = None
    """Whom the time is charged to."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features, such as a100|h100."""
    directives: tuple[Line, ...] = ()
    """More options of sbatch, such as --mail-type=END."""
    setup: tuple[Line, ...] = ()
    """Shell lines before anything else, such as `module load cuda`."""
    container: tuple[Word, ...] = ()
    """Words in front of every command, such as [apptainer, exec, --nv, image.sif]."""
    srun_arguments: tuple[Word, ...] = ()
    """More options of srun, such as --container-image=image.sqsh."""
    python: Word = Field(default_factory=lambda: sys.executable)
    """The interpreter of the nodes; by default the one that submits."""
    signal_lead_s: int = Field(default=300, ge=70)
    """Seconds before the time limit at which the run is asked to stop. Slurm may be 60 s early or
    late, so this is the longest step, a checkpoint, and a minute."""
    wait_s: int = Field(default=120, ge=10)
    """Seconds that the other ranks get to end after the first has."""
    max_restarts: int = Field(default=100, ge=0)
    """A job that was put back this often is not put back again."""
    max_kills: int = Field(default=2, ge=0)
    """How often a job is put back because a rank was killed (exit code 137: usually its memory)."""
    server_wait_s: int = Field(default=1800, ge=1)
    """Seconds that a job with --server waits for it to answer."""

    @model_validator(mode="after")
    def _one_rank_per_gpu(self) -> ClusterSettings:
        if self.gpus_per_node and self.tasks_per_node is not None:
            raise ValueError(
                "tasks_per_node has no effect with gpus_per_node, which gives every GPU a rank; "
                "remove it"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        """Tasks that train on each node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Tasks that train."""
        return self.nodes * self.ranks_per_node


def load_cluster(path: Path | None, changes: Mapping[str, Any]) -> ClusterSettings:
    """Read a cluster file, and change it by what the command line says.

    Args:
        path: the YAML file; None for the defaults.
        changes: the changed values, by field; None changes nothing.

    Raises:
        InputError: the file cannot be read, or a key or value is wrong.
    """
    tree = {} if path is None else _read(path)
    tree |= {key: value for key, value in changes.items() if value is not None}
    try:
        return ClusterSettings.model_validate(tree)
    except ValidationError as error:
        _, sentence = explain(error, ClusterSettings.model_json_schema())
        raise InputError(f"{path or 'the options of rlprompt submit'}: {sentence}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = yaml_text.load(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cluster file '{path}' cannot be read ({reason(error)}); see docs/cluster.md"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(
            f"cluster file '{path}' cannot be read, it is not valid YAML: {yaml_text.reason(error)}"
        ) from error
    if not isinstance(tree, dict):
        raise InputError(f"cluster file '{path}' is not a mapping of keys; see docs/cluster.md")
    return tree
