"""What an engine is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.cpu.rollout_products import RolloutProducts
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.settings import ChosenSettings
from rlprompt.types import Group, Query


class EngineSettings(ChosenSettings):
    """What every engine can be told: nothing but which one it is."""

    @property
    def importance_weight_cap(self) -> float | None:
        """The largest weight that corrects the loss for how tokens were drawn; None = none does."""
        return None


@dataclass(frozen=True)
class Generation:
    """What an engine has drawn."""

    groups: tuple[Group, ...]
    """The queries in their order, each with its completions."""
    products: RolloutProducts | None = field(default=None, compare=False, repr=False)
    """What the engine has multiplied for them and kept for an update; None = nothing."""


class Engine(ABC):
    """Generates completions of queries under a prompt.

    An engine that cannot apply a prompt refuses it: `supports` says so beforehand, `sync` raises.
    """

    Settings: ClassVar[type[EngineSettings]] = EngineSettings
    """What a recipe may say of it."""
    settings: EngineSettings
    """Of the class `Settings`."""

    def __init__(self, policy: Policy | None, settings: EngineSettings) -> None:
        """Keep the parts.

        Args:
            policy: the policy over the base that completions are drawn from; None where they are
                drawn elsewhere.
            settings: the settings of the engine.
        """
        self._policy = policy
        self.settings = settings

    @property
    def has_base(self) -> bool:
        """Whether completions are drawn from a base that is here, so that there is a `policy`."""
        return self._policy is not None

    @property
    def policy(self) -> Policy:
        """The policy over the base that completions are drawn from.

        Raises:
            InputError: they are drawn elsewhere, and no base is here to be looked into.
        """
        if self._policy is None:
            raise InputError(
                f"engine.type is {self.settings.type}, so no base is here, and something in the "
                "recipe needs one; choose engine.type: native, or what works from outputs alone"
            )
        return self._policy

    @classmethod
    def make(cls, settings: Any, policy: Policy) -> Self:
        """The engine that a recipe describes; override it to take more than the settings.

        Args:
            settings: an instance of the class's `Settings`.
            policy: the policy over the base that completions are drawn from.

        Raises:
            InputError: it cannot run here.
        """
        return cls(policy, settings)

    @abstractmethod
    def supports(self, prompt: Prompt) -> bool:
        """Whether this engine can apply the prompt exactly."""

    def objection(self, prompt: Prompt) -> str:
        """Why a prompt is not supported, as the middle of "engine.type is ..., which ...".

        Args:
            prompt: prompt of which `supports` is false.
        """
        return f"cannot apply a prompt of the kind {prompt.kind}"

    def rehearse(self, prompt: Prompt) -> None:  # noqa: B027 (an engine need not be elsewhere)
        """Prove before a run that completions can be drawn under a prompt; nothing by default.

        Args:
            prompt: prompt that is supported.

        Raises:
            InputError: they cannot, or not as they should be.
        """

    @abstractmethod
    def sync(self, prompt: Prompt) -> None:
        """Take over the prompt as it is now; call it after every update.

        Raises:
            InputError: the prompt is not supported.
        """

    @abstractmethod
    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw completions of each query under the synced prompt.

        Args:
            queries: the queries, at least one.
            num_completions: the completions to draw for each query.
            sampling: how tokens are drawn.
            seed: the seed; equal seeds and inputs give equal completions.
            progress: what is called with (tokens drawn in the longest row, max_tokens).
            first: the place of the first query among all that share the seed, so that ranks that
                divide a list draw what one would.
            keep_products: whether an update will learn from the completions, so that an engine
                that can keeps what it multiplies. Products that it kept before are given up.
        """

    def generate_some(
        self,
        query: Query,
        chosen: range,
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw some of the completions that `generate` gives a query, for ranks that share a group.

        An engine that can draw these alone overrides this; here all are drawn, and some are kept.

        Args:
            query: the query.
            chosen: numbers of the completions to draw, next to each other, at least one.
            num_completions: the completions of the whole group.
            sampling: how tokens are drawn.
            seed: the seed, see `generate`.
            progress: function, see `generate`.
            first: the place of the query among all that share the seed.
            keep_products: whether products are kept, see `generate`.

        Returns:
            One group with those completions.
        """
        whole = self.generate(
            [query], num_completions, sampling, seed, progress, first, keep_products
        )
        kept = whole.groups[0].completions[chosen.start : chosen.stop]
        return replace(whole, groups=(Group(query, kept),))

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
    ) -> list[Generation]:
        """Draw completions of the same queries under each of several prompts.

        The numbers that completions are drawn with are the same under every prompt. An engine that
        can decode rows of different prompts together overrides this; the completions must be those
        of one prompt after the other.

        Args:
            prompts: the prompts, at least one; the last one stays synced.
            queries: the queries, at least one.
            num_completions: the completions of each query under each prompt.
            sampling: how tokens are drawn.
            seed: the seed; equal seeds and inputs give equal completions.

        Returns:
            One generation per prompt, in order.

        Raises:
            InputError: there is no prompt, or see `sync` and `generate`.
        """
        require_prompts(prompts)
        drawn = []
        for prompt in prompts:
            self.sync(prompt)
            drawn.append(self.generate(queries, num_completions, sampling, seed))
        return drawn

    def generate_under(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
    ) -> Generation:
        """Draw completions of each query under a prompt of its own.

        An engine that can decode rows of different prompts together overrides this; a query's
        completions must be those of `generate` under its prompt at its place. Afterwards sync a
        prompt again before `generate`. No products are kept.

        Args:
            prompts: one prompt per query; equal ones are best one object.
            queries: the queries, at least one.
            num_completions: the completions to draw for each query.
            sampling: how tokens are drawn.
            seed: the seed; equal seeds and inputs give equal completions.
            progress: what is called with (tokens drawn in the longest row, max_tokens).
            first: the place of the first query; see `generate`.

        Raises:
            InputError: there is no prompt, or see `sync` and `generate`.
        """
        require_prompts(prompts)
        groups: list[Group] = []
        for place, (prompt, query) in enumerate(zip(prompts, queries, strict=True)):
            if place == 0 or prompt is not prompts[place - 1]:
                self.sync(prompt)
            drawn = self.generate([query], num_completions, sampling, seed, progress, first + place)
            groups += drawn.groups
        return Generation(tuple(groups))


def require_prompts(prompts: Sequence[Prompt]) -> None:
    """Refuse to draw under no prompt.

    Args:
        prompts: the prompts that an engine is given.

    Raises:
        InputError: there is none.
    """
    if not prompts:
        raise InputError("the engine has no prompt to draw under; give one at least")
