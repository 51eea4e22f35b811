"""Journal and budget of requests: nothing is paid for twice, and nothing above the limit."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.endpoints.answers import Answer, Choice, Usage
from rlprompt.endpoints.ledger import FILE, Amount, Ledger
from rlprompt.endpoints.settings import BudgetSettings, EndpointSettings
from rlprompt.errors import InputError

ANSWER = Answer((Choice("half \u00e9\u2028 \x01\n", "stop", 3),), Usage(4, 3))


def opened(folder: Path | None, **budget: float) -> Ledger:
    ledger = Ledger(BudgetSettings(**budget) if budget else None, folder)  # type: ignore[arg-type]
    ledger.open()
    return ledger


def test_what_was_answered_is_known_again(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    attempt = ledger.begin("a", Amount(100, Decimal("0.5")))
    ledger.answered(attempt, "a", Amount(7, Decimal("0.01")), ANSWER)
    lost = ledger.begin("b", Amount(50, Decimal("0.25")))
    ledger.failed(lost, "the connection broke")
    free = ledger.begin("c", Amount(50, Decimal("0.25")))
    ledger.free(free)
    ledger.close()
    for each in (ledger, opened(tmp_path), opened(tmp_path)):
        assert each.answer("a") == ANSWER
        assert each.answer("b") is None and each.answer("c") is None
        assert each.spent == Amount(57, Decimal("0.26"))
        assert each.lost == Amount(50, Decimal("0.25"))
        assert each.requests == 3
        assert each.under_way == 0


def test_what_a_killed_process_had_sent_counts_as_its_most(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.answered(ledger.begin("a", Amount(100)), "a", Amount(7), ANSWER)
    ledger.begin("b", Amount(30))
    with (tmp_path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"event": "answered", "id": 2, "key": "b", "tok')  # torn
    for _ in range(2):
        again = opened(tmp_path)
        assert (again.spent.tokens, again.lost.tokens) == (37, 30)
        assert again.answer("b") is None
    attempt = again.begin("b", Amount(30))
    assert attempt == 3
    again.answered(attempt, "b", Amount(8), ANSWER)
    assert opened(tmp_path).spent.tokens == 45


def test_a_budget_is_reached_to_the_token_and_never_exceeded() -> None:
    ledger = opened(None, max_tokens=100)
    assert ledger.fits(Amount(100)) and not ledger.fits(Amount(101))
    first = ledger.begin("a", Amount(60))
    assert ledger.fits(Amount(40)) and not ledger.fits(Amount(41))
    ledger.answered(first, "a", Amount(10), ANSWER)
    assert ledger.fits(Amount(90)) and not ledger.fits(Amount(91))


def test_money_is_counted_without_rounding() -> None:
    ledger = opened(None, max_cost=0.3)
    for name in ("a", "b", "c"):
        assert ledger.fits(Amount(1, Decimal("0.1")))
        ledger.answered(ledger.begin(name, Amount(1, Decimal("0.1"))), name, None, ANSWER)
    assert ledger.spent.cost == Decimal("0.3")
    assert not ledger.fits(Amount(0, Decimal("0.000000001")))


@pytest.mark.parametrize(
    "row",
    [
        {"event": "sent"},
        {"event": "sent", "id": 1, "key": "a", "tokens": -1, "cost": "0"},
        {"event": "sent", "id": 1, "key": "a", "tokens": 1, "cost": "NaN"},
        {"event": "sent", "id": 1, "key": "a", "tokens": 1, "cost": "-1"},
        {"event": "sent", "id": 1, "key": "a", "tokens": "1", "cost": "0"},
        {"event": "sent", "id": 1, "key": "a", "tokens": 1, "cost": "money"},
        {"event": "answered", "id": 1, "key": "a", "tokens": 1, "cost": "0", "answer": {}},
        {"event": "bought", "id": 1},
        {"event": "free", "id": 9},
    ],
    ids=lambda row: json.dumps(row)[:60],
)
def test_a_damaged_journal_is_one_sentence(tmp_path: Path, row: dict[str, object]) -> None:
    (tmp_path / FILE).write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"row 1 is no row of a journal of requests; restore"):
        opened(tmp_path)


def test_a_journal_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(InputError, match=r"endpoint\.jsonl"):
        opened(tmp_path)


def test_settings_that_say_nothing_or_hold_a_secret_are_refused() -> None:
    with pytest.raises(ValidationError, match="limits nothing"):
        BudgetSettings()
    known: dict[str, Any] = {"base_url": "http://127.0.0.1/v1", "model": "m"}
    with pytest.raises(ValidationError, match=r"price_out is missing"):
        EndpointSettings(**known, price_in=1.0)
    for key in ("sk-secret", "OPENAI_API_KEY", "$OPENAI_API_KEY", "a${B}", "${B}${C}", ""):
        with pytest.raises(ValidationError, match=r"must name an environment variable"):
            EndpointSettings(**known, api_key=key)
    with pytest.raises(ValidationError, match="extra_body holds stream"):
        EndpointSettings(**known, extra_body={"stream": True})
    prices = EndpointSettings(**known, price_in=0.1, price_out=0.3).prices
    assert prices == (Decimal("1E-7"), Decimal("3E-7"))
