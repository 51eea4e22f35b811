"""Which of several operators makes the next candidate: by given shares, or by what has helped.

Without shares it is a bandit with two outcomes, for a child is better than its parent or it is not:
each operator's chance of that has a Beta distribution, one chance is drawn from each, and the
largest is taken (Thompson sampling: Thompson, Biometrika 1933; Chapelle and Li, NeurIPS 2011).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any


class OperatorChoice:
    """Chooses among operators, and remembers what came of them."""

    def __init__(self, operators: Sequence[str], shares: Mapping[str, float] | None = None) -> None:
        """Nothing was tried yet.

        Args:
            operators: names of the operators.
            shares: how often each is to be taken, in any unit; None = as often as it helps.
        """
        self._shares = shares
        self._won = dict.fromkeys(operators, 0)
        self._lost = dict.fromkeys(operators, 0)

    def draw(self, generator: random.Random) -> str:
        """The operator to use next."""
        if self._shares is not None:
            return generator.choices(list(self._won), [self._shares[each] for each in self._won])[0]
        chances = {
            each: generator.betavariate(1 + self._won[each], 1 + self._lost[each])
            for each in self._won
        }
        return max(chances, key=chances.__getitem__)

    def credit(self, operator: str, *, helped: bool) -> None:
        """Note whether what an operator made was better than what it was made from."""
        counts = self._won if helped else self._lost
        if operator in counts:
            counts[operator] += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`."""
        return {"won": dict(self._won), "lost": dict(self._lost)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it chose among other operators.
        """
        if state["won"].keys() != self._won.keys():
            raise ValueError("it chose among other operators")
        # In the order of the operators, which a file need not keep.
        self._won = {name: int(state["won"][name]) for name in self._won}
        self._lost = {name: int(state["lost"][name]) for name in self._lost}
