"""Evidence that one prompt is better than another, as a search collects it step by step.

The test is that of `rlprompt.certify.acceptance`; here is what a searcher has to do so that what
the test assumes is true. A challenger is fixed before it is tested, and each query counts for one
challenger only, and only if nothing of this search had met it before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from rlprompt.certify.acceptance import Acceptance, Decision, PairedTest
from rlprompt.errors import InputError
from rlprompt.search.base import Trial
from rlprompt.settings import Settings


class EvidenceSettings(Settings):
    """When a text is shown to be better than another; see `rlprompt.certify.acceptance`."""

    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Probability that the search ever takes a text for better than another that it is not."""
    spread: float | None = Field(default=None, gt=0.0)
    """Largest difference of two rewards of one query, such as 1 for rewards in [0, 1]; the mean
    reward is then compared. Null = the number of queries on which a text is better."""
    min_effect: float = Field(default=0.1, gt=0.0)
    """Smallest difference worth finding: of the mean reward, or without a spread of the shares of
    queries won and lost. Smaller takes more queries."""
    miss_rate: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Probability of dropping a text that is better than the incumbent by `min_effect`."""

    @model_validator(mode="after")
    def _effect_is_possible(self) -> Self:
        if self.min_effect >= (self.spread or 1.0):
            raise ValueError(
                f"min_effect is {self.min_effect:g}, which no text can reach; choose it below "
                f"{'1' if self.spread is None else f'the spread, {self.spread:g}'}"
            )
        return self


class Duel:
    """One challenger after the other against the incumbent, at one error rate for all of them."""

    def __init__(self, settings: EvidenceSettings) -> None:
        """No challenger yet."""
        self._acceptance = Acceptance(
            alpha=settings.alpha,
            spread=settings.spread,
            min_effect=settings.min_effect,
            miss_rate=settings.miss_rate,
        )
        self._test: PairedTest | None = None
        self._met: set[int] = set()
        self._stale = False

    @property
    def is_open(self) -> bool:
        """Whether a challenger is being tested."""
        return self._test is not None

    @property
    def is_stale(self) -> bool:
        """Whether the last step met no query that was new to the search: nothing more is shown."""
        return self._stale

    def begin(self) -> None:
        """Test the next challenger, on queries that are met from now on."""
        self._test = self._acceptance.begin()

    def meet(self, incumbent: Trial, challenger: Trial | None) -> Decision:
        """Take up a step.

        Args:
            incumbent: trial of the incumbent.
            challenger: trial of the challenger on the same queries; None where there is none.

        Returns:
            `accept` and `reject` end the challenger's test; the next one is to be begun.

        Raises:
            InputError: two rewards of a query differ by more than the stated spread.
        """
        queries = [group.query.index for group in incumbent.groups]
        fresh = [place for place, query in enumerate(queries) if query not in self._met]
        self._met.update(queries)
        self._stale = not fresh
        if self._test is None or challenger is None:
            return "more"
        gains = (challenger.query_rewards - incumbent.query_rewards)[fresh]
        try:
            decision = self._test.update(gains.numpy(), [queries[place] for place in fresh])
        except ValueError as error:
            raise InputError(f"search.evidence.spread does not hold: {error}") from error
        if decision != "more":
            self._acceptance.close(self._test)
            self._test = None
        return decision

    def state(self) -> dict[str, Any]:
        """Plain JSON values for `restore`."""
        return {
            "acceptance": self._acceptance.state_dict(),
            "test": None if self._test is None else self._test.state_dict(),
            "met": sorted(self._met),
            "stale": self._stale,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._acceptance = Acceptance.from_state(state["acceptance"])
        test = state["test"]
        self._test = None if test is None else PairedTest.from_state(test)
        self._met = {int(query) for query in state["met"]}
        self._stale = bool(state["stale"])
