"""What a run evaluates: baselines and start once, the learned prompt often, the test queries last.

Results go to the trackers, and into the run's `Progress`: metrics by who was evaluated, and what
each completion got, which the verdict needs.
"""

from __future__ import annotations

import logging
import math

from rlprompt.certify.succession import Challenge
from rlprompt.endpoints.ledger import BudgetSpentError
from rlprompt.evaluation.heldout import HeldoutEvaluator, HeldoutResult
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rollout.collect import completion_rows
from rlprompt.runs.interrupt import Stopped, StopRequest
from rlprompt.runs.parts import RunParts
from rlprompt.runs.selection import begin_succession, challenge_kept
from rlprompt.runs.standing import Tested, plain_scores
from rlprompt.runs.state import RunState

logger = logging.getLogger(__name__)


class Evaluations:
    """Evaluates prompts for one run.

    A stop signal ends an evaluation at once where this process is alone: it can be done again
    without loss. So does a budget that is spent. What was cut off is not recorded.
    """

    def __init__(self, parts: RunParts, state: RunState) -> None:
        """Keep the run's parts, and the state that is written to."""
        self._parts = parts
        self._state = state
        self.stop = StopRequest()
        """What notes stop signals."""
        self.is_over_budget = False
        """Whether an evaluation was cut off by the budget for endpoints."""

    def baselines(self) -> None:
        """Base, hand-written texts and the initial prompt, as far as they are not known yet."""
        evaluation, heldout = self._parts.evaluation, self._state.progress.heldout
        queries = self._parts.data.heldout[: evaluation.max_queries]
        steps = self._parts.settings.steps
        begin_succession(self._state.progress, evaluation, steps, len(queries))
        prompts: dict[str, Prompt] = {"base": NonePrompt()}
        if evaluation.handwritten is not None:
            prompts["handwritten"] = TextPrompt(evaluation.handwritten)
        for who, prompt in prompts.items():
            if who not in heldout:
                result = self._evaluated(self._parts.evaluator, prompt)
                if result is None:
                    return
                self._keep(who, result)
        if evaluation.texts and "best_text" not in heldout and not self._best_text():
            return
        self.learned()

    def learned(self, *, is_last: bool = False) -> None:
        """The prompt as it is now; it is kept where it is better than the one kept so far.

        Args:
            is_last: whether no step follows: then only a signal that comes within stops it.
        """
        progress, by = self._state.progress, self._parts.evaluation.select_by
        prompt = self._parts.learner.prompt
        result = self._evaluated(self._parts.evaluator, prompt, is_last=is_last)
        if result is None:
            return
        scores = plain_scores(result, by)
        challenge = challenge_kept(progress, scores) if progress.succession else None
        progress.evaluated_step = progress.step
        self._log("learned", result, test=challenge)
        self._parts.guards.observe(progress.step, result.flat, progress.guards, split="heldout")
        if progress.step == 0:
            progress.heldout["start"], progress.scores["start"] = dict(result.metrics), scores
        self._state.remember_best(
            result.value(by),
            result.metrics,
            scores,
            is_better=None if challenge is None else challenge.kept,
        )

    def test(self, evaluator: HeldoutEvaluator, prompt: Prompt) -> Tested | None:
        """Everything that is compared, on queries that chose nothing; None where it was cut off.

        Args:
            evaluator: the test queries.
            prompt: the learned prompt that was kept.
        """
        progress, evaluation = self._state.progress, self._parts.evaluation
        written = {"handwritten": evaluation.handwritten, "best_text": progress.best_text}
        prompts: dict[str, Prompt] = {"base": NonePrompt()}
        prompts |= {who: TextPrompt(text) for who, text in written.items() if text is not None}
        if not progress.kept_start:
            prompts["start"] = self._state.start_prompt()
        prompts["learned"] = prompt
        logger.info("testing %d prompts on queries that chose nothing", len(prompts))
        step = progress.step if progress.best_reward is None else progress.best_step
        # A run that goes on after its end meets the test queries again; its verdict allows for it.
        progress.tested_steps = sorted({*progress.tested_steps, step})
        tested = Tested(list(progress.tested_steps))
        for who, each in prompts.items():
            result = self._evaluated(evaluator, each)
            if result is None:
                return None
            tested.metrics[who] = result.metrics
            tested.scores[who] = plain_scores(result, evaluation.select_by)
            self._log(who, result, "test")
        return tested

    def _best_text(self) -> bool:
        """Evaluate the given texts and keep the best; False where it was stopped."""
        evaluation = self._parts.evaluation
        results: dict[str, HeldoutResult] = {}
        for place, text in enumerate(evaluation.texts):
            result = self._evaluated(self._parts.evaluator, TextPrompt(text))
            if result is None:
                return False
            results[text] = result
            self._log(f"text_{place}", result)
        values = {text: result.value(evaluation.select_by) for text, result in results.items()}
        best = max(values, key=lambda text: -math.inf if math.isnan(values[text]) else values[text])
        self._state.progress.best_text = best
        self._keep("best_text", results[best])
        return True

    def _evaluated(
        self, evaluator: HeldoutEvaluator, prompt: Prompt, *, is_last: bool = False
    ) -> HeldoutResult | None:
        """How a prompt does; None where a stop signal or the budget's end came before that."""
        step, ranks = self._state.progress.step, self._parts.ranks
        if ranks.agree(self.stop.reason) is not None and not is_last:
            return None
        if ranks.size > 1:  # one rank cannot leave while the others go on
            return evaluator.evaluate(prompt, step)
        try:
            with self.stop.at_once():
                return evaluator.evaluate(prompt, step)
        except Stopped:
            return None
        except BudgetSpentError as error:
            logger.warning("%s", error)
            self.is_over_budget = True
            return None

    def _keep(self, who: str, result: HeldoutResult) -> None:
        """Record the evaluation of a prompt that does not change."""
        progress = self._state.progress
        progress.heldout[who] = result.metrics
        progress.scores[who] = plain_scores(result, self._parts.evaluation.select_by)
        self._log(who, result)

    def _log(
        self,
        who: str,
        result: HeldoutResult,
        split: str = "heldout",
        test: Challenge | None = None,
    ) -> None:
        step, trackers = self._state.progress.step, self._parts.trackers
        trackers.log_completions(step, completion_rows(result.batch, split, who))
        marked: dict[str, object] = {"split": "test"} if split == "test" else {}
        if test is not None:
            marked |= {
                "accepted": test.accepted,
                "kept": test.kept,
                "against_step": test.against,
                "acceptance_level": test.level,
                "acceptance_p_value": test.p_value,
            }
        trackers.log_evaluation(step, who, {**result.metrics, **marked})
