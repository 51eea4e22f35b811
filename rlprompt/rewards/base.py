"""The contract of a reward, and what scoring a batch gives back.

A reward is any TRL reward function, unchanged (checked against TRL 1.16): a callable that is called
with keywords only and returns one float or None per completion.

    prompts         the queries: lists of messages, or strings when the dataset rows were strings
    completions     the same shape: `[{"role": "assistant", "content": text}]`, or strings
    completion_ids  lists of token ids, the stop token included; `UnknownTokens` for a model that is
                    elsewhere
    **columns       every extra dataset column, one value per completion
    trainer_state   a `TrainerState`
    log_extra       `log_extra(column, values)`: one value per completion, for completions.jsonl
    log_metric      `log_metric(name, value)`: one number per batch
    group_index     ours, and handed only to a reward that names it: for each completion the number
                    of its group, so that a reward can compare the completions of one query

A function without `**kwargs` is handed only the keywords that it names. It may be a coroutine
function. None means "cannot be scored". What TRL calls a prompt is our query: it holds no system
turn, because that place is the learned prompt's.

Letters: B completions, flattened group by group.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rlprompt.errors import InputError
from rlprompt.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

RewardFunction = Callable[..., Any]
"""A TRL reward function, or a coroutine function of the same signature."""

Role = Literal["score", "gate", "constraint", "metric"]
Adapter = Literal["trl", "verl", "openrlhf", "verifiers", "dspy"]
Bound = Literal["at_most", "at_least"]
Normalise = Literal["none", "group", "batch", "running"]

BATCH_KEYWORDS = ("prompts", "completions", "completion_ids")
GROUP_KEYWORD = "group_index"
RESERVED_KEYWORDS = (
    *BATCH_KEYWORDS,
    "trainer_state",
    "log_extra",
    "log_metric",
    GROUP_KEYWORD,
)
"""Keywords a reward is called with; no dataset column and no option may carry these names."""

GATE_THRESHOLD = 0.5
"""A gate vetoes a completion whose value lies below this."""


class UnknownTokens(Sequence[int]):
    """What stands in `completion_ids` for a completion whose tokens are not known.

    A model behind an endpoint gives text. A reward that takes the keyword without using it works;
    one that looks at the tokens is told that there are none to be had.
    """

    def __len__(self) -> int:
        raise self._refusal()

    def __iter__(self) -> Iterator[int]:
        raise self._refusal()

    def __getitem__(self, index: Any) -> Any:
        raise self._refusal()

    def __repr__(self) -> str:
        return "UnknownTokens()"

    @staticmethod
    def _refusal() -> InputError:
        return InputError(
            "the tokens of completions are not known, since their model is behind an endpoint; "
            "let the reward use their text, such as words in place of tokens"
        )


_OWN_ROLE: dict[str, Role] = {
    "gate_floor": "gate",
    "limit": "constraint",
    "bound": "constraint",
    "normalise": "score",
}
"""Settings that only one role reads."""

_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


class IsolationSettings(Settings):
    """A worker process for one reward, which it may crash or hang without harm to the run."""

    memory_gb: float | None = Field(default=4.0, gt=0)
    """GiB that the reward may allocate beyond what its process holds once it is loaded (Linux);
    null = no limit."""
    start_timeout: float = Field(default=120.0, gt=0)
    """Seconds in which the process must have loaded the reward."""


class RewardSettings(Settings):
    """One reward of a recipe: where its code is, and what its values are used for."""

    path: str
    """`path/file.py:object` (relative to the recipe's folder, then to the working directory), or
    `path/file.py` for its object `reward`, or for the only reward in it;
    `package.module:object` or `package.module.object`, `builtin:NAME`, or `trl:NAME` for a reward
    that TRL ships."""
    adapter: Adapter = "trl"
    """Whose signature the function has: TRL's, verl's `compute_score(data_source, solution_str,
    ground_truth, extra_info)`, OpenRLHF's `reward_func(queries, prompts, labels)`, a `verifiers`
    rubric or one of its functions, or DSPy's `metric(example, pred, trace=None)`, GEPA's with
    feedback too. See `rlprompt.rewards.foreign.signatures`."""
    name: str = ""
    """Name in logs and metrics; by default the built-in's name, the object's name, or the file's
    name when the object is called `reward`."""
    weight: float = 1.0
    """Factor of this reward in the weighted sum; only for the role `score`."""
    role: Role = "score"
    """`score` enters the weighted sum; `gate` vetoes a completion when its value is below 0.5;
    `constraint` is held under a limit by a learned multiplier, which the algorithm must offer;
    `metric` is logged and never trained on."""
    gate_floor: float = -1.0
    """For the role `gate`: a vetoed completion's total is lowered to this value (and left alone
    when it is lower already). Choose a value below what an honest bad answer gets."""
    limit: float | None = None
    """For the role `constraint`, and needed there: what the mean value is held to."""
    bound: Bound = "at_most"
    """For the role `constraint`: the mean value must be `at_most` or `at_least` the limit."""
    normalise: Normalise = "none"
    """For the role `score`: before weighting, subtract the mean and divide by the standard
    deviation of the completion's `group`, of the `batch`, or of all values so far (`running`), so
    that rewards of different scales can be weighed against each other. Applies to what is trained
    on; `reward` in logs and held-out evaluation stays the plain weighted sum."""
    timeout: float | None = Field(default=60.0, gt=0)
    """Seconds that one call on a batch may take; null waits for ever."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a failed call does: `raise` stops the run; `skip` leaves this reward out of the batch,
    counts it in `rewards/{name}/failures` and logs a warning."""
    ranks: Literal["auto", "all", "first"] = "auto"
    """Who calls it where several ranks share a run. `all`: each rank, with whole groups of its own.
    `first`: the first rank alone loads it and calls it, with the whole batch, which a reward needs
    that compares across queries, holds a licence or keeps to a rate. `auto`: `all`, but `first` for
    a reward that says so (`on_first_rank = True` on the function or class), as those do that ask a
    server."""
    isolation: IsolationSettings | None = None
    """Run it in a worker process of its own (`{}` for the defaults): one that hangs, crashes or
    takes too much memory then costs one batch, see `on_error`; null = in the run's own process."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments: for the constructor of a class, for a function that makes a reward, or
    bound to the reward function itself."""

    @model_validator(mode="before")
    @classmethod
    def _derive_name(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("name") and isinstance(data.get("path"), str):
            return {**data, "name": default_name(data["path"])}
        return data

    @model_validator(mode="after")
    def _reject_settings_without_effect(self) -> RewardSettings:
        if not _NAME.fullmatch(self.name):
            raise InputError(
                f"reward name {self.name!r} must consist of letters, digits, '_', '-' and '.', "
                f"because metrics are named after it; set another name"
            )
        if self.role == "score" and self.weight == 0.0:
            raise InputError(
                f"reward '{self.name}' has weight 0 and so no effect; set role: metric to watch it"
            )
        if self.role != "score" and self.weight != 1.0:
            raise InputError(
                f"reward '{self.name}' has role '{self.role}', where a weight has no effect; "
                f"remove the weight or set role: score"
            )
        if self.role == "constraint" and self.limit is None:
            raise InputError(
                f"reward '{self.name}' has role 'constraint' and no limit; set limit, and bound: "
                f"at_most or at_least"
            )
        for key, role in _OWN_ROLE.items():
            if self.role != role and getattr(self, key) != type(self).model_fields[key].default:
                raise InputError(
                    f"reward '{self.name}' has role '{self.role}', where {key} has no effect; "
                    f"remove it or set role: {role}"
                )
        return self


@dataclass(frozen=True)
class LoadedReward:
    """A reward of a recipe, ready to be called."""

    settings: RewardSettings
    function: RewardFunction
    isolate: Callable[[], RewardFunction] | None = None
    """Makes the same reward in a process of its own, should it need a main thread; None where that
    cannot be: the object exists in this process only."""


def default_name(path: str) -> str:
    """The name of a reward that the recipe does not name, from its path alone."""
    if path.endswith(".py"):  # the reward of that file, whatever it is called
        path = f"{path}:reward"
    location, colon, attribute = path.removesuffix(".py").rpartition(":")
    if not colon:
        location, _, attribute = attribute.rpartition(".")
    if attribute == "reward" and location:
        attribute = re.split(r"[./\\]", location.removesuffix(".py"))[-1]
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", attribute.rpartition(".")[2]) or "reward"


@dataclass
class TrainerState:
    """What a reward may know of the run: the fields of the state that TRL hands on.

    Those are the fields of `transformers.TrainerState`. What is told by other means here is always
    empty, as it is in TRL's at the first step: scores are in the run's `metrics.jsonl`, and the
    best prompt in its artifact.
    """

    global_step: int
    """Updates of the prompt made so far."""
    max_steps: int = 1
    """Updates of the whole run. Outside a run: as many as were made, and at least 1."""
    epoch: float = 0.0
    """How often the training queries have been drawn, with the fraction of the present pass, where
    every step draws once."""
    num_train_epochs: int = 1
    """Passes over the training queries that the run begins."""
    train_batch_size: int | None = None
    """Completions of a training step."""
    logging_steps: int = 1
    """Steps between two rows of `metrics.jsonl`."""
    eval_steps: int = 1
    """Steps between two held-out evaluations."""
    save_steps: int = 1
    """Steps between two checkpoints."""
    num_input_tokens_seen: int = 0
    """Always 0: not counted before the rewards are called."""
    total_flos: float = 0.0
    """Always 0: not counted."""
    log_history: list[dict[str, float]] = field(default_factory=list)
    """Always empty."""
    best_metric: float | None = None
    """Always None."""
    best_global_step: int | None = None
    """Always None."""
    best_model_checkpoint: str | None = None
    """Always None."""
    is_local_process_zero: bool = True
    """Whether this is the first rank of its node."""
    is_world_process_zero: bool = True
    """Whether this is the first rank of all, which alone calls rewards with `ranks: first`."""
    is_hyper_param_search: bool = False
    """Always False."""
    trial_name: str | None = None
    """Always None."""
    trial_params: dict[str, str | float | int | bool] | None = None
    """Always None."""
    stateful_callbacks: dict[str, Any] = field(default_factory=dict)
    """Always empty."""


@dataclass(frozen=True)
class RunPlan:
    """What a run means to do, for the state that rewards see."""

    steps: int
    """Updates of the whole run."""
    num_queries: int
    """Training queries."""
    queries_per_step: int
    """Queries of a step."""
    completions_per_step: int
    """Completions of a step."""
    eval_steps: int
    """Steps between two held-out evaluations."""
    save_steps: int
    """Steps between two checkpoints."""

    def at(self, step: int) -> TrainerState:
        """The state after so many updates."""
        per_step = self.queries_per_step / max(1, self.num_queries)
        return TrainerState(
            global_step=step,
            max_steps=self.steps,
            epoch=step * per_step,
            num_train_epochs=math.ceil(self.steps * per_step),
            train_batch_size=self.completions_per_step,
            eval_steps=self.eval_steps,
            save_steps=self.save_steps,
        )


FailureKind = Literal["exception", "timeout", "values"]


class ReportedError(Exception):
    """A failure whose message goes on a sentence that begins with the reward's name.

    Args:
        message: the rest of the sentence, such as `raised ValueError: no number at reward.py:3`.
        advice: what to do about it; empty when the message says so itself.
        kind: the kind, see `RewardFailure.kind`.
    """

    def __init__(self, message: str, advice: str = "", kind: FailureKind = "exception") -> None:
        super().__init__(message)
        self.advice = advice
        self.kind: FailureKind = kind


@dataclass(frozen=True)
class RewardFailure:
    """One call that failed under `on_error: skip`."""

    name: str
    """The reward's name."""
    kind: FailureKind
    """It raised, it took too long, or what it returned or logged is not usable."""
    message: str
    """The sentence that `on_error: raise` would have stopped the run with."""


@dataclass(frozen=True)
class RewardBatch:
    """The scores of a batch of B completions, in the order of the flattened groups."""

    total: Tensor
    """[B] float32: weighted sum of the `score` rewards after the gates; NaN where none scored. What
    an algorithm trains on is `RewardRunner.training_rewards` of the batch."""
    values: dict[str, Tensor]
    """Per reward [B] float32, unweighted; NaN where it returned None."""
    weights: dict[str, float]
    """Per reward: its weight (1.0 for gates and metrics)."""
    roles: dict[str, Role]
    """Per reward: its role."""
    extras: dict[str, list[Any]]
    """Columns logged with `log_extra`, B values each."""
    metrics: dict[str, float]
    """`rewards/{name}/...` and what was logged with `log_metric`; a mean over no values is left
    out, never NaN. A name that the run itself uses is logged below `logged/`."""
    errors: list[RewardFailure]
    """The calls that failed under `on_error: skip`."""
    costs: dict[str, Tensor] = field(default_factory=dict)
    """Per constraint [B] float32: its values, negated where the bound is `at_least`, so that their
    mean must stay at or below `RewardRunner.cost_limits`."""
    group_index: tuple[int, ...] = ()
    """B numbers: the group that each completion belongs to."""
    logged: tuple[str, ...] = ()
    """Those of `metrics` that rewards have logged."""


@dataclass(frozen=True)
class Example:
    """A completion that a reward's author has judged; `EXAMPLES` in a reward's module lists them.

    For each query (and its columns and options) every good example must score above every bad one,
    and each must lie in [low, high].
    """

    query: str
    completion: str
    good: bool
    """True for what a person would accept; False for bad answers and for hacks of the reward."""
    low: float = 0.0
    high: float = 1.0
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Dataset columns of this row."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the reward is built with."""
