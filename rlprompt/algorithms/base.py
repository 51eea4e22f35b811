"""What an algorithm is: a source of samples and a per-token signal.

The loop is blind to it. It draws batches from the source that the algorithm names, scores them as
far as the algorithm needs before the first update, asks once for the `Signal` of the batch and then
for the token losses of each micro-batch; what it minimises is the weighted sum of their parts.

Letters: B completions, b rows of a micro-batch, T tokens, M = all tokens of a micro-batch behind
each other, d model width. Masks: True = the position counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from rlprompt.algorithms.advantages import groups_with_spread
from rlprompt.policy import Policy, TokenScores
from rlprompt.settings import ChosenSettings

Need = Literal["old_logprobs", "ref_logprobs", "values", "teacher_states"]
"""What a batch must be scored with before its first update."""


class AlgorithmSettings(ChosenSettings):
    """What every algorithm can be told, and what its settings answer before anything is built."""

    num_epochs: int = Field(default=1, ge=1)
    """Passes over each batch."""
    num_minibatches: int = Field(default=1, ge=1)
    """Updates per pass, each on its share of the queries; never more than there are queries."""

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """Columns of the dataset that hold given completions; empty when they are drawn."""
        return ()

    @property
    def teacher_text(self) -> str | None:
        """The system text of the teacher; None without one."""
        return None

    @property
    def draws_from_teacher(self) -> bool:
        """Whether completions are drawn under the teacher's text, not under the prompt."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the recipe's `reference` has an effect."""
        return False

    @property
    def needs_rewards(self) -> bool:
        """Whether it learns from rewards; other algorithms only evaluate with them."""
        return True

    @property
    def has_ratio(self) -> bool:
        """Whether its loss has a probability ratio, which corrects for batches drawn earlier."""
        return False

    def check_ratio(self, *, prefetched: bool) -> None:
        """Refuse settings of the probability ratio where it is always 1.

        Args:
            prefetched: whether batches are drawn before the last update of the prompt.

        Raises:
            ValueError: one is not at its default; the sentence names its place in a recipe.
        """


@dataclass(frozen=True)
class BatchView:
    """All that an algorithm may know of a batch before its first update.

    The rows of a group stand beside each other. What was not asked for in `Algorithm.needs` is
    None.
    """

    rewards: Tensor
    """[B] float32; NaN = not scored."""
    lengths: Tensor
    """int64 [B]."""
    terminated: Tensor
    """bool [B], False for completions cut at the token limit."""
    group_size: int
    """Rows per query; B is a multiple of it."""
    old_logprobs: Tensor | None = None
    """[B, T] under the prompt before the first update, 0 in the padding."""
    ref_logprobs: Tensor | None = None
    """[B, T] under the reference."""
    values: Tensor | None = None
    """[B, T] what the algorithm's value head says of the states that the tokens were drawn from."""

    @property
    def mask(self) -> Tensor:
        """Bool [B, T], T the longest completion."""
        place = torch.arange(int(self.lengths.max()), device=self.lengths.device)
        return place[None] < self.lengths[:, None]


@dataclass(frozen=True)
class Signal:
    """What each completion of a batch is worth to the loss."""

    advantages: Tensor
    """[B] or [B, T] float32."""
    counted_lengths: Tensor
    """int64 [B]: tokens that take part in the loss; 0 leaves a completion out."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the batch, by their logged names."""
    returns: Tensor | None = None
    """[B, T]: what values are regressed to."""

    @property
    def row_advantages(self) -> Tensor:
        """[B]: the mean over the tokens of each completion."""
        if self.advantages.dim() == 1:
            return self.advantages
        return self.advantages.sum(1) / self.counted_lengths.clamp_min(1)


class Importance(NamedTuple):
    """What corrects a loss for tokens that another program drew, which rounds in its own way."""

    sampling_logprobs: Tensor
    """[b, T] as it gave them, 0 in the padding."""
    cap: float
    """The largest weight."""


@dataclass(frozen=True)
class MicroSignal:
    """The rows of a micro-batch; groups are whole where the algorithm asks for `whole_groups`."""

    advantages: Tensor
    """[b, 1] or [b, T]."""
    weights: Tensor
    """[b, T]: what each token counts for; 0 in the padding."""
    old_logprobs: Tensor | None
    """[b, T] what the probability ratio is taken against: of a batch that was drawn ahead, those it
    was drawn with; else those before the first update, None in that update, where they are the
    current ones, unless the algorithm needs them."""
    ref_logprobs: Tensor | None
    """[b, T] under the reference; None when the algorithm needs none."""
    old_values: Tensor | None = None
    """[b, T] values before the first update."""
    returns: Tensor | None = None
    """[b, T] `Signal.returns`."""
    teacher_states: Tensor | None = None
    """[M, d] the teacher's final hidden states, beside `TokenScores.states`."""
    row_weights: Tensor | None = None
    """[b]: what a robust objective makes of the row's query, 1 on average; None = all 1. Contained
    in `weights`; for losses that are not sums over tokens."""
    importance: Importance | None = None
    """What a policy gradient is corrected by where tokens were drawn elsewhere; None = by nothing,
    since the same numbers drew them, or the ratio is taken against what drew them already."""


@dataclass(frozen=True)
class TokenLosses:
    """Parts of the loss, each already weighted and summed: scalars that carry gradients."""

    rl: Tensor | None = None
    """Policy gradient, or a preference loss."""
    kl: Tensor | None = None
    """Distance to the reference or the teacher."""
    ce: Tensor | None = None
    """Cross-entropy to targets, and the (negative) entropy bonus."""
    value: Tensor | None = None
    """Value regression."""
    metrics: Mapping[str, Tensor] | None = None
    """Per token, [b, T], without gradient; logged as means over the tokens of the batch that have a
    weight."""
    row_metrics: Mapping[str, Tensor] | None = None
    """Per completion, [b], without gradient; logged as means over the completions that have a
    weight."""

    def total(self) -> Tensor:
        """The scalar to differentiate.

        Raises:
            ValueError: no part is set.
        """
        parts = [part for part in (self.rl, self.kl, self.ce, self.value) if part is not None]
        if not parts:
            raise ValueError("an algorithm returned no loss")
        return sum(parts[1:], start=parts[0])


@dataclass(frozen=True)
class OwnParameters:
    """Parameters of an algorithm beside the prompt, such as a value head's."""

    parameters: tuple[nn.Parameter, ...]
    lr: float
    """Peak learning rate; follows the schedule of the prompt's."""


class Algorithm(ABC):
    """A learning rule.

    Only `signal`, `token_weights` and `losses` must be given; the rest reads the settings or says
    "no".
    """

    Settings: ClassVar[type[AlgorithmSettings]] = AlgorithmSettings
    """What a recipe may say of the algorithm."""
    settings: AlgorithmSettings
    """Of the class `Settings`."""

    def __init__(self, settings: AlgorithmSettings, max_tokens: int) -> None:
        """Keep the settings.

        Args:
            settings: the settings of the algorithm.
            max_tokens: the sampling limit.
        """
        self.settings = settings
        self.max_tokens = max_tokens

    @classmethod
    def make(cls, settings: Any, policy: Policy, max_tokens: int, seed: int) -> Self:
        """The algorithm that a recipe describes; override it to take more than the settings.

        Args:
            settings: an instance of the class's `Settings`.
            policy: the policy whose prompt is trained.
            max_tokens: the sampling limit.
            seed: seed of an algorithm's own parameters.

        Raises:
            InputError: the settings do not fit the base or the sampling limit.
        """
        del policy, seed
        return cls(settings, max_tokens)

    @property
    def group_size(self) -> int:
        """Completions per query."""
        return 1

    @property
    def num_epochs(self) -> int:
        """Passes over a batch."""
        return self.settings.num_epochs

    @property
    def num_minibatches(self) -> int:
        """Updates per pass; each sees its share of the batch's groups."""
        return self.settings.num_minibatches

    @property
    def needs(self) -> frozenset[Need]:
        """What batches are scored with before the first update."""
        return frozenset()

    @property
    def entropy_grad(self) -> bool:
        """Whether the entropy takes part in the loss."""
        return False

    @property
    def whole_groups(self) -> bool:
        """Whether the loss needs all rows of a group in one micro-batch."""
        return False

    @property
    def max_draws(self) -> int:
        """Draws to fill a batch with groups that `keeps` approves; 1 = take what comes."""
        return 1

    def keeps(self, rewards: Tensor) -> bool:
        """Whether a group with these rewards [G] is worth learning from: whether two differ."""
        return bool(groups_with_spread(rewards, rewards.shape[0])[0])

    @abstractmethod
    def signal(self, view: BatchView) -> Signal:
        """What each completion of a batch is worth; asked once, before the first update."""

    @abstractmethod
    def token_weights(self, counted_lengths: Tensor) -> Tensor:
        """What one token of each row counts for, [B].

        Args:
            counted_lengths: int64 [B], of all rows of one update, so that the normaliser is that
                of the update and sums over its micro-batches give its loss.
        """

    @abstractmethod
    def losses(self, scores: TokenScores, micro: MicroSignal) -> TokenLosses:
        """Token losses of a micro-batch."""

    def values(self, states: Tensor) -> Tensor:
        """Values [M] of final hidden states [M, d]; only asked when `needs` names them."""
        raise NotImplementedError

    def after_batch(self, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Adapt to what a batch's updates gave (an adaptive KL weight); returns more metrics."""
        return {}

    def own_parameters(self) -> list[OwnParameters]:
        """What is trained beside the prompt; never parameters of the base."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint needs to go on, own parameters included."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            ValueError: names or shapes differ.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, given {sorted(state)}")
