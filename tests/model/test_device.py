"""Where a base runs: what `device: auto` does in a job that asked for GPUs."""

from __future__ import annotations

import pytest
import torch

from rlprompt.errors import InputError
from rlprompt.model.device import choose_device

NAMES = ("RLPROMPT_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("cuda", "told"), [(None, "scripts/setup.sh --cuda"), ("13.0", "nvidia-smi")], ids=str
)
def test_a_job_with_gpus_does_not_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, cuda: str | None, told: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=r"asked for 2 GPU\(s\)") as error:
        choose_device("auto")
    assert told in str(error.value)
    assert choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("value", [None, "", "0"], ids=["unset", "empty", "none"])
def test_a_job_without_gpus_does(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", value)
    assert choose_device("auto").type == "cpu"
