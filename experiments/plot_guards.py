"""Draws what a guarded run saw: proxy and gold over steps and over the KL, with the alarms.

rlprompt train recipes/guards/length_hack.yaml guards.0.action=warn --output runs/length_hack
python experiments/plot_guards.py runs/length_hack --output docs/results/reward_hack.svg
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.runs.read_folder import RunFiles, load_run

PROXY, GOLD, ALARM = "#0b6e99", "#b8860b", "#b03030"


def parting_guard(run: RunFiles) -> dict[str, Any]:
    """The first guard of the run that compares a proxy with a gold reward."""
    guards = [each for each in run.recipe.get("guards") or [] if each.get("type") == "parting"]
    if not guards:
        sys.exit(f"error: the recipe of {run.folder} has no guard of type parting")
    return dict(guards[0])


def draw(run: RunFiles) -> Figure:
    guard = parting_guard(run)
    keys = {name: f"rewards/{guard[name]}/mean" for name in ("proxy", "gold")}
    if guard["proxy"] == "reward":
        keys["proxy"] = "reward"
    rows = [row for row in run.metrics if all(row.get(key) is not None for key in keys.values())]
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    over_steps, over_kl = figure.subplots(1, 2, sharey=True)
    for name, color in (("proxy", PROXY), ("gold", GOLD)):
        values = [row[keys[name]] for row in rows]
        label = f"{name}: {guard[name]}"
        over_steps.plot([row["step"] for row in rows], values, color=color, label=label)
        known = sorted((row["kl"], row[keys[name]]) for row in rows if row.get("kl") is not None)
        over_kl.scatter(*zip(*known, strict=True), color=color, s=14, label=label)
    for alarm in run.summary.get("alarms") or []:
        over_steps.axvline(alarm["step"], color=ALARM, linewidth=1, linestyle="--")
        place = (alarm["step"], 0.02)
        over_steps.annotate(
            f" {alarm['guard']}", place, color=ALARM, fontsize=8, rotation=90, va="bottom"
        )
    over_steps.set(xlabel="step", ylabel="mean of the batch")
    over_kl.set(xlabel="KL to the base (nats per token)", xscale="log")
    over_steps.legend(frameon=False, fontsize=8)
    for axes in (over_steps, over_kl):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of rlprompt train")
    parser.add_argument("--output", type=Path, required=True, help="an SVG or PNG file")
    given = parser.parse_args()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlprompt"}):
        draw(load_run(given.run)).savefig(given.output, metadata={"Date": None}, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main())
