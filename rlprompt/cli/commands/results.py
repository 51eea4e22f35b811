"""What a run ends with on the terminal: before and after, a few answers, and where things are."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlprompt.reports.candidates import candidate_rows, made_by
from rlprompt.runs.read_folder import Row, RunFiles, load_run
from rlprompt.runs.summary import Summary
from rlprompt.tracking.console import WHO, clean_text, format_number

_SHOWN_ANSWERS = ("base", "handwritten", "learned")
_MOODS = {"good": "bold green", "bad": "bold red", "neutral": "bold"}
_NUM_SAMPLES = 2
_MAX_ANSWER = 600
_NUM_CANDIDATES = 10
_MAX_CELL = 120


def show_results(
    folder: Path, summary: Summary, console: Console, prompt_classes: Sequence[str] = ()
) -> None:
    """Print the comparison of base, hand-written and learned prompt, and what to do next.

    Args:
        folder: the run folder; sample answers come from its completions.
        summary: the content of its summary.json.
        console: the console to print to.
        prompt_classes: paths of classes of the user's own, which chatting must name.
    """
    heldout: Mapping[str, Row] = summary["heldout"]
    run = folder
    console.print()
    console.print(_verdict(summary), soft_wrap=True)
    if "candidates" in summary:
        console.print()
        console.print(_candidates(load_run(folder), console))
    if "members" in summary:
        console.print()
        console.print(_members(summary))
        run = folder / "members" / summary["best_member"]
    if heldout:
        console.print()
        tested = summary.get("test")
        split = "test queries" if tested else "validation queries"
        best = summary["best_step"]
        kept = f"is that of step {best}" if best else "is the initial one, no step beat it"
        console.print(f"{split}; the learned prompt {kept}", soft_wrap=True)
        console.print(_comparison(tested or heldout))
        _show_samples(run, summary["best_step"], console)
    _show_ranks(summary.get("ranks", ()), console)
    own = [word for path in prompt_classes for word in ("--prompt-class", path)]
    chat = shlex.join(["rlprompt", "chat", str(folder / "artifact"), "--compare", *own])
    console.print()
    for label, value in (
        ("report", folder / "report.html"),
        ("artifact", folder / "artifact"),
        ("try", chat),
    ):
        line = Text(f"{label:<9}", style="bold").append(str(value), style="not bold")
        console.print(line, soft_wrap=True)


def _verdict(summary: Summary) -> Text:
    """What may be said of the prompt, and how many steps could teach nothing."""
    verdict = summary["verdict"]
    text = Text(verdict["sentence"], style=_MOODS[verdict["mood"]])
    flat, steps = summary["steps_without_signal"], summary["steps"]
    if verdict["learned"] is not False and 2 * flat >= steps > 0:
        text.append(f"\nrewards had nothing to teach in {flat} of {steps} steps", style="not bold")
    return text


def _show_ranks(ranks: Sequence[Mapping[str, float]], console: Console) -> None:
    """Print what each rank held, where there are several or the base is in shards."""
    ranks = [each for each in ranks if "base_bytes" in each]  # none of a model that is elsewhere
    if not any(len(ranks) > 1 or each["base_bytes"] < each["base_bytes_whole"] for each in ranks):
        return
    console.print()
    for number, each in enumerate(ranks):
        held, whole = (each[key] / 2**20 for key in ("base_bytes", "base_bytes_whole"))
        peaks = [f"peak memory {each['peak_rss_mb']:.0f} MiB"]
        if "peak_gpu_mb" in each:
            peaks.append(f"of the GPU {each['peak_gpu_mb']:.0f} MiB")
        line = f"rank {number}: {held:.1f} of the base's {whole:.1f} MiB, {', '.join(peaks)}"
        console.print(line, soft_wrap=True)


def _members(summary: Summary) -> Table:
    """One row per member of a population."""
    table = Table()
    for column in ("member", "reward", "best step", "steps", "seconds", "ended"):
        table.add_column(column, justify="left" if column in ("member", "ended") else "right")
    for name, row in summary["members"].items():
        best = name == summary.get("best_member")
        table.add_row(
            name,
            format_number(row.get("heldout_reward_after")),
            str(row.get("best_step", "-")),
            str(row.get("steps", "-")),
            format_number(row.get("seconds")),
            Text(_ending(row)),
            style="bold" if best else "",
        )
    return table


def _candidates(run: RunFiles, console: Console) -> Table:
    """What a search has tried, the most tried first."""
    table = Table()
    for column in ("candidate", "reward", "completions", "made by", "text"):
        table.add_column(column, justify="left" if column in ("made by", "text") else "right")
    for row in candidate_rows(run)[:_NUM_CANDIDATES]:
        table.add_row(
            str(row.get("id")),
            format_number(row.get("reward")),
            str(row.get("completions")),
            Text(clean_text(made_by(row), _MAX_CELL, console.encoding)),
            Text(clean_text(str(row.get("text")), _MAX_CELL, console.encoding)),
        )
    return table


def _ending(row: Mapping[str, Any]) -> str:
    """Why a member ended."""
    reason, error = row["stopped_because"], row.get("error")
    if reason is None:
        return "not begun"
    return f"{reason}: {error}" if error else str(reason)


def _comparison(heldout: Mapping[str, Row]) -> Table:
    shown = [who for who in WHO if who in heldout]
    table = Table()
    table.add_column("")
    for who in shown:
        table.add_column(WHO[who], justify="right", style="bold" if who == "learned" else "")
    for label, key in (("reward", "reward"), ("  standard error", "reward_sem")):
        cells = [_rounded(heldout[who].get(key)) for who in shown]
        table.add_row(label, *cells, end_section=key == "reward_sem")
    names = dict.fromkeys(name for who in shown for name in heldout[who]["rewards"])
    for name in names:
        values = (heldout[who]["rewards"].get(name) for who in shown)
        table.add_row(Text(f"  {name}"), *(format_number(value) for value in values))
    for label, key in (
        ("mean tokens", "mean_length"),
        ("ended by themselves", "terminated_share"),
        ("log-prob under base", "base_logprob"),
        ("KL to base", "base_kl"),
        ("query information", "query_information"),
    ):
        if all(heldout[who].get(key) is None for who in shown):
            continue
        table.add_row(label, *(format_number(heldout[who].get(key)) for who in shown))
    return table


def _rounded(value: float | None) -> str:
    return format_number(value) if value is None or not math.isfinite(value) else f"{value:.3f}"


def _show_samples(folder: Path, best_step: int, console: Console) -> None:
    """Print the first held-out queries with one answer under each prompt."""
    answers: dict[Any, dict[str, str]] = {}
    queries: dict[Any, str] = {}
    for row in load_run(folder).completions:
        who = row.get("who")
        step = best_step if who == "learned" else 0
        shown = row.get("split") == "heldout" and who in _SHOWN_ANSWERS
        if not shown or row.get("step") != step:
            continue
        index = row.get("query_index")
        queries.setdefault(index, str(row.get("query")))
        answers.setdefault(index, {}).setdefault(str(who), str(row.get("completion")))
    encoding = console.encoding
    for index, query in list(queries.items())[:_NUM_SAMPLES]:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row("query", Text(clean_text(query, _MAX_ANSWER, encoding), style="bold"))
        for who, label in WHO.items():
            if who in answers[index]:
                text = clean_text(answers[index][who], _MAX_ANSWER, encoding)
                grid.add_row(label, Text(text))
        console.print()
        console.print(grid)
