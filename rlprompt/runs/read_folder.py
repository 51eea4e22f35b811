"""Reading a run folder back: what a report, a comparison or a person's script starts from.

A run may be killed at any step and resumed any number of times, so any file may be absent and a
step may have been logged twice; this module hides both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlprompt.errors import InputError
from rlprompt.evaluation.values import value_of
from rlprompt.files import iter_jsonl
from rlprompt.reading import json_text, yaml_text
from rlprompt.reading.files import read_bytes, read_text, reason

Row = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; an absent file is empty.

    Metrics have one row per step and evaluations one per step and who, in order of steps: where a
    file has several (a resumed run), the last one counts.
    """

    folder: Path
    metrics: Sequence[Row]
    evaluations: Sequence[Row]
    completions: Sequence[Row]
    """The held-out ones, and the training ones of the last step: a run has too many to hold all."""
    summary: Row
    recipe: Row
    """The resolved recipe as plain values; empty if its text is not a YAML mapping."""
    recipe_text: str
    members: Mapping[str, RunFiles] = field(default_factory=dict)
    """Of a population, the files of each member that has begun, by name; everything else is then
    that of the best member, but for the summary."""

    def evaluations_of(self, who: str, split: str = "validation") -> list[Row]:
        """Return the evaluations of one of those that are compared, in order of steps."""
        return [
            row
            for row in self.evaluations
            if row.get("who") == who and row.get("split", "validation") == split
        ]

    @property
    def best_step(self) -> int | None:
        """The step whose prompt the artifact holds; None before there is one.

        The summary says it. A run that has none yet keeps the first of equals, as its loop does.
        """
        step = self.summary.get("best_step")
        if step is not None:
            return int(step)
        rows = self.evaluations_of("learned")
        if any("kept" in row for row in rows):
            return max((int(row["step"]) for row in rows if row.get("kept")), default=0)
        values = {row["step"]: self._chosen_by(row) for row in rows}
        known = {step: value for step, value in values.items() if value is not None}
        return max(known, key=lambda step: known[step]) if known else None

    def compared_evaluations(
        self, names: Iterable[str], split: str = "validation"
    ) -> dict[str, Row]:
        """Return the evaluation that stands for each that is compared, where there is one.

        On the validation queries the learned prompt is that of the step which was kept, not always
        the last one trained, and the start is the learned prompt of step 0.
        """
        found = {who: self.evaluations_of(who, split)[-1:] for who in names}
        if split == "validation":
            learned = self.evaluations_of("learned")
            for who, step in (("start", 0), ("learned", self.best_step)):
                if who in found:
                    found[who] = [row for row in learned if row["step"] == step]
        return {who: rows[-1] for who, rows in found.items() if rows}

    def _chosen_by(self, row: Row) -> float | None:
        """What the best prompt is chosen by, of one evaluation."""
        settings = self.recipe.get("evaluation")
        name = settings.get("select_by", "reward") if isinstance(settings, dict) else "reward"
        return value_of(row, name)

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps at which a metric has a value, and the values."""
        rows = [row for row in self.metrics if row.get(key) is not None]
        return [row["step"] for row in rows], [row[key] for row in rows]

    @property
    def reward_names(self) -> list[str]:
        """Every reward with a metric or a held-out mean, in the order of the recipe."""
        trained = (re.fullmatch(r"rewards/(.+)/mean", key) for row in self.metrics for key in row)
        names = [match[1] for match in trained if match]
        evaluated = (name for row in self.evaluations for name in row.get("rewards") or {})
        return list(dict.fromkeys([*names, *evaluated]))

    @property
    def reward_roles(self) -> dict[str, str]:
        """What the recipe says of each reward that it names: `weight 0.5`, or the role."""
        entries = self.recipe.get("rewards")
        roles = {}
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and entry.get("name"):
                role = str(entry.get("role") or "score")
                weight = entry.get("weight")
                scored = role == "score" and weight is not None
                roles[str(entry["name"])] = f"weight {weight}" if scored else role
        return roles


def load_run(run_dir: Path) -> RunFiles:
    """Read the files of a run folder, a population's members included.

    Raises:
        InputError: if none of them is there, or one is damaged.
    """
    run = _load_one(Path(run_dir))
    folders = run.folder / "members"
    names = run.summary.get("members") or {path.name: None for path in _begun(folders)}
    members = {name: _load_one(folders / name) for name in names if (folders / name).is_dir()}
    if not members:
        return run
    shown = members.get(run.summary.get("best_member", ""), next(iter(members.values())))
    return replace(
        shown,
        folder=run.folder,
        summary=run.summary,
        recipe=run.recipe or shown.recipe,
        recipe_text=run.recipe_text or shown.recipe_text,
        members=members,
    )


def _begun(members: Path) -> list[Path]:
    """Folders of members that have written something, in the order of their names."""
    if not members.is_dir():
        return []
    return sorted(path for path in members.iterdir() if (path / "recipe.resolved.yaml").is_file())


def _load_one(folder: Path) -> RunFiles:
    logs = [folder / f"{name}.jsonl" for name in ("metrics", "evaluation", "completions")]
    summary_path, recipe_path = folder / "summary.json", folder / "recipe.resolved.yaml"
    if not any(path.exists() for path in (*logs, summary_path, recipe_path)):
        raise InputError(f"'{folder}' holds no run; name the output folder of `rlprompt train`.")
    metrics, evaluations, completions = (
        iter_jsonl(path) if path.exists() else iter(()) for path in logs
    )
    recipe_text = _read_recipe(recipe_path) if recipe_path.exists() else ""
    return RunFiles(
        folder=folder,
        metrics=_last_of_each(metrics, "step"),
        evaluations=_last_of_each(evaluations, "step", "who", "split"),
        completions=_shown_completions(completions),
        summary=_read_summary(summary_path),
        recipe=_parse_recipe(recipe_text),
        recipe_text=recipe_text,
    )


def _read_recipe(path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); remove it.") from error


def _read_summary(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        summary = json_text.loads(read_bytes(path), surrogates=True)
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON ({error}); remove it.") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({reason(error)}); remove it.") from error
    if not isinstance(summary, dict):
        raise InputError(f"'{path}' is not a JSON object; remove it.")
    return summary


def _parse_recipe(text: str) -> Row:
    try:
        recipe = yaml_text.load(text, 2 * yaml_text.MOST_NODES)
    except yaml.YAMLError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _last_of_each(rows: Iterable[Row], *keys: str) -> list[Row]:
    latest = {tuple(row.get(key) for key in keys): row for row in rows if "step" in row}
    return sorted(latest.values(), key=lambda row: row["step"])


def _shown_completions(rows: Iterable[Row]) -> list[Row]:
    heldout: list[Row] = []
    train: list[Row] = []
    for row in rows:
        if row.get("split") in ("heldout", "test"):
            heldout.append(row)
            continue
        if train and train[-1].get("step") != row.get("step"):
            train.clear()
        train.append(row)
    return heldout + train
