"""What an engine is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.cpu.rollout_products import RolloutProducts
from rlprompt.prompts.base import Prompt
from rlprompt.types import Group, Query


@dataclass(frozen=True)
class Generation:
    """What an engine has drawn."""

    groups: tuple[Group, ...]
    """The queries in their order, each with its completions."""
    products: RolloutProducts | None = field(default=None, compare=False, repr=False)
    """What the engine has multiplied for them and kept for an update; None = nothing."""


class Engine(Protocol):
    """Generates completions of queries under a prompt.

    An engine that cannot apply a prompt refuses it: `supports` says so beforehand, `sync` raises.
    """

    def supports(self, prompt: Prompt) -> bool:
        """Whether this engine can apply the prompt exactly."""
        ...

    def sync(self, prompt: Prompt) -> None:
        """Take over the prompt as it is now; call it after every update.

        Raises:
            InputError: the prompt is not supported.
        """
        ...

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
            queries: at least one.
            num_completions: completions per query.
            sampling: how tokens are drawn.
            seed: equal seeds and inputs give equal completions.
            progress: called with (tokens drawn in the longest row, max_tokens).
            first: place of the first query among all that share the seed, so that ranks that
                divide a list draw what one would.
            keep_products: whether an update will learn from the completions, so that an engine
                that can keeps what it multiplies. Products that it kept before are given up.
        """
        ...
