"""The reliability plot: what was predicted against what came true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlprompt.reward_training.measures import Bin

_COLOURS = ("#1f77b4", "#d62728", "#2ca02c")


def draw_reliability(curves: Mapping[str, Sequence[Bin]], path: Path) -> None:
    """Write a PNG with one line per curve, 95% intervals, and the diagonal of a perfect model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
    for (name, bins), colour in zip(curves.items(), _COLOURS, strict=False):
        x = [each.predicted for each in bins]
        y = [each.observed.value for each in bins]
        low = [v - each.observed.low for v, each in zip(y, bins, strict=True)]
        high = [each.observed.high - v for v, each in zip(y, bins, strict=True)]
        total = sum(each.observed.of for each in bins)
        axes.errorbar(
            x,
            y,
            yerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            color=colour,
            label=f"{name} (n = {total})",
        )
    axes.set(xlabel="predicted probability", ylabel="observed share", xlim=(0, 1), ylim=(0, 1))
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, metadata={"Software": None})
