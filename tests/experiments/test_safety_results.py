"""docs/safety.md: the shares and differences in it, and that the page is made from its numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from experiments import safety_results as script

ROOT = Path(__file__).parents[2]


def test_the_quantile_is_that_of_students_t() -> None:
    for freedom in (9, 19, 39, 200):
        assert script.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-4)


def test_a_share_counts_queries_when_their_completions_agree() -> None:
    together = {str(i): [i < 10] * 4 for i in range(20)}
    apart = {str(i): [True, True, False, False] for i in range(20)}
    wilson = stats.binomtest(10, 20).proportion_ci(method="wilson")
    found = script.share(together)
    assert (found["value"], found["count"], found["of"]) == (0.5, 40, 80)
    # 20 queries, less what dividing by 19 makes of the variance
    assert found["low"] == pytest.approx(wilson.low, abs=1e-9)
    assert found["high"] == pytest.approx(wilson.high, abs=1e-9)
    # Without any variance between queries nothing is known of it, and the queries count again.
    assert script.share(apart)["low"] == pytest.approx(wilson.low, abs=1e-9)
    never = script.share({str(i): [False] * 4 for i in range(20)})
    assert never["low"] == 0.0
    assert never["high"] == pytest.approx(0.161, abs=1e-3)


def test_a_difference_is_paired_by_query() -> None:
    base = {str(i): [i % 2 == 0] * 2 for i in range(20)}
    same = script.difference(base, base)
    assert (same["value"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    other = {q: [not hits[0], hits[1]] for q, hits in base.items()}
    gaps = [0.5 if i % 2 else -0.5 for i in range(20)]
    interval = stats.ttest_1samp(gaps, 0.0).confidence_interval()
    found = script.difference(other, base)
    assert found["low"] == pytest.approx(interval.low, abs=1e-3)
    assert found["high"] == pytest.approx(interval.high, abs=1e-3)


def test_the_page_is_made_from_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "DOCS", tmp_path)
    script.render()
    shown = (tmp_path / "safety.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "safety.md").read_text(encoding="utf-8") == shown
