"""The training loop: rollouts, updates, evaluation, checkpoints; blind to the algorithm."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlprompt.algorithms.base import Signal
from rlprompt.artifacts.format import save_artifact
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import HeldoutResult
from rlprompt.files import to_json, write_atomic
from rlprompt.model.base import verify_unchanged
from rlprompt.model.cpu.rollout_products import to_be_learned_from
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.reports.report import write_report
from rlprompt.rollout.collect import RolloutBatch, completion_metrics, completion_rows
from rlprompt.rollout.prefetch import WAITED
from rlprompt.runs.budget import Budget
from rlprompt.runs.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
    seed_global_random,
)
from rlprompt.runs.guards import stopped_by
from rlprompt.runs.interrupt import StopRequest
from rlprompt.runs.parts import RunParts
from rlprompt.runs.state import RunState, Stateful
from rlprompt.runs.summary import build_summary, rank_memory
from rlprompt.tracking.tracker import RunInfo
from rlprompt.training.optimizer import build_optimizer, learning_rate, lr_factor
from rlprompt.training.startup import check_trainable
from rlprompt.training.update import NotFiniteError, PhaseClock, Updater

logger = logging.getLogger(__name__)


class Trainer:
    """Runs one recipe into one output folder."""

    def __init__(self, parts: RunParts, output: Path) -> None:
        """Join the parts and prove that the prompt can be learned; nothing is written yet.

        Raises:
            InputError: it cannot (see `check_trainable`).
        """
        self.parts = parts
        self.output = output
        settings = parts.training
        self._budget = Budget(settings)
        scale = parts.policy.prompt.scale(parts.policy)
        peak_lr = learning_rate(settings.optimizer, scale)
        own = [(part.parameters, part.lr) for part in parts.algorithm.own_parameters()]
        parameters = parts.policy.parameters()
        optimizer = build_optimizer(parameters, settings.optimizer, peak_lr, own)
        check_trainable(parts.policy, optimizer, parts.data.train[0], [p for p, _ in own])
        others: dict[str, Stateful] = {"algorithm": parts.algorithm, "rewards": parts.rewards}
        if parts.constraints is not None:
            others["constraints"] = parts.constraints
        if parts.query_weights is not None:
            others["robust"] = parts.query_weights
        others |= parts.source.others
        self.state = RunState(parts.policy.prompt, optimizer, parts.source, others)
        self._updater = Updater(
            parts.policy,
            parts.algorithm,
            parts.reference,
            temperature=parts.source.temperature,
            token_budget=settings.token_budget,
            teacher=parts.teacher,
            query_weights=parts.query_weights,
            ranks=parts.ranks,
        )
        parts.ranks.copy_first(self._updater.trained)

    def run(self, *, resume: bool = False) -> dict[str, Any]:
        """Train to the end, or until a stop signal; returns the content of summary.json.

        Args:
            resume: go on from the newest checkpoint in the output folder, or from the start when
                there is none yet.

        Raises:
            InputError: the folder holds another run, or its newest checkpoint is damaged or belongs
                to other data, another base or another prompt.
            NotFiniteError: loss, gradient or prompt was not finite; the step's data is in
                `failed_step_N/` and the state before that step in the newest checkpoint.
        """
        seed_global_random(self.parts.seed)
        resume_step = self._resume() if resume else None
        folder = self.output / "checkpoints"
        if not resume and self.parts.ranks.first(lambda: checkpoint_steps(folder)):
            raise InputError(
                f"'{folder}' holds checkpoints of another run; resume that run, or choose another "
                "output folder"
            )
        summary: dict[str, Any] = {}
        parts = self.parts
        info = RunInfo(
            name=parts.name,
            output_dir=self.output,
            steps=parts.training.steps,
            base=parts.policy.base.id,
            recipe=parts.recipe,
            identity=self._identity,
            resume_step=resume_step,
        )
        parts.trackers.start(info)
        try:
            with StopRequest() as stop:
                summary = self._finish(self._steps(stop))
        finally:
            parts.trackers.finish(summary)
            parts.source.close()
            parts.rewards.close()
        return summary

    def _resume(self) -> int:
        """Restore the newest checkpoint; gives its step, or -1 when there is none."""
        folder = self.output / "checkpoints"
        ranks = self.parts.ranks
        if not ranks.first(lambda: checkpoint_steps(folder)):
            return -1
        checkpoint = ranks.first(lambda: load_checkpoint(folder), "the checkpoint")
        self.state.restore(checkpoint, self._identity)
        return checkpoint.step

    def _steps(self, stop: StopRequest) -> str:
        """The loop; returns why it ended, with everything saved."""
        progress, settings = self.state.progress, self.parts.training
        if self.parts.data.heldout and "base" not in progress.heldout:
            self._baselines()
        agree = self.parts.ranks.agree
        reason = agree(stop.reason)
        while progress.step < settings.steps and reason is None and not self._is_over():
            start = time.perf_counter()
            self._step()
            if self._evaluation_is_due():
                self._evaluate_learned()
            progress.seconds += time.perf_counter() - start
            if progress.step % settings.save_every == 0:
                self._save()
            reason = agree(stop.reason)
        if checkpoint_steps(self.output / "checkpoints")[-1:] != [progress.step]:
            self._save()
        if progress.step >= settings.steps:
            return "finished"
        guard = stopped_by(progress.guards)
        if reason is None and guard is None and self._budget.is_spent(progress.budget_seconds):
            return "max_seconds"
        return reason or (f"guard:{guard}" if guard else "early_stopping")

    def _step(self) -> None:
        """One rollout batch and its updates."""
        parts, progress = self.parts, self.state.progress
        start, budget_start = time.perf_counter(), self._budget.now()
        clock = PhaseClock()
        before = self.state.checkpoint(self._identity)
        seed = _step_seed(parts.seed, progress.step)
        with to_be_learned_from():
            batch = parts.source.collect(progress.step, seed)
        objective = parts.rewards.training_rewards(batch.rewards)
        if parts.constraints is not None:
            objective = parts.constraints.penalised(objective, batch.rewards.costs)
        try:
            with self._ahead() as meanwhile:
                signal, learned = self._updater.learn(
                    batch,
                    self.state.optimizer,
                    self._next_lr,
                    parts.training.optimizer.max_grad_norm,
                    clock,
                    seed=seed,
                    rewards=objective,
                )
        except NotFiniteError as error:
            self.state.restore(before, self._identity)
            self._save_failure(batch, error)
            raise
        progress.step += 1
        seconds = time.perf_counter() - start
        progress.num_tokens += int(batch.lengths.sum())
        progress.rollout_seconds += batch.rollout_seconds
        progress.step_seconds.append(seconds)
        progress.budget_seconds += self._budget.now() - budget_start
        if self._budget.is_limited:
            # All ranks stop together, and their learning rates agree.
            progress.budget_seconds = parts.ranks.first(lambda: progress.budget_seconds)
        times = {**_times(batch, clock, seconds, meanwhile.get(WAITED, 0.0)), **meanwhile}
        self._log_step(batch, signal, {**completion_metrics(batch), **learned, **times})

    def _ahead(self) -> AbstractContextManager[dict[str, float]]:
        """A block in which the source may draw the next batch, if there is a next step."""
        following = self.state.progress.step + 1
        if following == self.parts.training.steps:
            return nullcontext({})
        return self.parts.source.ahead(following, _step_seed(self.parts.seed, following))

    def _log_step(self, batch: RolloutBatch, signal: Signal, metrics: dict[str, float]) -> None:
        """Let everything that adapts look at a learned batch, and tell the trackers."""
        parts, progress = self.parts, self.state.progress
        metrics |= {f"prompt/{k}": v for k, v in parts.policy.prompt.metrics().items()}
        if parts.constraints is not None:
            metrics |= parts.constraints.update(batch.rewards.costs)
        if parts.query_weights is not None:
            metrics |= parts.query_weights.metrics()
        metrics |= parts.guards.observe(progress.step, metrics, progress.guards)
        metrics |= {"num_tokens": float(progress.num_tokens), "epoch": parts.source.epoch}
        parts.trackers.log_completions(
            progress.step, completion_rows(batch, "train", "learned", signal.row_advantages)
        )
        parts.trackers.log_metrics(progress.step, metrics)
        tensors = parts.policy.prompt.state_dict().items()
        norms = {f"prompt/norms/{k}": v.float().norm(dim=-1) for k, v in tensors if v.dim() > 1}
        parts.trackers.log_histograms(progress.step, norms)

    def _next_lr(self) -> float:
        """Set the rate of the coming update."""
        settings, progress = self.parts.training, self.state.progress
        algorithm = self.parts.algorithm
        total = settings.steps * algorithm.num_epochs * algorithm.num_minibatches
        time_share = self._budget.share(progress.budget_seconds)
        factor = lr_factor(settings.optimizer, progress.updates, total, time_share)
        groups = self.state.optimizer.param_groups
        for group in groups:
            group["lr"] = factor * group["peak_lr"]
        progress.updates += 1
        return float(groups[0]["lr"])

    def _baselines(self) -> None:
        """Evaluate base, hand-written text and the initial prompt."""
        start = time.perf_counter()
        prompts: dict[str, Prompt] = {"base": NonePrompt()}
        if self.parts.evaluation.handwritten is not None:
            prompts["handwritten"] = TextPrompt(self.parts.evaluation.handwritten)
        for who, prompt in prompts.items():
            result = self.parts.evaluator.evaluate(prompt, 0)
            self.state.progress.heldout[who] = result.metrics
            self._log_evaluation(who, result)
        self._evaluate_learned()
        self.state.progress.seconds += time.perf_counter() - start

    def _evaluation_is_due(self) -> bool:
        step = self.state.progress.step
        due = step % self.parts.evaluation.every == 0 or step == self.parts.training.steps
        due = due or self._budget.is_spent(self.state.progress.budget_seconds)
        return due and bool(self.parts.data.heldout)

    def _evaluate_learned(self) -> None:
        result = self.parts.evaluator.evaluate(self.parts.policy.prompt, self.state.progress.step)
        self._log_evaluation("learned", result)
        progress, chosen_by = self.state.progress, self.parts.evaluation.select_by
        self.parts.guards.observe(progress.step, result.flat, progress.guards, split="heldout")
        self.state.remember_best(result.value(chosen_by), result.metrics)

    def _log_evaluation(self, who: str, result: HeldoutResult) -> None:
        step = self.state.progress.step
        self.parts.trackers.log_completions(step, completion_rows(result.batch, "heldout", who))
        self.parts.trackers.log_evaluation(step, who, result.metrics)

    def _is_over(self) -> bool:
        """Whether held-out reward has stopped rising, time is up, or a guard has ended the run."""
        progress, patience = self.state.progress, self.parts.training.early_stopping
        stale = patience is not None and progress.stale_evaluations >= patience
        spent = self._budget.is_spent(progress.budget_seconds)
        return stale or spent or stopped_by(progress.guards) is not None

    def _save(self) -> None:
        checkpoint = self.state.checkpoint(self._identity)
        if self.parts.ranks.is_first:
            folder = self.output / "checkpoints"
            save_checkpoint(folder, checkpoint, self.parts.training.keep_checkpoints)

    @property
    def _identity(self) -> dict[str, str]:
        """What a checkpoint must find again to go on."""
        policy = self.parts.policy
        return {
            "dataset": self.parts.data.fingerprint,
            "base": policy.base.fingerprint,
            "chat template": policy.slot.template_hash,
        }

    def _save_failure(self, batch: RolloutBatch, error: NotFiniteError) -> None:
        """Keep what led to a loss that is not finite; the state is that before the step again."""
        if not self.parts.ranks.is_first:
            return
        step = self.state.progress.step + 1
        folder = self.output / f"failed_step_{step}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = completion_rows(batch, "train", "learned")
        lines = "".join(to_json(row) + "\n" for row in rows)
        write_atomic(folder / "completions.jsonl", lines)
        write_atomic(folder / "error.json", to_json({"step": step, "error": str(error)}, indent=1))
        self._save()

    def _finish(self, reason: str) -> dict[str, Any]:
        """Write artifact, summary and report with the best prompt."""
        parts = self.parts
        last = {k: v.clone() for k, v in parts.policy.prompt.state_dict().items()}
        if self.state.progress.best_reward is not None:
            parts.policy.prompt.load_state_dict(self.state.best)
        summary = build_summary(
            self.state.progress,
            parts.policy,
            artifact=self.output / "artifact",
            fingerprint_after=verify_unchanged(parts.policy.base),
            reason=reason,
        )
        summary["ranks"] = parts.ranks.each(lambda: rank_memory(parts.policy.base), "the summary")
        with ExitStack() as scratch:
            folder = self.output / "artifact"
            if not parts.ranks.is_first:
                folder = Path(scratch.enter_context(TemporaryDirectory())) / "artifact"
            # Every rank: describing a prompt runs the base, and a sharded one needs them all.
            self._save_artifact(folder, summary)
        if parts.ranks.is_first:
            write_atomic(self.output / "summary.json", to_json(summary, indent=2))
            write_report(self.output)
        parts.policy.prompt.load_state_dict(last)
        return summary

    def _save_artifact(self, folder: Path, summary: dict[str, Any]) -> None:
        parts = self.parts
        shown = ("heldout_reward_before", "heldout_reward_handwritten", "heldout_reward_after")
        save_artifact(
            folder,
            parts.policy,
            parts.policy.prompt,
            name=parts.name,
            recipe=parts.recipe,
            metrics={k: summary[k] for k in (*shown, "best_step", "steps")},
        )


def _step_seed(seed: int, step: int) -> int:
    """A seed of its own for every step, so that a resumed run draws what it would have drawn."""
    return (seed * 1_000_033 + step * 7919 + 1) % 2**63


def _times(
    batch: RolloutBatch, clock: PhaseClock, seconds: float, waited: float
) -> dict[str, float]:
    """Seconds of a step by phase; `time/other` is what no phase claims.

    A batch that was drawn ahead took none of this step; to wait for the next one counts as rollout.
    """
    drew = 0.0 if batch.drawn_ahead else 1.0
    phases = {
        "rollout": drew * batch.rollout_seconds + waited,
        "reward": drew * batch.reward_seconds,
        **clock.seconds,
    }
    times = {f"time/{name}": value for name, value in phases.items()}
    times["time/other"] = seconds - sum(phases.values())
    times["step_time"] = seconds
    return times
