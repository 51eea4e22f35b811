"""The batch scripts as text: pinned whole, and what the settings may not put into them."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.slurm.script import TrainJob, command_script, train_script
from rlprompt.slurm.settings import ClusterSettings, load_cluster

GOLDEN = Path(__file__).parent / "golden"

TWO_NODES = ClusterSettings(
    nodes=2,
    gpus_per_node=4,
    cpus_per_task=8,
    memory="64G",
    time="04:00:00",
    partition="gpu",
    account="lab",
    qos="normal",
    constraint="a100|h100",
    directives=("--mail-type=END",),
    setup=("module load cuda", "source /env/bin/activate"),
    container=("apptainer", "exec", "--nv", "/images/rl.sif"),
    srun_arguments=("--cpu-bind=cores",),
    python="python3",
)
COMMAND = ["python3", "-m", "rlprompt", "train", "/work/a recipe.yaml"]


def one_job(**changes: Any) -> TrainJob:
    plain = ClusterSettings(python="python3", time="10:00")
    values = {"name": "tiny", "folder": Path("/runs/tiny/slurm"), "commands": [COMMAND]}
    commands = changes.get("commands", values["commands"])
    outputs = [Path(f"/runs/tiny/{number:03d}") for number in range(len(commands))]
    return TrainJob(**{**values, "outputs": outputs, "cluster": plain, **changes})


SCRIPTS = {
    "one_cpu": lambda: train_script(one_job()),
    "two_nodes": lambda: train_script(one_job(cluster=TWO_NODES)),
    "sweep_with_server": lambda: train_script(
        one_job(
            commands=[[*COMMAND, f"seed={seed}", "url=http://{server}:8000"] for seed in (1, 2)],
            max_parallel=1,
            server="python3 serve.py --port 8000",
            server_nodes=2,
        )
    ),
    "then": lambda: command_script(
        "tiny-then-1", Path("/runs/tiny/slurm"), "rlprompt eval 'a b' && date", TWO_NODES
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_text_of_every_script_is_pinned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`RLPROMPT_UPDATE_GOLDEN=1 pytest tests/slurm/test_script.py` writes the files anew."""
    monkeypatch.setattr(Path, "cwd", lambda: Path("/home/me/project"))
    text = SCRIPTS[name]()
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("RLPROMPT_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert path.read_text() == text
    parsed = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, timeout=20)
    assert parsed.returncode == 0, parsed.stderr


def test_the_words_of_a_command_reach_the_shell_as_they_are(tmp_path: Path) -> None:
    words = ["a b", "", "it's", "$HOME", "x={server}:1", "{server}", "'{server}'", "`id`"]
    script = train_script(one_job(commands=[words]))
    start = script.index('case "${SLURM_ARRAY_TASK_ID')
    block = script[start : script.index("esac", start) + 4]
    shown = subprocess.run(
        ["bash", "-c", f'SERVER=n2\n{block}\nprintf "%s\\n" "$@"'],
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert shown.stdout.split("\n")[:-1] == [word.replace("{server}", "n2") for word in words]


SECRETS = [
    "SLURM_JWT",
    "SLURM_JOB_ID_X",
    "PYTHON_KEYRING_PASSWORD",
    "CUDA_TOKEN",
    "NCCL_SECRET",
    "PATH_KEY",
    "WANDB_API_KEY",
]


def test_the_environment_is_written_down_by_name_so_that_no_secret_is(tmp_path: Path) -> None:
    script = train_script(one_job())
    start, end = script.index("for NAME in"), script.index("# The address that Slurm")
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\necho 'a @ git+https://me:hunter2@h/a.git'\necho b==1\n")
    python.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "NCCL_DEBUG": "WARN",
        "OMP_NUM_THREADS": "2",
        **dict.fromkeys(SECRETS, "hunter2"),
        "X": "a\nPATH=hunter2",
    }
    done = subprocess.run(
        ["bash", "-euc", f"LOGS={tmp_path}\n{script[start:end]}\nwait"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stderr) == (0, "")
    written = (tmp_path / "environment.txt").read_text()
    assert "SLURM_JOB_ID=7\n" in written and "NCCL_DEBUG=WARN\n" in written
    assert "hunter2" not in written
    assert (tmp_path / "packages.txt").read_text() == "a @ git+https://***@h/a.git\nb==1\n"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("partition: a b", "partition"),
        ("partitoin: a", "did you mean 'partition'"),
        ("time: 10:00", "put it in quotes"),
        ('setup: ["a\\nb"]', "setup"),
        ("{gpus_per_node: 2, tasks_per_node: 2}", "has no effect"),
        ("signal_lead_s: 5", "at least 70"),
        ("- a", "not a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_cluster_file_is_told_in_one_sentence(
    tmp_path: Path, text: str, wrong: str
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"cluster\.yaml") as told:
        load_cluster(path, {})
    assert wrong in str(told.value)


def test_the_command_line_overrules_the_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("{nodes: 2, partition: main}")
    cluster = load_cluster(path, {"nodes": 3, "partition": None})
    assert (cluster.nodes, cluster.partition) == (3, "main")


def test_a_path_that_cannot_stand_in_a_script_is_refused() -> None:
    with pytest.raises(InputError, match="plainer path"):
        train_script(one_job(folder=Path('/runs/"x"/slurm')))


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurm() -> None:
    script = train_script(one_job(folder=Path("/runs/50%j/slurm")))
    assert '--output="/runs/50%%j/slurm/job_%j.log"' in script
    assert f"JOB={shlex.quote('/runs/50%j/slurm')}/job_" in script


def test_the_example_of_a_cluster_file_loads() -> None:
    path = Path(__file__).parents[2] / "slurm" / "cluster.example.yaml"
    assert load_cluster(path, {}).num_ranks == 16
