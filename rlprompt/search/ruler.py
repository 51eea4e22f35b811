"""How long a system text is."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlprompt.search.base import SearchStart


class Ruler:
    """How long a text is."""

    def __init__(self, given: SearchStart) -> None:
        """Measure with the tokenizer of the base, where the search has one."""
        self._policy = given.policy

    def tokens(self, text: str) -> int:
        """Tokens of the text in the slot; without a tokenizer its words and marks.

        Raises:
            InputError: the text cannot stand in the slot.
        """
        if self._policy is None:
            return len(re.findall(r"\w+|[^\w\s]", text))
        return len(self._policy.slot_ids(text))

    @property
    def control_tokens(self) -> Sequence[str]:
        """The control tokens of the tokenizer."""
        return () if self._policy is None else self._policy.slot.control_tokens
