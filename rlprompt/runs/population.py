"""A population: several prompts trained in one process, on one loaded base.

Members are trained one after the other, each as it would be alone: its own folder, optimizer,
rollouts and rewards. They share what does not learn (base, packed weights, engine, held-out
evaluation), so that a sweep over starts, learning rates or seeds loads and packs the base once and
evaluates the baselines once. The best member by held-out reward is the run's result; with
`evaluation.evidence.against: kept` it is the first, unless a later one is shown to be better.

A member ends for reasons of its own: a guard, a time limit, a loss that is not finite. The others
are trained all the same. Only a signal ends the population, and `--resume` goes on with the members
that are not complete.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rlprompt.certify.succession import MemberChallenge
from rlprompt.evaluation.heldout import AcceptedSettings
from rlprompt.evaluation.values import value_of
from rlprompt.files import replace_folder, to_json, write_atomic
from rlprompt.reading import yaml_text
from rlprompt.runs.claim_folder import RECIPE_FILE
from rlprompt.runs.learner import NotFiniteError
from rlprompt.runs.outcome import Outcome, read_summary
from rlprompt.runs.run import Run
from rlprompt.runs.selection import chosen_member, member_sentence
from rlprompt.runs.stop_reason import FAILED, FINISHED, StopReason
from rlprompt.runs.summary import Summary
from rlprompt.serving.loaded import LoadedPrompt

logger = logging.getLogger(__name__)


class Population(Outcome):
    """Runs by name; each writes to its own folder inside the population's."""

    def __init__(
        self, members: Mapping[str, Run], folder: Path, accepted: AcceptedSettings | None = None
    ) -> None:
        """Keep the members' runs; nothing is written yet.

        Args:
            members: the members' runs, at least one, by the member's name.
            folder: the run folder of the population.
            accepted: what a later member must show to be chosen, over the whole population; None =
                a higher mean.
        """
        super().__init__(folder)
        self.members = dict(members)
        self._accepted = accepted

    @property
    def prompt(self) -> LoadedPrompt:
        """The best member's prompt; see `Outcome.prompt`."""
        return self.members[self.summary["best_member"]].prompt

    def run(self, *, resume: bool = False) -> Summary:
        """Train every member, or until a stop signal; returns the content of summary.json.

        A member whose loss is not finite is no candidate for the result; its folder keeps what led
        to it.

        Args:
            resume: whether to go on: members that are complete are not run again.

        Raises:
            InputError: see `Run.run`.
            NotFiniteError: no member came to an end.
        """
        summaries: dict[str, Summary] = {}
        failures: dict[str, str] = {}
        try:
            for name, run in self.members.items():
                known = _complete_summary(run) if resume else None
                if known is not None:
                    summaries[name] = known
                    continue
                logger.info("member %s of %d", name, len(self.members))
                (self.folder / "summary.json").unlink(missing_ok=True)  # of one that had ended
                _write_recipe(run)
                run.after_publish = partial(self._publish, run, summaries)
                try:
                    summaries[name] = run.run(resume=resume, tests=False)
                except NotFiniteError as error:
                    logger.warning("member %s failed: %s", name, error)
                    failures[name] = str(error)
                    continue
                reason = StopReason.parse(summaries[name]["stopped_because"])
                if reason is not None and reason.kind == "signal":
                    break
                if reason is not None and reason.kind != "finished":
                    logger.warning("member %s ended early (%s); the others go on", name, reason)
        finally:
            next(iter(self.members.values())).parts.evaluator.close()
        if not summaries:
            raise NotFiniteError(f"no member came to an end ({'; '.join(failures.values())})")
        return self._finish(summaries, failures)

    def _publish(self, run: Run, ended: Mapping[str, Summary]) -> None:
        """Show a member that is being trained as the population's result, if it is the best.

        Where a later member must be shown to be better, it is tested when it has ended.
        """
        if self._are_tested and ended:
            return
        best = run.state.progress.best_reward  # of what `_chosen_by` takes from a summary
        value = -math.inf if best is None else best
        if all(self._chosen_by(summary) < value for summary in ended.values()):
            self._show(run)

    def _show(self, run: Run) -> None:
        """Copy a member's artifact and report."""
        fresh = self.folder / ".artifact.new"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(run.folder / "artifact", fresh)
        replace_folder(fresh, self.folder / "artifact")
        report = run.folder / "report.html"
        if report.is_file():
            write_atomic(self.folder / "report.html", report.read_bytes())

    def _finish(self, summaries: Mapping[str, Summary], failures: Mapping[str, str]) -> Summary:
        """Copy the best member's artifact and report, and write the table."""
        best, challenges = self._best(summaries)
        reason = self._reason(summaries)
        if reason.kind != "signal":
            others = [s["num_compared"] for name, s in summaries.items() if name != best]
            accepted = self._accepted
            chosen = "" if accepted is None else member_sentence(best, challenges, accepted)
            summaries = {**summaries, best: self.members[best].conclude(sum(others), chosen)}
        artifact = self.folder / "artifact"
        self._show(self.members[best])
        summary: Summary = {
            **summaries[best],
            "steps": sum(s["steps"] for s in summaries.values()),
            "seconds": sum(s["seconds"] for s in summaries.values()),
            "stopped_because": str(reason),
            "alarms": [
                {"member": name, **alarm} for name, s in summaries.items() for alarm in s["alarms"]
            ],
            "artifact": str(artifact),
            "best_member": best,
            "members": {
                name: _row(summaries.get(name), failures.get(name)) for name in self.members
            },
        }
        if challenges:
            summary["member_selection"] = [asdict(each) for each in challenges]
        write_atomic(self.folder / "summary.json", to_json(summary, indent=2))
        self.members[best].parts.write_report(self.folder)  # with all members
        return summary

    @property
    def _are_tested(self) -> bool:
        """Whether a later member must be shown to be better than the one chosen so far."""
        return self._accepted is not None and self._accepted.against == "kept"

    def _best(self, summaries: Mapping[str, Summary]) -> tuple[str, list[MemberChallenge]]:
        """The member whose prompt is the result, and the tests between members that say so."""
        if self._accepted is None or not self._are_tested:
            return max(summaries, key=lambda name: self._chosen_by(summaries[name])), []
        known = {}
        for name in self.members:
            if name in summaries:
                self.members[name].require_state()
                progress = self.members[name].state.progress
                # A signal can come before a member has evaluated the prompt that it begins with.
                if "learned" in progress.scores:
                    known[name] = progress
        if not known:
            return next(iter(summaries)), []
        return chosen_member(known, self._accepted, len(self.members))

    def _reason(self, summaries: Mapping[str, Summary]) -> StopReason:
        """Why the whole ended: a signal, the budget of all, or each for reasons of its own."""
        reasons = [StopReason.parse(s["stopped_because"]) for s in summaries.values()]
        shared = [r for r in reasons if r is not None and r.kind in ("signal", "budget")]
        return next((r for r in shared if r.kind == "signal"), shared[0] if shared else FINISHED)

    def _chosen_by(self, summary: Summary) -> float:
        """What the best member is chosen by: that by which each chose its own best prompt."""
        name = next(iter(self.members.values())).parts.evaluation.select_by
        value = value_of(summary["heldout"].get("learned", {}), name)
        return -math.inf if value is None or math.isnan(value) else float(value)


def _complete_summary(run: Run) -> Summary | None:
    """The summary of a member that needs no more steps: it has ended under this very recipe."""
    stored = run.folder / RECIPE_FILE
    changed = stored.is_file() and stored.read_text(encoding="utf-8") != _recipe_text(run)
    if changed or not (run.folder / "summary.json").is_file():
        return None
    summary = read_summary(run.folder)
    reason = StopReason.parse(summary.get("stopped_because"))
    return summary if reason is not None and reason.is_complete else None


def _write_recipe(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    # First: a crash must not leave the new recipe beside the old one's end.
    (run.folder / "summary.json").unlink(missing_ok=True)
    write_atomic(run.folder / RECIPE_FILE, _recipe_text(run))


def _recipe_text(run: Run) -> str:
    return yaml_text.dump(dict(run.parts.recipe), allow_unicode=True)


def _row(summary: Summary | None, failure: str | None) -> dict[str, Any]:
    """How one member did; `stopped_because` is None of one that has not begun."""
    if summary is None:
        reason = None if failure is None else str(FAILED)
        return {"stopped_because": reason, "error": failure}
    return {
        "stopped_because": summary["stopped_because"],
        "heldout_reward_after": summary["heldout_reward_after"],
        "best_step": summary["best_step"],
        "steps": summary["steps"],
        "seconds": summary["seconds"],
    }
