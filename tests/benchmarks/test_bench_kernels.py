"""The kernel benchmark: its peers compute the same, its gate holds, and it invents no speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.kernels.operands import Heads

pytest.importorskip("triton")

from benchmarks import bench_kernels as bench
from benchmarks.kernel_peers import plain_flex

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")


def test_all_implementations_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.HEADS, "tiny", Heads(4, 2, 16))
    # FlexAttention has no backward on a CPU.
    points = [bench.Point(kind, "tiny", 3, 5, 7) for kind in ("forward", "decode")]
    errors = bench.gate(points, "cpu", plain_flex, torch.float32)
    assert errors.pop("ours, again") == 0
    assert set(errors) == set(bench.IMPLEMENTATIONS)
    assert max(errors.values()) < 1e-5, errors


@NO_GPU
def test_without_a_gpu_everything_is_labelled_as_calculated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--model", "smollm2-135m", "--json", str(tmp_path / "b.json")]
    assert bench.main([*arguments, "--plot", str(tmp_path / "b.svg")]) == 0
    assert capsys.readouterr().out.startswith("CALCULATED, nothing was measured")
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["measured"] is False
    assert all(cell["measured_us"] is None for cell in record["cells"])
    assert "CALCULATED" in (tmp_path / "b.svg").read_text()


@pytest.mark.parametrize(
    "errors", [{"ours": 0.5, "ours, again": 0}, {"ours": 0.0, "ours, again": 1}]
)
def test_no_speed_is_printed_when_results_are_wrong(
    errors: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("measured all the same")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(bench, "gate", lambda *_: dict(errors))
    monkeypatch.setattr(bench, "measure", never)
    assert bench.main(["--quick"]) == 1
    shown = capsys.readouterr()
    assert "results are wrong" in shown.err
    assert "concat / ours" not in shown.out


def test_the_roofline_counts_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows of one token, one head of dim 2, three prefix tokens: small enough to count."""
    monkeypatch.setitem(bench.HEADS, "one", Heads(1, 1, 2))
    point = bench.Point("forward", "one", 2, 3, 1)
    flops, traffic = bench.work(point, "ours")
    assert flops == 2 * (3 + 1) * 2 * (2 * 2)  # rows, keys, products, multiply and add over dim 2
    own, prefix = 2 * 2 * (2 * 2), 3 * 2 * (2 * 2)
    assert traffic == own + own + prefix  # q and o, k and v, prefix
