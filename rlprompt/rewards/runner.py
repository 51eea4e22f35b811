"""Scores a batch with every reward of a recipe; how values become a total is in `combine`.

Sync rewards run one after another, then all async ones together.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlprompt.errors import InputError, first_error
from rlprompt.rewards.base import (
    GROUP_KEYWORD,
    RESERVED_KEYWORDS,
    FailureKind,
    LoadedReward,
    ReportedError,
    RewardBatch,
    RewardFailure,
    RewardSettings,
    RunPlan,
    TrainerState,
    UnknownTokens,
)
from rlprompt.rewards.combine import combine, costs, statistics
from rlprompt.rewards.normalise import Normaliser
from rlprompt.rewards.processes.execution import Call, Executor, Outcome, is_async
from rlprompt.rewards.validation import (
    InvalidValuesError,
    Row,
    Sink,
    describe_failure,
    mean,
    parse_values,
    select_keywords,
)
from rlprompt.types import Completion, Group

logger = logging.getLogger(__name__)

_DROPPED_COLUMNS = ("prompt", "completion")  # what TRL leaves out: it passes their plurals


class RewardRunner:
    """Calls the rewards of a recipe on batches; see the module for how values become a total.

    Args:
        rewards: rewards of the recipe, in the order of calls and logs.
        needs_score: whether one must have the role `score`; without one, totals are NaN.

    Raises:
        InputError: two rewards share a name, or none has the role `score` though one is needed.
    """

    def __init__(self, rewards: Sequence[LoadedReward], *, needs_score: bool = True) -> None:
        self._rewards = list(rewards)
        for name, count in Counter(each.name for each in self.settings).items():
            if count > 1:
                raise InputError(
                    f"{count} rewards are named '{name}'; give each its own name in the recipe"
                )
        if needs_score and not any(each.role == "score" for each in self.settings):
            raise InputError("no reward has role: score, so nothing can be learned; add one")
        self._executor = Executor()
        self._normaliser = Normaliser(self.settings)
        self.once: Callable[[Callable[[], RewardBatch]], RewardBatch] = lambda work: work()
        """How a batch is scored; ranks of one run score it on the first of them."""
        self.plan: RunPlan | None = None
        """What the run means to do, which rewards see in `trainer_state`; None outside a run."""

    @property
    def settings(self) -> list[RewardSettings]:
        """The settings of the rewards, in order."""
        return [reward.settings for reward in self._rewards]

    @property
    def cost_limits(self) -> dict[str, float]:
        """Per constraint: the mean that its `RewardBatch.costs` are held under."""
        return {
            each.name: each.limit if each.bound == "at_most" else -each.limit
            for each in self.settings
            if each.limit is not None
        }

    def training_rewards(self, batch: RewardBatch) -> Tensor:
        """What the completions of a training batch are worth to an algorithm, [B] float32.

        `batch.total`, unless a reward has `normalise`; then the same sum and gates over normalised
        values. Call it once per training batch and never for held-out ones: running statistics take
        the batch up.
        """
        if not self._normaliser.is_needed:
            return batch.total
        normal = self._normaliser.normalise(batch.values, batch.group_index)
        return combine(self.settings, batch.values | normal)

    def state_dict(self) -> dict[str, Tensor]:
        """Running statistics, float64; what resuming needs."""
        plain = self._normaliser.state_dict()
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in plain.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved state.

        Raises:
            InputError: it is of other rewards.
        """
        self._normaliser.load_state_dict({name: v.tolist() for name, v in state.items()})

    def score(self, groups: Sequence[Group], *, step: int) -> RewardBatch:
        """Score every completion of every group.

        A query's columns are repeated for each of its completions; a column that some queries of
        the batch lack is None there. Columns `prompt` and `completion` are left out, as in TRL.

        Args:
            groups: queries with their completions; B completions in all.
            step: updates made so far; rewards see it as `trainer_state.global_step`, with the rest
                of the state by `plan`.

        Returns:
            The scores in the order of the flattened groups.

        Raises:
            InputError: a column has a reserved name, a reward needs a column that is not there, a
                reward raised InputError itself, or a call failed under `on_error: raise` (it
                raised, took too long, or returned or logged something unusable).
        """
        return self.once(lambda: self._score(groups, step))

    def _score(self, groups: Sequence[Group], step: int) -> RewardBatch:
        rows = [Row(group.query, each) for group in groups for each in group.completions]
        columns: dict[str, Any] = dict(_columns(rows))
        index = tuple(i for i, group in enumerate(groups) for _ in group.completions)
        sinks = {each.name: Sink() for each in self.settings}
        values = {each.name: torch.full((len(rows),), torch.nan) for each in self.settings}  # [B]
        metrics: dict[str, float] = {}
        errors: list[RewardFailure] = []
        columns |= {"trainer_state": self._state(step), GROUP_KEYWORD: list(index)}
        for call, outcome in self._called(rows, columns, sinks):
            result = _evaluate(call, outcome, rows, sinks[call.name])
            if isinstance(result, RewardFailure):
                self._tolerate(result, outcome.error)
                errors.append(result)
                sinks[call.name] = Sink()
            else:
                values[call.name] = torch.tensor(result, dtype=torch.float32)
            metrics[f"rewards/{call.name}/seconds"] = outcome.seconds
            metrics[f"rewards/{call.name}/failures"] = float(isinstance(result, RewardFailure))
        metrics |= statistics(self.settings, values)
        logged = _logged_metrics(sinks)
        return RewardBatch(
            total=combine(self.settings, values) if values else torch.full((len(rows),), torch.nan),
            values=values,
            weights={each.name: each.weight for each in self.settings},
            roles={each.name: each.role for each in self.settings},
            extras=_merge_extras(sinks),
            metrics=metrics | logged,
            errors=errors,
            costs=costs(self.settings, values),
            group_index=index,
            logged=tuple(logged),
        )

    def bind_policy(self, policy: Any) -> bool:
        """Lend a run's policy to the rewards that may judge with its base under another prompt.

        Returns:
            Whether any does.
        """
        binds = [getattr(reward.function, "bind_policy", None) for reward in self._rewards]
        for bind in filter(callable, binds):
            bind(policy)
        return any(map(callable, binds))

    @property
    def judging_with_base(self) -> list[str]:
        """Names of rewards that judge with the base of a run, since they have no model."""
        functions = {each.settings.name: each.function for each in self._rewards}
        return [name for name, each in functions.items() if getattr(each, "needs_base", False)]

    @property
    def needs_all_ranks(self) -> bool:
        """Whether a reward can only score when all ranks of the run do: its model is in shards."""
        return any(getattr(each.function, "needs_all_ranks", False) for each in self._rewards)

    def close(self) -> None:
        """Stop idle worker threads and end worker processes; the runner stays usable."""
        self._executor.close()
        for reward in self._rewards:
            end = getattr(reward.function, "close", None)
            if callable(end):
                end()

    def _call(
        self, reward: LoadedReward, rows: Sequence[Row], columns: Mapping[str, Any], sink: Sink
    ) -> Call:
        # Fresh lists for every reward: one that changes its arguments must not change another's.
        available = {
            "prompts": [
                [dict(message) for message in query.messages]
                if query.conversational
                else query.text
                for query, _ in rows
            ],
            "completions": [
                [{"role": "assistant", "content": completion.text}]
                if query.conversational
                else completion.text
                for query, completion in rows
            ],
            "completion_ids": [_token_ids(completion) for _, completion in rows],
            **{
                key: list(column) if isinstance(column, list) else copy.deepcopy(column)
                for key, column in columns.items()
            },
            "log_extra": sink.log_extra,
            "log_metric": sink.log_metric,
        }
        settings, function = reward.settings, reward.function
        kwargs = select_keywords(settings.name, function, available)
        timeout = settings.timeout
        if timeout is not None:
            timeout += getattr(function, "backstop", 0.0)
        return Call(settings.name, function, kwargs, timeout)

    def _state(self, step: int) -> TrainerState:
        if self.plan is None:
            return TrainerState(global_step=step, max_steps=max(1, step))
        return self.plan.at(step)

    def _called(
        self, rows: Sequence[Row], columns: Mapping[str, Any], sinks: dict[str, Sink]
    ) -> list[tuple[Call, Outcome]]:
        """Call every reward on a batch, and those that need a main thread again where there is one.

        Args:
            rows: the completions; nothing is called for none.
            columns: the keywords beside the batch itself.
            sinks: the sink of each reward; a second call gets a new one.
        """
        if not rows:
            return []
        calls = [
            self._call(reward, rows, columns, sinks[reward.settings.name])
            for reward in self._rewards
        ]
        done = self._run(calls)
        for place, (call, outcome) in enumerate(done):
            if outcome.asked_for:
                self._rewards[place] = _with_main_thread(self._rewards[place], outcome.asked_for)
                sinks[call.name] = Sink()
                again = self._call(self._rewards[place], rows, columns, sinks[call.name])
                done[place] = self._run([again])[0]
        return done

    def _run(self, calls: Sequence[Call]) -> list[tuple[Call, Outcome]]:
        waiting = [call for call in calls if is_async(call.function)]
        outcomes = {
            call.name: self._executor.run_sync(call)
            for call in calls
            if not is_async(call.function)
        }
        if waiting:
            awaited = self._executor.run_async(waiting)
            outcomes |= {call.name: each for call, each in zip(waiting, awaited, strict=True)}
        return [(call, outcomes[call.name]) for call in calls]

    def _tolerate(self, failure: RewardFailure, cause: BaseException | None) -> None:
        policy = {each.name: each.on_error for each in self.settings}
        if policy[failure.name] == "raise":
            raise InputError(failure.message) from cause
        logger.warning("skipped for this batch (on_error: skip): %s", failure.message)


def _with_main_thread(reward: LoadedReward, asked_for: str) -> LoadedReward:
    """A reward that asked for what only a main thread has, where there is one.

    That is a process of its own, or else the calling thread, where no deadline can be held.

    Raises:
        InputError: there is neither.
    """
    name, timeout = reward.settings.name, reward.settings.timeout
    needs = f"reward '{name}' calls {asked_for}, which needs a main thread"
    if reward.isolate is not None:
        logger.warning("%s: from now on it runs in a process of its own (isolation)", needs)
        return LoadedReward(reward.settings, reward.isolate())
    is_main = threading.current_thread() is threading.main_thread()
    if timeout is None or not is_main or is_async(reward.function):
        raise InputError(
            f"{needs}, and it is scored in another; write it into a file of its own as a plain "
            "function, and name it as path/file.py:object"
        )
    logger.warning(
        "%s: from now on it runs in the run's own, where its timeout of %g s is not held",
        needs,
        timeout,
    )
    return LoadedReward(reward.settings.model_copy(update={"timeout": None}), reward.function)


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns of the queries, each repeated per completion: name -> [B]."""
    names = dict.fromkeys(name for query, _ in rows for name in query.columns)
    for name in names:
        if name in RESERVED_KEYWORDS:
            raise InputError(
                f"the dataset column '{name}' has the name of a keyword that rewards are called "
                f"with; rename the column"
            )
    return {
        name: [query.columns.get(name) for query, _ in rows]
        for name in names
        if name not in _DROPPED_COLUMNS
    }


def _evaluate(
    call: Call, outcome: Outcome, rows: Sequence[Row], sink: Sink
) -> list[float] | RewardFailure:
    error = None if outcome.error is None else first_error(outcome.error)
    if isinstance(error, InputError):  # a wrong input is the user's to mend, not to skip
        raise InputError(f"reward '{call.name}': {error}") from error
    if outcome.timed_out or outcome.error is not None:
        message = describe_failure(call, outcome, rows)
        kind: FailureKind = "timeout" if outcome.timed_out else "exception"
        if isinstance(error, ReportedError):
            kind = error.kind
        return RewardFailure(call.name, kind, message)
    try:
        sink.close()
        values = parse_values(outcome.output, rows)
        sink.check(len(rows))
    except InvalidValuesError as error:
        return RewardFailure(call.name, "values", f"reward '{call.name}' {error}")
    return values


def _logged_metrics(sinks: Mapping[str, Sink]) -> dict[str, float]:
    collected: dict[str, list[float]] = {}
    for sink in sinks.values():
        for name, numbers in sink.numbers().items():
            collected.setdefault(name, []).extend(numbers)
    return {name: mean(numbers) for name, numbers in collected.items()}


def _token_ids(completion: Completion) -> Sequence[int]:
    """The tokens of a completion; where they are not known, what refuses to be taken for some."""
    return list(completion.token_ids) if completion.counted is None else UnknownTokens()


def _merge_extras(sinks: Mapping[str, Sink]) -> dict[str, list[Any]]:
    """Columns by name; one that several rewards log is named `reward.column` after the first."""
    extras: dict[str, list[Any]] = {}
    for reward, sink in sinks.items():
        for column, logged in sink.extras.items():
            name = column
            while name in extras:
                name = f"{reward}.{name}"
            extras[name] = logged
    return extras
