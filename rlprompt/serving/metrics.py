"""Counters, gauges and histograms, written as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple


class Label(NamedTuple):
    """A label and its value."""

    name: str
    """The label."""
    value: str
    """Its value."""


Labels = tuple[Label, ...]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MOST_SERIES = 1000
"""Sets of labels per metric; a client must not be able to make more."""


class Described(NamedTuple):
    """A metric and what it says."""

    kind: Literal["counter", "gauge", "histogram"]
    """Its type."""
    text: str
    """What is counted."""


class Metrics:
    """Numbers by name and labels; any thread may change them."""

    def __init__(self, described: Mapping[str, Described]) -> None:
        """Begin at zero.

        Args:
            described: the metrics that there are, by name.
        """
        self._described = dict(described)
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = {
            name: {} for name, each in described.items() if each.kind != "histogram"
        }
        self._buckets: dict[str, dict[Labels, list[float]]] = {
            name: {} for name, each in described.items() if each.kind == "histogram"
        }

    def add(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Count something up.

        Args:
            name: the name of a counter.
            amount: what is added.
            labels: the labels.
        """
        key = _key(labels)
        with self._lock:
            series = self._values[name]
            if key in series or len(series) < _MOST_SERIES:
                series[key] = series.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Say how much there is of something now.

        Args:
            name: the name of a gauge.
            value: the number.
            labels: the labels.
        """
        key = _key(labels)
        with self._lock:
            if key in self._values[name] or len(self._values[name]) < _MOST_SERIES:
                self._values[name][key] = float(value)

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Take up a time.

        Args:
            name: the name of a histogram.
            seconds: the time in seconds.
            labels: the labels.
        """
        key = _key(labels)
        with self._lock:
            series = self._buckets[name]
            if key not in series:
                if len(series) >= _MOST_SERIES:
                    return
                series[key] = [0.0] * (len(_SECONDS) + 2)
            counts = series[key]
            counts[bisect.bisect_left(_SECONDS, seconds)] += 1
            counts[-1] += seconds

    def value(self, name: str, **labels: str) -> float:
        """A counter or gauge as it is now; 0 where nothing was counted."""
        with self._lock:
            return self._values[name].get(_key(labels), 0.0)

    def text(self) -> str:
        """All of them, a line each."""
        lines: list[str] = []
        with self._lock:
            for name, described in self._described.items():
                lines.append(f"# HELP {name} {described.text}")
                lines.append(f"# TYPE {name} {described.kind}")
                if described.kind == "histogram":
                    for key, counts in sorted(self._buckets[name].items()):
                        lines += _histogram(name, key, counts)
                else:
                    values = self._values[name] or {(): 0.0}
                    lines += [f"{name}{_shown(k)} {v:.17g}" for k, v in sorted(values.items())]
        return "\n".join(lines) + "\n"


def _histogram(name: str, key: Labels, counts: Sequence[float]) -> list[str]:
    lines, total = [], 0.0
    for bound, count in zip([*map(str, _SECONDS), "+Inf"], counts, strict=False):
        total += count
        labels = _shown((*key, Label("le", bound)))
        lines.append(f"{name}_bucket{labels} {total:g}")
    lines.append(f"{name}_sum{_shown(key)} {counts[-1]:.17g}")
    lines.append(f"{name}_count{_shown(key)} {total:g}")
    return lines


def _key(labels: Mapping[str, str]) -> Labels:
    return tuple(Label(*pair) for pair in sorted(labels.items()))


def _shown(labels: Labels) -> str:
    def escaped(value: str) -> str:
        return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

    inside = ",".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{inside}}}" if inside else ""
