"""Answers that a dataset brings: completions to learn from, and pairs of which one is better.

An answer is text, one assistant message, or a whole conversation that repeats the row's query and
ends with the answer. In TRL's rows with an implicit prompt there is no column for the query at all:
`chosen` and `rejected` are whole conversations, and what they share is the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlprompt.data.base import Table
from rlprompt.data.messages import (
    SYSTEM_ROLES,
    Conversation,
    check_encodable,
    is_message,
    read_conversation,
    read_message,
    shown,
)
from rlprompt.errors import InputError
from rlprompt.types import Message

PAIR = ("chosen", "rejected")
"""Columns of preference rows."""
USUAL_COLUMNS = (
    "query",
    "prompt",
    "question",
    "instruction",
    "messages",
    "conversations",
    "conversation",
    "problem",
    "input",
    "text",
)
"""What datasets in use call the column of the query, most telling first."""


def with_implicit_queries(
    table: Table, query_column: str, answers: Sequence[str]
) -> tuple[Table, Sequence[str]]:
    """The table with the query of each row that has it only inside its answers.

    Args:
        table: the rows; given back as it is where the first has the query column, one with a
            usual name of it, or no pair of conversations.
        query_column: the column that the query is put into.
        answers: the columns with the answers that an algorithm learns from.

    Returns:
        The table, and the columns that hold answers.

    Raises:
        InputError: a row's conversations differ before their last turn, do not end with the
            assistant's, or are text.
    """
    columns = tuple(answers) if len(answers) == 2 else PAIR
    first = table.rows[0]
    if not first.keys().isdisjoint((query_column, *USUAL_COLUMNS)):
        return table, answers
    if not all(isinstance(first.get(column), str | list) for column in columns):
        return table, answers
    if all(isinstance(first[column], str) for column in columns) and set(first) > {*columns}:
        return table, answers  # the query is text in another column, which the user can name
    rows = []
    for position, row in enumerate(table.rows):
        where = table.where(position)
        rows.append({query_column: _shared_query(row, columns, where), **row})
    return replace(table, rows=rows), columns


def _shared_query(row: dict[str, Any], columns: Sequence[str], where: str) -> list[Message]:
    """The turns of a row's conversations without their answers."""
    better, worse = (_whole(row.get(column), f"{where}, column '{column}',") for column in columns)
    if (better.system, better.turns) != (worse.system, worse.turns):
        raise InputError(
            f"{where}: '{columns[0]}' and '{columns[1]}' differ before their last turn, so they "
            "answer two queries; correct the row or remove it"
        )
    system = [] if better.system is None else [{"role": "system", "content": better.system}]
    return [*system, *better.turns]


def _whole(value: Any, where: str) -> Conversation:
    if isinstance(value, str):
        raise InputError(
            f"{where} is text, and no column holds the query; put the query into a column of its "
            "own, or write lists of messages that begin with it"
        )
    if not isinstance(value, list):
        raise InputError(f"{where} holds {shown(value)}; write a list of messages")
    found = read_conversation(value, where)
    if found.answer is None:
        raise InputError(
            f"{where} ends with the user's turn; add the assistant's answer, or remove the row"
        )
    return found


def read_answer(value: Any, query: Conversation, where: str) -> str | list[Message]:
    """An answer of a dataset: text as it stands, or a list with the one assistant message.

    Args:
        value: what the column holds.
        query: the row's query, which a whole conversation must begin with.
        where: the place of the column, for errors.

    Raises:
        InputError: it is no answer, or answers another query.
    """
    if isinstance(value, str) and value.strip():
        check_encodable(value, where)
        return value
    turns = [value] if is_message(value) else value
    if not isinstance(turns, list) or not turns or not all(is_message(turn) for turn in turns):
        raise InputError(
            f"{where} holds no answer but {shown(value)}; write a non-empty text, or a list with "
            "one assistant message"
        )
    if len(turns) == 1:
        message = read_message(turns[0], f"{where} turn 1")
        if message["role"] != "assistant":
            raise InputError(
                f"{where} has one turn, with the role {message['role']!r}; an answer is the "
                "assistant's"
            )
        return [message]
    found = _whole(turns, where)
    if found.turns != query.turns or found.system not in (None, query.system):
        raise InputError(
            f"{where} is a conversation that does not begin with the row's query; give the answer "
            "alone, or correct the row"
        )
    return [{"role": "assistant", "content": str(found.answer)}]


def system_text(value: Any) -> str | None:
    """The text of the system turn that a query begins with; None where there is none.

    Args:
        value: what the query column holds; a wrong conversation has been told before.
    """
    if not isinstance(value, list):
        return None
    first = read_message(value[0], "turn 1") if _speaks(value[0]) else None
    return None if first is None else first["content"].strip()


def _speaks(turn: dict[str, Any]) -> bool:
    """Whether a turn is a system turn that says something."""
    role = turn.get("role", turn.get("from"))
    return role in SYSTEM_ROLES and bool(turn.get("content", turn.get("value")))
