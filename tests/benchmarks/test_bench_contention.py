"""What bench_contention.py makes of its seconds, and that its neighbours go when it does."""

from __future__ import annotations

import os

import pytest

from benchmarks.bench_contention import DEFAULT, OURS, fair_share, neighbours, summary, waiting_as
from rlprompt.cpu_share import SPIN_COUNT


@pytest.mark.parametrize(
    ("threads", "beside", "cores", "share"),
    [(2, 1, 2, 1.5), (2, 4, 2, 3.0), (1, 1, 2, 1.0), (2, 0, 2, 1.0), (2, 1, 8, 1.0)],
)
def test_a_fair_share_is_that_of_the_threads(
    threads: int, beside: int, cores: int, share: float
) -> None:
    assert fair_share(10.0, threads, beside, cores) == 10.0 * share


def test_the_summary_holds_medians_against_fair_shares() -> None:
    seconds = {
        OURS: {0: [1.0, 1.02, 9.0], 1: [1.6, 1.6, 1.6], 4: [3.0, 3.3, 3.0]},
        DEFAULT: {0: [1.0, 1.0, 1.0], 1: [2.8, 2.8, 2.8], 4: [12.0, 12.0, 12.0]},
    }
    found = summary(seconds, threads=2, cores=2)
    assert found["slowdown_1"] == pytest.approx(1.6 / (1.02 * 1.5))
    assert found["slowdown_4"] == pytest.approx(3.0 / (1.02 * 3.0))
    assert found["default_1"] == pytest.approx(2.8 / 1.5)
    assert found["quiet_cost"] == pytest.approx(0.02)
    assert found["seconds"][OURS]["4"] == [3.0, 3.3, 3.0]


def test_neighbours_are_gone_after_the_block_also_when_it_fails() -> None:
    with pytest.raises(RuntimeError), neighbours(2) as started:
        assert all(process.poll() is None for process in started)
        raise RuntimeError
    assert all(process.poll() is not None for process in started)


def test_each_side_waits_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    with waiting_as(OURS):
        assert os.environ["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
        assert "OMP_WAIT_POLICY" not in os.environ
    with waiting_as(DEFAULT):
        assert "GOMP_SPINCOUNT" not in os.environ and "OMP_WAIT_POLICY" not in os.environ
    assert os.environ["OMP_WAIT_POLICY"] == "passive" and "GOMP_SPINCOUNT" not in os.environ
