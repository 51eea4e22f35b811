"""Why a run ended: one type for runs, populations, Slurm and the command line.

`summary.json` holds it as text: `finished` (all steps are made, or a search has nothing more to
try), `early_stopping`, `max_seconds`, `budget`, `guard:NAME`, the name of a signal such as
`SIGTERM`, or `failed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["finished", "early_stopping", "max_seconds", "budget", "guard", "signal", "failed"]

_WORDS: dict[str, Kind] = {
    "finished": "finished",
    "early_stopping": "early_stopping",
    "max_seconds": "max_seconds",
    "budget": "budget",
    "failed": "failed",
}
_FAILED_EXIT_CODE = 1


@dataclass(frozen=True)
class StopReason:
    """Why a run, or a member of a population, ended."""

    kind: Kind
    """`failed`: loss, gradient or prompt was not finite."""
    name: str = ""
    """The guard or the signal; empty for other kinds."""

    def __str__(self) -> str:
        """The text of `summary.json`."""
        if self.kind == "guard":
            return f"guard:{self.name}"
        return self.name if self.kind == "signal" else self.kind

    @classmethod
    def parse(cls, text: Any) -> StopReason | None:
        """The reason that a summary gives.

        Args:
            text: the value of `stopped_because`, None where a summary has none.

        Returns:
            None where it is no text or empty: the run has not come to an end.
        """
        if not isinstance(text, str) or not text:
            return None
        if text.startswith("guard:"):
            return cls("guard", text.removeprefix("guard:"))
        return cls(_WORDS[text]) if text in _WORDS else cls("signal", text)

    @property
    def is_complete(self) -> bool:
        """Whether the run needs no more steps, so that `--resume` has nothing to do."""
        return self.kind not in ("signal", "failed")

    def exit_code(self, when_signalled: int = 0) -> int:
        """The exit code of `rlprompt train`.

        Args:
            when_signalled: code of a run that a signal stopped before its end.

        Returns:
            0 for a complete run, 1 for a failed one.
        """
        if self.kind == "signal":
            return when_signalled
        return _FAILED_EXIT_CODE if self.kind == "failed" else 0


FINISHED = StopReason("finished")
EARLY_STOPPING = StopReason("early_stopping")
MAX_SECONDS = StopReason("max_seconds")
BUDGET = StopReason("budget")
FAILED = StopReason("failed")
