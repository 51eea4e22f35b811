"""A population: several prompts trained in one process, on one loaded base.

Members are trained one after the other, each as it would be alone: its own folder, optimizer,
rollouts and rewards. They share what does not learn (base, packed weights, engine, held-out
evaluation), so that a sweep over starts, learning rates or seeds loads and packs the base once and
evaluates the baselines once. The best member by held-out reward is the run's result.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.runs.run import Trainer
from rlprompt.training.update import NotFiniteError

logger = logging.getLogger(__name__)

_ENDED = ("finished", "early_stopping", "max_seconds")


class Population:
    """Trainers by name; each writes to its own folder inside the run's."""

    def __init__(self, trainers: Mapping[str, Trainer], output: Path) -> None:
        """Keep the trainers; nothing is written yet."""
        self.trainers = dict(trainers)
        self.output = output

    def run(self, *, resume: bool = False) -> dict[str, Any]:
        """Train every member, or until a stop signal; returns the content of summary.json.

        A member whose loss is not finite is left out; its folder keeps what led to it.

        Args:
            resume: go on: members that have ended are not run again.

        Raises:
            InputError: see `Trainer.run`.
            NotFiniteError: no member came to an end.
        """
        summaries: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for name, trainer in self.trainers.items():
            ended = _ended_summary(trainer.output) if resume else None
            if ended is not None:
                summaries[name] = ended
                continue
            logger.info("member %s of %d", name, len(self.trainers))
            _write_recipe(trainer)
            try:
                summaries[name] = trainer.run(resume=resume)
            except NotFiniteError as error:
                logger.warning("member %s failed: %s", name, error)
                failures[name] = str(error)
                continue
            if summaries[name]["stopped_because"] not in _ENDED:
                break
        if not summaries:
            raise NotFiniteError(f"no member came to an end ({'; '.join(failures.values())})")
        return self._finish(summaries, failures)

    def _finish(
        self, summaries: Mapping[str, dict[str, Any]], failures: Mapping[str, str]
    ) -> dict[str, Any]:
        """Copy the best member's artifact and report, and write the table."""
        best = max(summaries, key=lambda name: _reward(summaries[name]))
        last = list(summaries.values())[-1]
        folder = self.trainers[best].output
        artifact = self.output / "artifact"
        _replace_tree(folder / "artifact", artifact)
        shutil.copyfile(folder / "report.html", self.output / "report.html")
        members = {name: _row(summary) for name, summary in summaries.items()}
        summary = {
            **summaries[best],
            "steps": sum(s["steps"] for s in summaries.values()),
            "seconds": sum(s["seconds"] for s in summaries.values()),
            "stopped_because": last["stopped_because"],
            "artifact": str(artifact),
            "best_member": best,
            "members": members,
            "failed_members": dict(failures),
        }
        write_atomic(self.output / "summary.json", to_json(summary, indent=2))
        return summary


def _ended_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a member that needs no more steps."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    try:
        summary = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"'{path}' is damaged ({error}); delete that folder") from error
    return summary if summary.get("stopped_because") in _ENDED else None


def _write_recipe(trainer: Trainer) -> None:
    text = yaml.safe_dump(dict(trainer.parts.recipe), sort_keys=False, allow_unicode=True)
    trainer.output.mkdir(parents=True, exist_ok=True)
    write_atomic(trainer.output / "recipe.resolved.yaml", text)


def _reward(summary: Mapping[str, Any]) -> float:
    reward = summary["heldout_reward_after"]
    return -math.inf if reward is None or math.isnan(reward) else float(reward)


def _row(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in ("heldout_reward_after", "best_step", "steps", "seconds")}


def _replace_tree(source: Path, target: Path) -> None:
    """Copy a folder beside its place, then rename it there."""
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
