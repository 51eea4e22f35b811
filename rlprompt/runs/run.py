"""The life of a run: resume, evaluate, save, finish; it knows no gradient."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlprompt.artifacts.format import save_artifact
from rlprompt.endpoints.ledger import BudgetSpentError
from rlprompt.errors import InputError
from rlprompt.files import replace_folder, to_json, write_atomic
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.random_state import seed_global_random
from rlprompt.runs.budget import Budget
from rlprompt.runs.changes import extent
from rlprompt.runs.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    recover_checkpoints,
    save_checkpoint,
)
from rlprompt.runs.evaluations import Evaluations
from rlprompt.runs.guards import stopped_by
from rlprompt.runs.interrupt import StopRequest
from rlprompt.runs.learner import NotFiniteError, StepResult
from rlprompt.runs.outcome import Outcome
from rlprompt.runs.parts import RunParts
from rlprompt.runs.signal import observe as observe_signal
from rlprompt.runs.standing import test_verdict, validation_verdict
from rlprompt.runs.state import RunState
from rlprompt.runs.stop_reason import BUDGET, EARLY_STOPPING, FINISHED, MAX_SECONDS, StopReason
from rlprompt.runs.summary import Summary, artifact_metrics, build_summary, rank_memory
from rlprompt.serving.loaded import LoadedPrompt
from rlprompt.tracking.names import with_logged
from rlprompt.tracking.tracker import RunInfo

logger = logging.getLogger(__name__)

_REPORT_SHARE = 0.05
"""Most of a run's time that drawing its report may take while it goes on."""


class Run(Outcome):
    """Runs one recipe in one folder."""

    def __init__(self, parts: RunParts, folder: Path) -> None:
        """Join the parts; nothing is written yet.

        Args:
            parts: everything the run needs.
            folder: the run folder; it need not exist.
        """
        super().__init__(folder)
        self.parts = parts
        self.state = RunState(parts.learner)
        self.after_publish: Callable[[], None] = lambda: None
        """Called when artifact and report are there while the run goes on."""
        self._budget = Budget(parts.settings)
        self._begun = False
        self._is_over_budget = False
        self._evaluations = Evaluations(parts, self.state)
        self._report_due = -math.inf

    def run(self, *, resume: bool = False, tests: bool = True) -> Summary:
        """Go on to the end, or until a stop signal; returns the content of summary.json.

        Args:
            resume: whether to go on from the newest checkpoint in the output folder, or from the
                start when there is none yet.
            tests: whether to end with the test queries, where there are any; a population tests
                its best member only.

        Raises:
            InputError: the folder holds another run, or its newest checkpoint is damaged or belongs
                to other data, another base or another prompt.
            NotFiniteError: loss, gradient or prompt was not finite; the step's data is in
                `failed_step_N/` and the state before that step in the newest checkpoint.
        """
        self._begun = True
        seed_global_random(self.parts.seed)
        resume_step = self._resume() if resume else None
        self._set_extent()
        folder = self.folder / "checkpoints"
        if not resume and self.parts.ranks.first(lambda: checkpoint_steps(folder)):
            raise InputError(
                f"'{folder}' holds checkpoints of another run; resume that run, or choose another "
                "output folder"
            )
        parts = self.parts
        parts.trackers.start(self._info(resume_step))
        summary: Summary | None = None
        try:
            with StopRequest() as stop:
                self._evaluations.stop = stop
                summary = self._finish(self._steps(stop), tests)
        finally:
            parts.trackers.finish(summary or {})
            parts.learner.close()
            if parts.ledger is not None:
                parts.ledger.close()
        return summary

    def _info(self, resume_step: int | None) -> RunInfo:
        """What trackers are told at the start."""
        parts = self.parts
        return RunInfo(
            name=parts.name,
            output_dir=self.folder,
            steps=parts.settings.steps,
            base=parts.target.id,
            recipe=parts.recipe,
            identity=self._identity,
            resume_step=resume_step,
        )

    def _resume(self) -> int:
        """Restore the newest checkpoint; gives its step, or -1 when there is none."""
        folder = self.folder / "checkpoints"
        ranks = self.parts.ranks
        ranks.first(lambda: recover_checkpoints(folder))
        if not ranks.first(lambda: checkpoint_steps(folder)):
            return -1
        checkpoint = ranks.first(lambda: load_checkpoint(folder), "the checkpoint")
        self.state.restore(checkpoint, self._identity)
        self.parts.guards.adopt(self.state.progress.guards)
        return checkpoint.step

    def _set_extent(self) -> None:
        """Note how far the run is to go; one that was ended by early stopping may go on."""
        progress, now = self.state.progress, extent(self.parts.settings)
        if self._is_stale and progress.extent not in ([], now):
            logger.info("early stopping counts anew from step %d", progress.step)
            progress.stale_evaluations = 0
        progress.extent = now
        progress.chosen = ""  # it says how a run that had ended was chosen

    def _steps(self, stop: StopRequest) -> StopReason:
        """The loop; returns why it ended, with everything saved."""
        progress, settings = self.state.progress, self.parts.settings
        agree = self.parts.ranks.agree
        if self._reason_to_end() is None and self.parts.ranks.is_first:
            (self.folder / "summary.json").unlink(missing_ok=True)  # of a run that had ended
        self._catch_up()
        signal = agree(stop.reason)
        if signal is None and self._reason_to_end() is None:
            self._publish()
        while signal is None and self._reason_to_end() is None:
            start = time.perf_counter()
            if not self._step():
                break  # the state is that before the step again
            shown = self._evaluation_is_due()
            if shown:
                self._evaluations.learned(is_last=self._is_done)
            progress.seconds += time.perf_counter() - start
            if progress.step % settings.save_every == 0:
                self._save()
                shown = True
            signal = agree(stop.reason)
            if shown and signal is None and self._reason_to_end() is None:
                self._publish()
        if not self._is_saved:
            self._save()
        if signal is not None and (not self._is_done or self._owes_evaluation):
            return StopReason("signal", signal)
        reason = self._reason_to_end()
        assert reason is not None  # the loop went on until there was one, or a signal
        return reason

    def _reason_to_end(self) -> StopReason | None:
        """Why no further step is made, or None: there are more."""
        progress = self.state.progress
        if self._is_over_budget or self._evaluations.is_over_budget:
            return BUDGET
        if self._is_done:
            return FINISHED
        guard = stopped_by(progress.guards)
        if guard is not None:
            return StopReason("guard", guard)
        if self._budget.is_spent(progress.budget_seconds):
            return MAX_SECONDS
        return EARLY_STOPPING if self._is_stale else None

    @property
    def _is_stale(self) -> bool:
        """Whether there were as many evaluations without a better one as early stopping allows."""
        patience = self.parts.settings.early_stopping
        return patience is not None and self.state.progress.stale_evaluations >= patience

    @property
    def _is_done(self) -> bool:
        """Whether all steps are made, or there is nothing more to learn."""
        steps = self.parts.settings.steps
        return self.state.progress.step >= steps or self.parts.learner.is_over

    def _step(self) -> bool:
        """One step of the learner, counted and logged; False where the budget cut it off."""
        parts, progress = self.parts, self.state.progress
        start, budget_start = time.perf_counter(), self._budget.now()
        before = self.state.checkpoint(self._identity)
        following = progress.step + 1
        is_last = following == parts.settings.steps
        try:
            result = parts.learner.step(
                progress.step,
                _step_seed(parts.seed, progress.step),
                next_seed=None if is_last else _step_seed(parts.seed, following),
                time_share=self._budget.share(progress.budget_seconds),
            )
        except NotFiniteError as error:
            self.state.restore(before, self._identity)
            self._save_failure(error)
            raise
        except BudgetSpentError as error:
            logger.warning("step %d is not made: %s", following, error)
            self.state.restore(before, self._identity)
            self._is_over_budget = True
            return False
        seconds = time.perf_counter() - start
        progress.step = following
        progress.num_tokens += result.num_tokens
        progress.rollout_seconds += result.rollout_seconds
        progress.step_seconds.append(seconds)
        progress.budget_seconds += self._budget.now() - budget_start
        if self._budget.is_limited:
            # All ranks stop together, and their learning rates agree.
            progress.budget_seconds = parts.ranks.first(lambda: progress.budget_seconds)
        self._log_step(result, seconds)
        return True

    def _log_step(self, result: StepResult, seconds: float) -> None:
        """Let the guards look at a step, and tell the trackers."""
        parts, progress = self.parts, self.state.progress
        observe_signal(result.no_signal, progress.signal, progress.step)
        metrics = with_logged({**result.metrics, **_times(result, seconds)}, result.logged)
        metrics |= parts.guards.observe(progress.step, metrics, progress.guards)
        metrics["num_tokens"] = float(progress.num_tokens)
        parts.trackers.log_completions(progress.step, result.rows)
        parts.trackers.log_metrics(progress.step, metrics)
        tensors = parts.learner.prompt.state_dict().items()
        norms = {f"prompt/norms/{k}": v.float().norm(dim=-1) for k, v in tensors if v.dim() > 1}
        parts.trackers.log_histograms(progress.step, norms)

    def _catch_up(self) -> None:
        """Evaluate what a run begins with, and what a stop signal has cut off."""
        progress = self.state.progress
        if not self.parts.data.heldout or not (
            progress.evaluated_step < 0 or self._owes_evaluation
        ):
            return
        start = time.perf_counter()
        if progress.evaluated_step < 0:
            self._evaluations.baselines()
        else:
            self._evaluations.learned(is_last=self._is_done)
        progress.seconds += time.perf_counter() - start
        if self._is_saved:  # without what was evaluated now
            self._save()

    @property
    def _is_saved(self) -> bool:
        """Whether the newest checkpoint is of this step."""
        return checkpoint_steps(self.folder / "checkpoints")[-1:] == [self.state.progress.step]

    @property
    def _owes_evaluation(self) -> bool:
        """Whether the prompt of this step is to be evaluated and was not yet."""
        progress = self.state.progress
        return progress.evaluated_step < progress.step and self._evaluation_is_due()

    def _evaluation_is_due(self) -> bool:
        due = self.state.progress.step % self.parts.evaluation.every == 0 or self._is_done
        due = due or self._budget.is_spent(self.state.progress.budget_seconds)
        return due and bool(self.parts.data.heldout)

    def _save(self) -> None:
        checkpoint = self.state.checkpoint(self._identity)
        if self.parts.ranks.is_first:
            folder = self.folder / "checkpoints"
            save_checkpoint(folder, checkpoint, self.parts.settings.keep_checkpoints)

    @property
    def _identity(self) -> dict[str, str]:
        """What a checkpoint must find again to go on."""
        return {"dataset": self.parts.data.fingerprint, **self.parts.target.identity}

    def _save_failure(self, error: NotFiniteError) -> None:
        """Keep what led to a loss that is not finite; the state is that before the step again."""
        if not self.parts.ranks.is_first:
            return
        step = self.state.progress.step + 1
        folder = self.folder / f"failed_step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(to_json(row) + "\n" for row in error.rows)
        write_atomic(folder / "completions.jsonl", lines)
        write_atomic(folder / "error.json", to_json({"step": step, "error": str(error)}, indent=1))
        self._save()

    def require_state(self) -> None:
        """Have the state of the run: its own, or of a member that had ended before from its folder.

        Raises:
            InputError: the folder holds no run.
        """
        if not self._begun and self._resume() < 0:
            raise InputError(f"'{self.folder}' has no prompt yet; run it")

    def conclude(self, num_rivals: int, chosen: str = "") -> Summary:
        """Write what an ended run leaves once more, as the best of several, and test it.

        A population does this with its best member, so that one prompt only meets the test queries.

        Args:
            num_rivals: number of held-out evaluations of other runs that its prompt was chosen from
                beside its own.
            chosen: sentence that says by which tests it was chosen; empty = by its mean.

        Returns:
            The content of summary.json.

        Raises:
            InputError: the folder holds no run.
        """
        self.require_state()
        reason = StopReason.parse(self.summary.get("stopped_because")) or FINISHED
        progress, trackers = self.state.progress, self.parts.trackers
        progress.num_rivals, progress.chosen = num_rivals, chosen
        if self.parts.test is None:
            return self._finish(reason, tests=False)
        trackers.start(self._info(progress.step))
        summary: Summary | None = None
        try:
            summary = self._finish(reason, tests=True)
        finally:
            trackers.finish(summary or {})
            self.parts.test.close()
        return summary

    def _finish(self, reason: StopReason, tests: bool) -> Summary:
        """Write artifact, summary and report with the best prompt.

        Args:
            reason: why the run ended.
            tests: whether the test queries are met; never by a run that a signal stopped, which
                goes on later, or whose budget is spent.
        """
        parts, prompt = self.parts, self.state.best_prompt()
        progress, metric = self.state.progress, self.parts.evaluation.select_by
        verdict, tested = validation_verdict(progress, metric), None
        if tests and parts.test is not None and reason.kind not in ("signal", "budget"):
            tested = self._evaluations.test(parts.test, prompt)
            self._save()  # with the fact that the test queries were met
            if tested is None and self._evaluations.is_over_budget:
                reason = BUDGET
            elif tested is None:
                reason = StopReason("signal", str(self._evaluations.stop.reason))
        if tested is not None:
            verdict = test_verdict(progress, tested.scores, len(tested.steps), metric)
        summary = build_summary(
            progress,
            parts.target,
            artifact=self.folder / "artifact",
            fingerprint_after=parts.target.verify(),
            reason=reason,
            verdict=verdict,
            tested=tested,
        )
        if tried := parts.learner.tried:
            summary["candidates"] = [dict(row) for row in tried]
        if parts.ledger is not None:
            summary["endpoint"] = parts.ledger.report()
        summary["ranks"] = parts.ranks.each(lambda: rank_memory(parts.target), "the summary")
        said = {"verdict": verdict.sentence, "learned": verdict.learned}
        self._write_artifact(prompt, artifact_metrics(progress) | said)
        if parts.ranks.is_first:
            write_atomic(self.folder / "summary.json", to_json(summary, indent=2))
            parts.write_report(self.folder)
        return summary

    def _publish(self) -> None:
        """Write the artifact of the best prompt so far, and the report, while the run goes on."""
        progress, parts = self.state.progress, self.parts
        state = f"in training, {progress.step} of {parts.settings.steps} steps"
        metrics = {**artifact_metrics(progress), "state": state}
        self._write_artifact(self.state.best_prompt(), metrics)
        if parts.ranks.is_first:
            self._draw_report()
            self.after_publish()

    def _draw_report(self) -> None:
        """Draw the report, unless that would take more than a small share of the run's time."""
        start = time.perf_counter()
        if start < self._report_due:
            return
        try:
            self.parts.write_report(self.folder)
        except Exception as error:  # a drawing is not worth a run; the last one raises
            logger.warning("the report could not be drawn (%s); the run goes on", error)
        end = time.perf_counter()
        self._report_due = end + (end - start) / _REPORT_SHARE

    def _write_artifact(self, prompt: Prompt, metrics: Mapping[str, Any]) -> None:
        """Put an artifact in the place of the one before, whole at any moment."""
        parts, fresh = self.parts, self.folder / ".artifact.new"
        with ExitStack() as scratch:
            if not parts.ranks.is_first:
                fresh = Path(scratch.enter_context(TemporaryDirectory())) / "artifact"
            shutil.rmtree(fresh, ignore_errors=True)  # what a crash left
            # Every rank: describing a prompt runs the base, and a sharded one needs them all.
            save_artifact(
                fresh, parts.target, prompt, name=parts.name, recipe=parts.recipe, metrics=metrics
            )
            if parts.ranks.is_first:
                replace_folder(fresh, self.folder / "artifact")

    @property
    def prompt(self) -> LoadedPrompt:
        """The learned prompt, ready to answer: the best by held-out reward, or else the last."""
        parts = self.parts
        self.require_state()
        if not isinstance(parts.target, Policy):
            raise InputError(
                f"the prompt was found for {parts.target.id}, and no base is here to answer under "
                f"it; take its text, init_text in '{self.folder / 'artifact' / 'prompt.json'}'"
            )
        return LoadedPrompt(
            parts.target.sibling(),
            self.state.best_prompt(),
            parts.sampling,
            name=parts.name,
            recipe=parts.recipe,
        )


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step, so that a resumed run draws what it would have drawn."""
    return (seed * 1_000_033 + step * 7919 + 1) % 2**63


def _times(result: StepResult, seconds: float) -> dict[str, float]:
    """Seconds of a step by phase; `time/other` is what no phase claims."""
    times = {f"time/{name}": value for name, value in result.phases.items()}
    times["time/other"] = seconds - sum(result.phases.values())
    times["step_time"] = seconds
    return times
