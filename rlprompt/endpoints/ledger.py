"""What was asked of endpoints, what was answered, and what it cost: a journal and a budget.

The journal is a file of one JSON object per line, appended to and never changed:

    {"event": "sent", "id", "key", "tokens", "cost"}      before an attempt: the most it can cost
    {"event": "answered", "id", "key", "tokens", "cost", "answer"}
    {"event": "free", "id"}                               refused by the server, or never sent
    {"event": "lost", "id", "tokens", "cost", "why"}      no usable answer, and it may be billed

An attempt begins only where what it can cost at most fits into what is left, so that a budget is
never exceeded, and ends by what the server says that it cost. One whose end nobody knows (the
connection broke, or this process was killed) counts as its most. Whoever opens the journal again
has every answer that was paid for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from rlprompt.endpoints.answers import Answer
from rlprompt.endpoints.settings import BudgetSettings
from rlprompt.errors import InputError
from rlprompt.files import JsonlWriter, iter_jsonl

FILE = "endpoint.jsonl"
"""Name of the journal in a run folder."""


class BudgetSpentError(Exception):
    """No further request fits into the budget; all that was paid for is in the journal."""


@dataclass(frozen=True)
class Amount:
    """Tokens and money."""

    tokens: int = 0
    cost: Decimal = Decimal(0)

    def __add__(self, other: Amount) -> Amount:
        """Both together."""
        return Amount(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Amount) -> Amount:
        """What is left."""
        return Amount(self.tokens - other.tokens, self.cost - other.cost)


class Ledger:
    """Journal and budget of all endpoints of a run; see the module."""

    def __init__(self, budget: BudgetSettings | None = None, folder: Path | None = None) -> None:
        """Nothing is read or written yet.

        Args:
            budget: what may be spent; None = all.
            folder: run folder that the journal lies in, which exists at the first request; None =
                answers are kept in memory.
        """
        self._budget = budget
        self._path = None if folder is None else folder / FILE
        self._writer: JsonlWriter | None = None
        self._is_open = False
        self._answers: dict[str, Answer] = {}
        self._pending: dict[int, Amount] = {}
        """What attempts under way can cost at most."""
        self._next = 0
        self.spent = Amount()
        """What was paid, or may have been."""
        self.lost = Amount()
        """The part of it that brought no usable answer."""
        self.requests = 0
        """Attempts that were sent."""

    @property
    def under_way(self) -> int:
        """Attempts that have begun and not ended."""
        return len(self._pending)

    def open(self) -> None:
        """Read the journal, and go on with it; once.

        Raises:
            InputError: it is damaged, or cannot be written.
        """
        if self._is_open:
            return
        if self._path is not None:
            if self._path.exists():
                self._read(self._path)
            try:
                self._writer = JsonlWriter(self._path, resume_step=0)
            except OSError as error:
                raise InputError(
                    f"'{self._path}' cannot be written ({error.strerror}); mend that, for it keeps "
                    "what was paid for"
                ) from error
        self._is_open = True

    def close(self) -> None:
        """Put the journal on disk; the next request opens it again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def answer(self, key: str) -> Answer | None:
        """The answer to a question, if it was paid for before."""
        self.open()
        return self._answers.get(key)

    def fits(self, most: Amount) -> bool:
        """Whether an attempt may begin, whatever those under way will cost."""
        budget = self._budget
        if budget is None:
            return True
        total = sum(self._pending.values(), self.spent) + most
        within = budget.max_tokens is None or total.tokens <= budget.max_tokens
        limit = None if budget.max_cost is None else Decimal(repr(budget.max_cost))
        return within and (limit is None or total.cost <= limit)

    def begin(self, key: str, most: Amount) -> int:
        """Note that an attempt is about to be sent.

        Args:
            key: hash of the question.
            most: what it can cost at most, which `fits`.

        Returns:
            Its number, which the end of it names.
        """
        self._next += 1
        self._write("sent", self._next, {"key": key, **_plain(most)})
        self._pending[self._next] = most
        self.requests += 1
        return self._next

    def answered(self, attempt: int, key: str, paid: Amount | None, answer: Answer) -> None:
        """Note an answer.

        Args:
            attempt: number of the attempt.
            key: hash of its question.
            paid: what it cost; None = the server does not say, so the most.
            answer: what came.
        """
        amount = self._pending[attempt] if paid is None else paid
        self._write("answered", attempt, {"key": key, **_plain(amount), "answer": answer.plain()})
        del self._pending[attempt]
        self.spent += amount
        self._answers[key] = answer

    def free(self, attempt: int) -> None:
        """Note that an attempt cost nothing."""
        self._write("free", attempt, {})
        del self._pending[attempt]

    def failed(self, attempt: int, why: str, paid: Amount | None = None) -> None:
        """Note that an attempt brought nothing and may be billed.

        Args:
            attempt: number of the attempt.
            why: what happened, in words.
            paid: what it cost; None = nobody knows, so the most.
        """
        amount = self._pending[attempt] if paid is None else paid
        self._write("lost", attempt, {**_plain(amount), "why": why})
        del self._pending[attempt]
        self.spent += amount
        self.lost += amount

    def report(self) -> dict[str, Any]:
        """What was spent, for `summary.json`."""
        return {
            "requests": self.requests,
            "tokens": self.spent.tokens,
            "cost": float(self.spent.cost),
            "lost_tokens": self.lost.tokens,
            "lost_cost": float(self.lost.cost),
        }

    def over(self) -> str:
        """What is over, for a sentence."""
        budget = self._budget
        limits = [] if budget is None else [(budget.max_tokens, "tokens"), (budget.max_cost, "")]
        told = " and ".join(f"{x:g} {w}".strip() for x, w in limits if x is not None)
        return f"the next request may not fit into the budget ({told}); {self.told()} are spent"

    def told(self) -> str:
        """What was spent, in words."""
        return f"{self.spent.tokens} tokens, {float(self.spent.cost):g} in money"

    def _write(self, event: str, attempt: int, content: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        if self._writer is None:
            self._writer = JsonlWriter(self._path, resume_step=0)
        self._writer.write({"event": event, "id": attempt, **content})

    def _read(self, path: Path) -> None:
        pending: dict[int, Amount] = {}
        for number, row in enumerate(iter_jsonl(path), start=1):
            try:
                self._take(row, pending)
            except (KeyError, TypeError, ValueError, InvalidOperation) as error:
                raise InputError(
                    f"'{path}' row {number} is no row of a journal of requests; restore the file, "
                    "or remove it to pay for its answers again"
                ) from error
        # Of a process that was killed: nobody knows what came of them.
        for amount in pending.values():
            self.spent += amount
            self.lost += amount

    def _take(self, row: Mapping[str, Any], pending: dict[int, Amount]) -> None:
        attempt, event = int(row["id"]), row["event"]
        self._next = max(self._next, attempt)
        if event == "sent":
            pending[attempt] = _amount(row)
            self.requests += 1
            return
        if event not in ("answered", "free", "lost"):
            raise ValueError(event)
        del pending[attempt]
        if event == "free":
            return
        self.spent += _amount(row)
        if event == "lost":
            self.lost += _amount(row)
        else:
            self._answers[str(row["key"])] = Answer.of(row["answer"])


def _plain(amount: Amount) -> dict[str, Any]:
    return {"tokens": amount.tokens, "cost": str(amount.cost)}


def _amount(row: Mapping[str, Any]) -> Amount:
    tokens, cost = row["tokens"], Decimal(row["cost"])
    if not isinstance(tokens, int) or tokens < 0 or not cost.is_finite() or cost < 0:
        raise ValueError("no amount")
    return Amount(tokens, cost)
