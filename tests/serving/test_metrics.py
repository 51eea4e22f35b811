"""Metrics as Prometheus reads them."""

from __future__ import annotations

from rlprompt.serving.metrics import Described, Metrics


def made() -> Metrics:
    return Metrics(
        {
            "seen_total": Described("counter", "Things seen."),
            "left": Described("gauge", "Things left."),
            "took_seconds": Described("histogram", "Times."),
        }
    )


def test_counters_gauges_and_histograms_are_written() -> None:
    metrics = made()
    metrics.add("seen_total", 2, kind='a "b"\\\n')
    metrics.set("left", 7)
    for seconds in (0.001, 0.2, 0.25, 1000.0):
        metrics.observe("took_seconds", seconds)
    lines = metrics.text().splitlines()
    assert "# TYPE seen_total counter" in lines
    assert 'seen_total{kind="a \\"b\\"\\\\\\n"} 2' in lines
    assert "left 7" in lines
    assert 'took_seconds_bucket{le="0.005"} 1' in lines
    assert 'took_seconds_bucket{le="0.25"} 3' in lines
    assert 'took_seconds_bucket{le="60.0"} 3' in lines
    assert 'took_seconds_bucket{le="+Inf"} 4' in lines
    assert "took_seconds_count 4" in lines
    assert any(line.startswith("took_seconds_sum 1000.45") for line in lines)


def test_labels_cannot_be_made_without_end() -> None:
    metrics = made()
    for number in range(1500):
        metrics.add("seen_total", kind=str(number))
        metrics.observe("took_seconds", 1.0, kind=str(number))
    assert metrics.text().count("seen_total{") == 1000
    assert metrics.text().count("took_seconds_count{") == 1000
    assert metrics.value("seen_total", kind="3") == 1.0
    assert metrics.value("seen_total", kind="1400") == 0.0
