"""Checkpoints: round trip, crashes at any moment, and which ones stay on disk."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rlprompt.errors import InputError
from rlprompt.random_state import global_random_state, restore_global_random_state
from rlprompt.runs import checkpoint as module
from rlprompt.runs.checkpoint import (
    Checkpoint,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from rlprompt.training.optimizer import load_optimizer_tensors, optimizer_tensors


def some(step: int, value: float = 1.0) -> Checkpoint:
    return Checkpoint(
        step, {"prompt/embeddings": torch.full((2, 3), value)}, {"progress": {"n": 1}}
    )


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a/x": torch.randn(3, 2).t(), "b": torch.tensor(7.0), "c": torch.arange(4)}
    state = {"progress": {"step": 12, "heldout": {"base": {"reward": 0.1}}}, "list": [1, 2.5]}
    path = save_checkpoint(tmp_path / "new" / "checkpoints", Checkpoint(12, tensors, state), 2)
    assert path.name == "step_000012"
    loaded = load_checkpoint(path.parent)
    assert loaded.step == 12 and loaded.state == state
    assert set(loaded.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_the_newest_stay_and_the_newest_is_loaded(tmp_path: Path) -> None:
    for step in (5, 9, 10, 100):
        save_checkpoint(tmp_path, some(step, step), keep=2)
    assert checkpoint_steps(tmp_path) == [10, 100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000010", "step_000100"]
    assert load_checkpoint(tmp_path).step == 100
    assert load_checkpoint(tmp_path, 10).tensors["prompt/embeddings"][0, 0] == 10


def test_more_than_a_million_steps_sort_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, some(step), keep=5)
    assert checkpoint_steps(tmp_path) == [999_999, 1_000_000]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, some(3, 1.0), keep=2)
    save_checkpoint(tmp_path, some(3, 2.0), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]
    assert load_checkpoint(tmp_path).tensors["prompt/embeddings"][0, 0] == 2.0


def test_what_a_crash_left_is_ignored_and_removed_by_the_next_save(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, some(3), keep=2)
    torn = tmp_path / ".step_000006.0123abcd"
    torn.mkdir()
    (torn / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_000007").mkdir()  # not whole: no state.json
    assert checkpoint_steps(tmp_path) == [3]
    assert load_checkpoint(tmp_path).step == 3
    save_checkpoint(tmp_path, some(6), keep=2)
    assert not torn.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("broken", ["save", "write_atomic"])
def test_a_failed_save_leaves_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    save_checkpoint(tmp_path, some(3), keep=1)

    def fail(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, some(6), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003"]
    assert load_checkpoint(tmp_path).step == 3


@pytest.mark.parametrize("at", [1, 2], ids=["moving_the_old_away", "moving_the_new_in"])
def test_a_failure_while_replacing_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    save_checkpoint(tmp_path, some(6, 1.0), keep=1)
    replace, calls = os.replace, []

    def failing(source: Path, target: Path) -> None:
        if source.parent == tmp_path:
            calls.append(source)
            if len(calls) == at:
                raise OSError("disk quota exceeded")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="quota"):
        save_checkpoint(tmp_path, some(6, 2.0), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000006"]
    assert load_checkpoint(tmp_path).tensors["prompt/embeddings"][0, 0] == 1.0


@pytest.mark.parametrize("damage", ["tensors", "cut", "state", "no_tensors", "no_step", "list"])
def test_a_damaged_newest_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, some(3), keep=2)
    path = save_checkpoint(tmp_path, some(6), keep=2)
    tensors, state = path / "tensors.safetensors", path / "state.json"
    damages: dict[str, Callable[[], object]] = {
        "tensors": lambda: tensors.write_bytes(b"\0" * 64),
        "cut": lambda: tensors.write_bytes(tensors.read_bytes()[:-5]),
        "no_tensors": tensors.unlink,
        "state": lambda: state.write_text('{"format": 1, "st'),
        "no_step": lambda: state.write_text('{"format": 1}'),
        "list": lambda: state.write_text("[1, 2]"),
    }
    damages[damage]()
    with pytest.raises(InputError, match=r"step_000006' is damaged .*delete that folder to resume"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, 3).step == 3


def test_another_format_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoint; start a new run"):
        load_checkpoint(tmp_path / "nowhere")
    path = save_checkpoint(tmp_path, some(3), keep=1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(InputError, match="another version"):
        load_checkpoint(tmp_path)


def test_optimizer_state_round_trip(tmp_path: Path) -> None:
    def optimizer_over(parameter: nn.Parameter) -> torch.optim.AdamW:
        return torch.optim.AdamW([parameter], lr=0.1, betas=(0.9, 0.95), foreach=False)

    def step(parameter: nn.Parameter, optimizer: torch.optim.AdamW) -> None:
        parameter.grad = parameter.detach().sin()
        optimizer.step()

    straight = nn.Parameter(torch.randn(4, 3))
    first = optimizer_over(straight)
    for _ in range(3):
        step(straight, first)
    save_checkpoint(tmp_path, Checkpoint(3, optimizer_tensors(first, "optimizer"), {}), 1)
    resumed = nn.Parameter(straight.detach().clone())
    second = optimizer_over(resumed)
    load_optimizer_tensors(second, load_checkpoint(tmp_path).tensors, "optimizer")
    for _ in range(3):
        step(straight, first)
        step(resumed, second)
    assert torch.equal(straight, resumed)


def test_process_wide_generators_round_trip(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, list[float]]:
        return (random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(2).tolist())

    draw()  # leaves half a pair in Python's gauss
    np.random.randn()
    tensors, state = global_random_state()
    save_checkpoint(tmp_path, Checkpoint(1, tensors, {"random": state}), 1)
    expected = [draw(), draw()]
    loaded = load_checkpoint(tmp_path)
    restore_global_random_state(loaded.tensors, loaded.state["random"])
    assert [draw(), draw()] == expected
