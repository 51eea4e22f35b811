"""Scores a batch with every reward of a recipe; how values become a total is in `combine`.

Sync rewards run one after another, then all async ones together.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlprompt.errors import InputError, first_error
from rlprompt.random_state import global_random_state
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
from rlprompt.rewards.sharing import (
    OneRank,
    Part,
    RankGroup,
    Way,
    group_rows,
    joined,
    wants_first_rank,
)
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
        self._ranks: RankGroup = OneRank()
        self._base_is_shared = False
        self._warned: set[str] = set()
        self.plan: RunPlan | None = None
        """What the run means to do, which rewards see in `trainer_state`; None outside a run."""

    def spread(self, ranks: RankGroup, *, base_is_shared: bool = False) -> None:
        """Score every batch from now on among ranks; each then calls `score` with the same groups.

        Args:
            ranks: the ranks.
            base_is_shared: whether each holds a part of the base, so that a reward that judges with
                it can only do so on all of them together.

        Raises:
            InputError: a reward is to be called on the first rank alone, and needs them all.
        """
        self._ranks, self._base_is_shared = ranks, base_is_shared
        for reward in self._rewards:
            if reward.settings.ranks != "auto" and self._way(reward) == "together":
                raise InputError(
                    f"reward '{reward.settings.name}' has ranks: {reward.settings.ranks}, but its "
                    "model is in shards, with which all ranks score the whole batch together; "
                    "remove ranks"
                )

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
        rows = [Row(group.query, each) for group in groups for each in group.completions]
        index = [i for i, group in enumerate(groups) for _ in group.completions]
        columns: dict[str, Any] = dict(_columns(rows))
        columns |= {"trainer_state": self._state(step), GROUP_KEYWORD: index}
        values = {each.name: torch.full((len(rows),), torch.nan) for each in self.settings}  # [B]
        metrics: dict[str, float] = {}
        errors: list[RewardFailure] = []
        parts = self._parts(_Scored(rows, columns), len(groups))
        for name, part in parts.items():
            has_failed = isinstance(part.values, RewardFailure)
            if isinstance(part.values, RewardFailure):
                errors.append(part.values)
                logger.warning("skipped for this batch (on_error: skip): %s", part.values.message)
            else:
                values[name] = torch.tensor(part.values, dtype=torch.float32)
            metrics[f"rewards/{name}/seconds"] = part.seconds
            metrics[f"rewards/{name}/failures"] = float(has_failed)
        metrics |= statistics(self.settings, values)
        logged = _logged_metrics(parts)
        return RewardBatch(
            total=combine(self.settings, values) if values else torch.full((len(rows),), torch.nan),
            values=values,
            weights={each.name: each.weight for each in self.settings},
            roles={each.name: each.role for each in self.settings},
            extras=_merge_extras(parts),
            metrics=metrics | logged,
            errors=errors,
            costs=costs(self.settings, values),
            group_index=tuple(index),
            logged=tuple(logged),
        )

    def _parts(self, batch: _Scored, num_groups: int) -> dict[str, Part]:
        """What every reward gave for the batch, in the order of the rewards; nothing for none.

        Whatever ends the scoring on one rank ends it on all of them, and before a reward that needs
        them all is called.
        """
        ranks, ways = self._ranks, {each.settings.name: self._way(each) for each in self._rewards}
        if ranks.size == 1:
            return self._called(dict.fromkeys(ways, batch))
        mine = batch.part(group_rows(batch.columns[GROUP_KEYWORD], ranks.share(num_groups)))
        given = {"all": mine} | ({"first": batch} if ranks.rank == 0 else {})
        own = {name: given[way] for name, way in ways.items() if way in given}
        together = {name: batch for name, way in ways.items() if way == "together"}
        parts: dict[str, list[Part]] = {name: [] for name in ways}
        if len(together) < len(ways):
            for told in ranks.each(lambda: self._told(own), "the rewards"):
                for name, part in told.items():
                    parts[name].append(part)
        if together:
            told, *_ = ranks.each(lambda: self._told(together), "the rewards")
            parts |= {name: [part] for name, part in told.items()}
        return {name: joined(found) for name, found in parts.items() if found}

    def _told(self, own: Mapping[str, _Scored]) -> dict[str, Part]:
        """What this rank's rewards gave; failures say which rank it was."""
        where = f"on rank {self._ranks.rank} of {self._ranks.size}"
        try:
            parts = self._called(own)
        except InputError as error:
            raise InputError(f"{error} ({where})") from error
        for name, part in parts.items():
            if isinstance(part.values, RewardFailure):
                failure = replace(part.values, message=f"{part.values.message} ({where})")
                parts[name] = replace(part, values=failure)
        return parts

    def _way(self, reward: LoadedReward) -> Way:
        """How ranks call it."""
        function = reward.function
        judges = getattr(function, "needs_base", callable(getattr(function, "bind_policy", None)))
        if getattr(function, "needs_all_ranks", False) or (judges and self._base_is_shared):
            return "together"
        if reward.settings.ranks != "auto":
            return reward.settings.ranks
        return "first" if wants_first_rank(function) else "all"

    def bind_policy(self, policy: Any) -> None:
        """Lend a run's policy to the rewards that may judge with its base under another prompt."""
        binds = [getattr(reward.function, "bind_policy", None) for reward in self._rewards]
        for bind in filter(callable, binds):
            bind(policy)

    @property
    def judging_with_base(self) -> list[str]:
        """Names of rewards that judge with the base of a run, since they have no model."""
        functions = {each.settings.name: each.function for each in self._rewards}
        return [name for name, each in functions.items() if getattr(each, "needs_base", False)]

    def close(self) -> None:
        """Stop idle worker threads and end worker processes; the runner stays usable."""
        self._executor.close()
        for reward in self._rewards:
            end = getattr(reward.function, "close", None)
            if callable(end):
                end()

    def _call(self, reward: LoadedReward, batch: _Scored, sink: Sink) -> Call:
        rows, columns = batch.rows, batch.columns
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
            state = TrainerState(global_step=step, max_steps=max(1, step))
        else:
            state = self.plan.at(step)
        state.is_world_process_zero = self._ranks.rank == 0
        state.is_local_process_zero = self._ranks.local_rank == 0
        return state

    def _called(self, given: Mapping[str, _Scored]) -> dict[str, Part]:
        """Call rewards, and those that need a main thread again where there is one.

        Args:
            given: completions for each reward to score, by name; nothing is called for none.

        Raises:
            InputError: see `score`.
        """
        chosen = {
            place: given[reward.settings.name]
            for place, reward in enumerate(self._rewards)
            if reward.settings.name in given and given[reward.settings.name].rows
        }
        sinks = {place: Sink() for place in chosen}
        calls = [
            self._call(self._rewards[place], batch, sinks[place]) for place, batch in chosen.items()
        ]
        done = dict(zip(chosen, self._run(calls), strict=True))
        for place, (_, outcome) in done.items():
            if outcome.asked_for:
                self._rewards[place] = _with_main_thread(self._rewards[place], outcome.asked_for)
                sinks[place] = Sink()
                again = self._call(self._rewards[place], chosen[place], sinks[place])
                done[place] = self._run([again])[0]
        return {
            call.name: self._part(place, call, outcome, chosen[place].rows, sinks[place])
            for place, (call, outcome) in done.items()
        }

    def _part(
        self, place: int, call: Call, outcome: Outcome, rows: Sequence[Row], sink: Sink
    ) -> Part:
        """What came of a call.

        Raises:
            InputError: it failed under `on_error: raise`, or was the user's mistake.
        """
        result = _evaluate(call, outcome, rows, sink)
        if not isinstance(result, RewardFailure):
            return Part(len(rows), result, outcome.seconds, sink.extras, sink.numbers())
        if self._rewards[place].settings.on_error == "raise":
            raise InputError(result.message) from outcome.error
        return Part(len(rows), result, outcome.seconds)

    def _run(self, calls: Sequence[Call]) -> list[tuple[Call, Outcome]]:
        waiting = [call for call in calls if is_async(call.function)]
        outcomes: dict[str, Outcome] = {}
        for call in calls:
            if not is_async(call.function):
                with self._noticing_draws([call]):
                    outcomes[call.name] = self._executor.run_sync(call)
        if waiting:
            with self._noticing_draws(waiting):
                awaited = self._executor.run_async(waiting)
            outcomes |= {call.name: each for call, each in zip(waiting, awaited, strict=True)}
        return [(call, outcomes[call.name]) for call in calls]

    @contextmanager
    def _noticing_draws(self, calls: Sequence[Call]) -> Iterator[None]:
        """Say once that a reward draws at random where ranks divide the draws of one generator."""
        ways = {each.settings.name: self._way(each) for each in self._rewards}
        names = ", ".join(f"'{call.name}'" for call in calls if ways[call.name] == "all")
        if self._ranks.size == 1 or not names or names in self._warned:
            yield
            return
        before = _process_wide_state()
        yield
        if _process_wide_state() != before:
            self._warned.add(names)
            logger.warning(
                "reward %s draws from a generator of the whole process, so with several ranks its "
                "values are not those of one rank, and a resumed run draws others; set ranks: "
                "first, or draw from a generator of its own, seeded by the completion",
                names,
            )


@dataclass(frozen=True)
class _Scored:
    """Completions to score."""

    rows: Sequence[Row]
    columns: Mapping[str, Any]
    """Keywords beside the batch itself; lists hold one value per completion."""

    def part(self, rows: slice) -> _Scored:
        """Some of them."""
        columns = {
            name: column[rows] if isinstance(column, list) else column
            for name, column in self.columns.items()
        }
        return _Scored(self.rows[rows], columns)


def _process_wide_state() -> tuple[Any, ...]:
    """What tells whether something was drawn from Python's, NumPy's or torch's own generator."""
    tensors, plain = global_random_state()
    return (*(bytes(each.numpy().tobytes()) for each in tensors.values()), plain)


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


def _logged_metrics(parts: Mapping[str, Part]) -> dict[str, float]:
    collected: dict[str, list[float]] = {}
    for part in parts.values():
        for name, numbers in part.numbers.items():
            collected.setdefault(name, []).extend(numbers)
    return {name: mean(numbers) for name, numbers in collected.items()}


def _token_ids(completion: Completion) -> Sequence[int]:
    """The tokens of a completion; where they are not known, what refuses to be taken for some."""
    return list(completion.token_ids) if completion.counted is None else UnknownTokens()


def _merge_extras(parts: Mapping[str, Part]) -> dict[str, list[Any]]:
    """Columns by name; one that several rewards log is named `reward.column` after the first."""
    extras: dict[str, list[Any]] = {}
    for reward, part in parts.items():
        for column, logged in part.extras.items():
            name = column
            while name in extras:
                name = f"{reward}.{name}"
            extras[name] = logged
    return extras
