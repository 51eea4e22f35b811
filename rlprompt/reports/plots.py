"""Curves of the report as inline SVG that follows the page's light or dark colours.

Every figure is drawn with matplotlib's object interface (no global state, no display), with text
kept as text, and then made part of a page: fixed colours become CSS variables, ids become unique,
and everything that refers to another place is cut. Titles and legends are the page's business.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

Color = Literal[
    "learned", "handwritten", "base", "best-text", "start", "train",
    "p1", "p2", "p3", "p4", "p5", "p6",
]  # fmt: skip
Series = Sequence[float | None]

MAX_POINTS = 300
"""A longer series is averaged into this many points, which bounds the size of the page."""

# Colours that stand for a CSS variable until the SVG is written; no drawing uses them as such.
_VARIABLES: dict[str, str] = {
    "learned": "#010101",
    "handwritten": "#010102",
    "base": "#010103",
    "train": "#010104",
    "p1": "#010105",
    "p2": "#010106",
    "p3": "#010107",
    "p4": "#010108",
    "p5": "#010109",
    "p6": "#01010a",
    "ink": "#01010b",
    "grid": "#01010c",
    "best-text": "#01010d",
    "start": "#01010e",
}
# The key type is a literal in some versions of matplotlib's stubs and `str` in others.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlprompt",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.edgecolor": _VARIABLES["grid"],
    "axes.labelcolor": _VARIABLES["ink"],
    "xtick.color": _VARIABLES["grid"],
    "ytick.color": _VARIABLES["grid"],
    "xtick.labelcolor": _VARIABLES["ink"],
    "ytick.labelcolor": _VARIABLES["ink"],
    "grid.color": _VARIABLES["grid"],
    "axes.unicode_minus": False,
    "path.simplify": True,
}


class LegendEntry(NamedTuple):
    """One line of a chart's legend."""

    color: Color
    label: str


class Bar(NamedTuple):
    """One difference with its interval."""

    label: str
    color: Color
    value: float
    low: float | None
    """None = no interval."""
    high: float | None


class Part(NamedTuple):
    """One summand of a stack."""

    color: Color
    values: Series


class Node(NamedTuple):
    """One point of a tree."""

    x: float
    y: float
    color: Color
    label: str = ""
    """What stands beside it; empty = nothing, and the point is small."""


class Edge(NamedTuple):
    """A line between two nodes, by their places."""

    old: int
    new: int


@dataclass(frozen=True)
class Curve:
    """One curve: values over steps, or one level across the whole figure.

    `spread` is drawn as a band of plus and minus that value. A single value with `level` set is a
    dashed line from side to side: something that was measured once.
    """

    color: Color
    steps: Sequence[float]
    values: Series
    spread: Series | None = None
    markers: bool = False
    level: bool = False
    width: float = 1.6


def draw_curves(curves: Sequence[Curve], name: str, *, x_label: str = "", y_label: str = "") -> str:
    """Draw curves over steps; values that are None or not finite are passed over.

    Args:
        curves: The curves, drawn in this order, later ones on top.
        name: A name that is unique on the page, of letters, digits and `-`; it becomes part of the
            ids.
        x_label: What `Curve.steps` are, when they are no steps and need not be whole.
        y_label: What the values are, with their unit.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for curve in curves:
            _draw(axes, curve)
        if x_label:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(x_label or "step")
        axes.set_ylabel(y_label)
        return _to_svg(figure, name)


def draw_differences(bars: Sequence[Bar], name: str, *, x_label: str) -> str:
    """Draw differences with their intervals over each other, the first on top, against zero.

    Arguments and result are those of `draw_curves`.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.0, 0.75 + 0.36 * len(bars)), layout="constrained")
        axes = figure.add_subplot()
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.axvline(0.0, color=_VARIABLES["ink"], linewidth=0.9)
        for place, bar in enumerate(reversed(bars)):
            color = _VARIABLES[bar.color]
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [place, place], color=color, linewidth=2.4)
            axes.plot([bar.value], [place], color=color, marker="o", markersize=6.0)
        axes.set_yticks(range(len(bars)), [bar.label for bar in reversed(bars)])
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.margins(x=0.08)
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        return _to_svg(figure, name)


def draw_stack(steps: Sequence[float], parts: Sequence[Part], name: str) -> str:
    """Draw the parts of a sum over steps on top of each other, the first at the bottom.

    Arguments and result are those of `draw_curves`; a missing value counts as zero.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width=10.0)
        bottom: NDArray[np.float64] | None = None
        for color, values in parts:
            x, height = thin(steps, values)
            base = np.zeros_like(height) if bottom is None else bottom
            top = base + np.nan_to_num(height)
            middles = (x[1:] + x[:-1]) / 2
            half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
            edges = np.concatenate([[x[0] - half], middles, [x[-1] + half]])
            axes.stairs(top, edges, baseline=base, fill=True, color=_VARIABLES[color])
            bottom = top
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel("seconds")
        return _to_svg(figure, name)


def draw_tree(
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    name: str,
    *,
    x_label: str,
    y_label: str,
) -> str:
    """Draw points and the lines between them; a line between two labelled ones is a thick one.

    Args:
        nodes: The points; labelled ones are on top.
        edges: Lines between nodes.
        name: A name that is unique on the page; see `draw_curves`.
        x_label: What `Node.x` is.
        y_label: What `Node.y` is, with its unit.

    Returns:
        An `<svg>` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(width=10.0)
        figure.set_figheight(3.6)
        for is_main in (False, True):
            chosen = [each for each in edges if _is_main(nodes, each) == is_main]
            ends = [[(nodes[i].x, nodes[i].y) for i in each] for each in chosen]
            color = nodes[chosen[0].new].color if is_main and chosen else "grid"
            width = 1.8 if is_main else 0.6
            axes.add_collection(
                LineCollection(ends, colors=_VARIABLES[color], linewidths=width, zorder=1 + is_main)
            )
        for color in dict.fromkeys(node.color for node in nodes):
            for is_labelled in (False, True):
                own = [n for n in nodes if n.color == color and bool(n.label) == is_labelled]
                x, y = [n.x for n in own], [n.y for n in own]
                axes.plot(
                    x,
                    y,
                    linestyle="",
                    marker="o",
                    markersize=5.0 if is_labelled else 2.6,
                    color=_VARIABLES[color],
                    zorder=3 + is_labelled,
                )
        for node in nodes:
            if node.label:
                axes.annotate(
                    node.label,
                    (node.x, node.y),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    color=_VARIABLES["ink"],
                    zorder=6,
                )
        axes.margins(y=0.1)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _to_svg(figure, name)


def _is_main(nodes: Sequence[Node], edge: Edge) -> bool:
    return all(nodes[place].label for place in edge)


def thin(steps: Sequence[float], values: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average a series into at most `MAX_POINTS` points over equal numbers of steps.

    Returns:
        Steps and values, `[n]` each; a missing value is NaN, and no value enters a mean as one.
    """
    x = np.asarray(steps, dtype=np.float64)
    y = np.asarray([_number(value) for value in values], dtype=np.float64)
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    return (
        np.asarray([x[part].mean() for part in parts]),
        np.asarray([_mean_of_known(y[part]) for part in parts]),
    )


def _figure(width: float = 5.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, 2.5), layout="constrained")
    axes = figure.add_subplot()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.grid(axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    return figure, axes


def _draw(axes: Axes, curve: Curve) -> None:
    color = _VARIABLES[curve.color]
    if curve.level:
        value = _number(curve.values[-1])
        if math.isfinite(value):
            axes.axhline(value, color=color, linewidth=1.4, linestyle=(0, (5, 3)))
        return
    x, y = thin(curve.steps, curve.values)
    known = np.isfinite(y)
    if curve.spread is not None:
        spread = np.nan_to_num(thin(curve.steps, curve.spread)[1])[known]
        low, high = y[known] - spread, y[known] + spread
        axes.fill_between(x[known], low, high, color=color, alpha=0.16, linewidth=0)
    # A line through one point is nothing at all.
    marker = "o" if curve.markers or known.sum() == 1 else ""
    axes.plot(x[known], y[known], color=color, linewidth=curve.width, marker=marker, markersize=3.5)


def _to_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return _for_page(buffer.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """Cut what an SVG file has beyond its drawing, and bind its colours and ids to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # matplotlib's own style sheet would apply to the whole page.
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r' id="', f' id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", svg)
    svg = re.sub(r" ?\n\s*", " ", svg)
    for variable, color in _VARIABLES.items():
        svg = re.sub(rf"((?:fill|stroke): ){color}\b", rf"\1var(--{variable})", svg)
    return svg.replace("<svg ", '<svg role="img" aria-hidden="true" ', 1)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _mean_of_known(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan
