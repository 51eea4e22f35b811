"""docs/cluster.md: its tables are what kill loop, plan, its check and the simulation wrote.

Each stands between two comments.
"""

from __future__ import annotations

import json
from typing import Any

from tests.cli.runs import rlprompt
from tests.docs.pages import DOCS, check_page

PLAN = ("plan", "recipes/distributed/two_nodes.yaml", "--model-size", "70b", "--gpus", "16")


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "results" / name).read_text())
    return found


def kill_table() -> str:
    found = read("kill_loop.json")
    shown = {
        **{f"kills in a {kind}": count for kind, count in found["kills_by_kind"].items()},
        "kills": found["kills"],
        "checkpoints or logs that could not be read": found["corrupt"],
        "saved steps that were lost": found["lost_steps"],
        "runs that were killed and resumed to their end": found["rounds"],
        "equal to the unkilled runs": "yes" if found["equal_to_unkilled"] else "no",
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in shown.items())
    return f"| | |\n|---|---|\n{rows}"


def plan_check_table() -> str:
    found = read("plan_check.json")
    lines = ["| run | what | predicted, MB | measured, MB | error |", "|---|---|---|---|---|"]
    names = {
        "at rest": "base at rest, per rank",
        "rollout": "most memory in a rollout",
        "update": "most memory in an update",
        "weights": "weights received per step",
        "sums": "gradient and prompt received per step",
    }
    for row in found["rows"]:
        if row["measured_mb"]:
            numbers = f"{row['predicted_mb']:.1f} | {row['measured_mb']:.1f} | {row['error']:+.1%}"
            lines.append(f"| {row['run']} | {names[row['what']]} | {numbers} |")
    return "\n".join(lines) + "\n"


def simulation_table() -> str:
    found = read("simulate_cluster.json")
    shown = ("8", "64", "512")
    heads = [f"ratio at {gpus}" for gpus in shown]
    lines = [
        f"| queries | size | base | {' | '.join(heads)} | efficiency at 64 | below one half at | "
        "what grows most |",
        "|---" * (6 + len(shown)) + "|",
    ]
    queries = {"weak": "8 per GPU", "strong": "512 in all"}
    bases = {"replicated": "whole", "gathered": "shards, whole for rollouts", "layers": "shards"}
    for row in found["limits"]:
        size, scaling = row["size"], row["scaling"]
        own = {
            str(cell["gpus"]): cell
            for cell in found["cells"]
            if (cell["size"], cell["scaling"]) == (size, scaling)
        }
        ratios = " | ".join(f"{own[gpus]['ratio']:.2f}" for gpus in shown)
        below = f"{row['below_half_at']} GPUs" if row["below_half_at"] else "not to 512"
        lines.append(
            f"| {queries[scaling]} | {size} | {bases[own['512']['base']]} | {ratios} | "
            f"{row['efficiency']['64']:.2f} | {below} | {row['grows_most']} |"
        )
    return "\n".join(lines) + "\n"


def plan_block() -> str:
    shown = rlprompt(*PLAN)
    assert shown.code == 0, shown.err
    return f"```\n$ rlprompt {' '.join(PLAN)}\n{shown.out.rstrip()}\n```\n"


TABLES = {
    "kill_loop": kill_table,
    "plan_check": plan_check_table,
    "plan": plan_block,
    "simulate_cluster": simulation_table,
}


def test_the_tables_of_the_page_are_what_was_measured() -> None:
    text = (DOCS / "cluster.md").read_text(encoding="utf-8")
    for name, make in TABLES.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert start and end and start not in after, name
        text = before + start + make() + end + after
    check_page("cluster.md", text)


def test_what_was_measured_is_good_enough() -> None:
    kills = read("kill_loop.json")
    assert kills["kills"] >= 30 and kills["corrupt"] == 0 and kills["equal_to_unkilled"] is True
    assert set(kills["kills_by_kind"]) == {"step", "rollout", "checkpoint"}
    assert read("plan_check.json")["worst"] <= 0.15
    for cell in read("simulate_cluster.json")["cells"]:
        assert abs(cell["simulated_s"]["ideal"] / cell["planned_s"] - 1) < 0.02, cell
