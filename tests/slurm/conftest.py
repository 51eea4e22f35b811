"""A real Slurm for the tests that need one; where it cannot run they are skipped, and say why."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm_local.sh"
CANNOT = 3
"""What the script ends with where Slurm cannot run."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """Three nodes on this machine; gives the path of slurm.conf, which SLURM_CONF names too."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: a socket's path is limited
    port = 20000 + os.getpid() % 40000
    try:
        started = subprocess.run(
            ["bash", SCRIPT, "up", folder, "3"],
            env={**os.environ, "RLPROMPT_SLURM_PORT": str(port)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        if started.returncode == CANNOT:
            pytest.skip(f"no Slurm here: {started.stderr.strip()}")
        assert started.returncode == 0, started.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder / "slurm.conf"
    finally:
        subprocess.run(["bash", SCRIPT, "down", folder], check=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
