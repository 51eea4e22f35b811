"""Turns rows into queries: checks columns, messages and their roles.

A query column holds plain text or a conversation. Every problem is reported with the place of its
row, before any model is loaded.
"""

from __future__ import annotations

import difflib
import unicodedata
from typing import Any

from rlprompt.data.base import Table
from rlprompt.errors import InputError
from rlprompt.types import Message, Query

# Keywords that a reward function is called with besides the columns.
RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)
# What datasets in use call the column, most telling first.
USUAL_COLUMNS = [
    "query",
    "prompt",
    "question",
    "instruction",
    "messages",
    "conversation",
    "problem",
    "input",
    "text",
]
# Marks of a sentence. Signs such as + - * / # are left alone: they tell 5+3 from 5-3, C from C#.
SENTENCE_MARKS = ".,;:!?\"'`()[]{}\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u00bf\u00a1"


def build_queries(
    table: Table, query_column: str, split_column: str | None = None, first_index: int = 0
) -> list[Query]:
    """Turn every row of a table into a query, in order.

    Args:
        table: The rows.
        query_column: The column with the text or the messages.
        split_column: The column left out of `Query.columns`, None for none.
        first_index: `Query.index` of the first row.

    Returns:
        One query per row; `columns` holds all other columns.

    Raises:
        InputError: A column is missing, reserved or not in every row; a query is neither text nor
            a valid conversation; or the rows mix both forms.
    """
    _check_columns(table, query_column, split_column)
    left_out = {query_column, split_column}
    queries: list[Query] = []
    for position, row in enumerate(table.rows):
        where = table.where(position)
        value = row[query_column]
        messages = _messages(value, f"{where}, column '{query_column}',")
        conversational = not isinstance(value, str)
        if queries and conversational != queries[0].conversational:
            forms = ("text", "a conversation")
            raise InputError(
                f"{where} holds {forms[conversational]} while {table.where(0)} holds "
                f"{forms[not conversational]} in column '{query_column}'; use one form throughout"
            )
        queries.append(
            Query(
                messages=messages,
                columns={name: cell for name, cell in row.items() if name not in left_out},
                index=first_index + position,
                conversational=conversational,
                place=where,
            )
        )
    return queries


def match_key(query: Query) -> str:
    """Give the text by which two queries count as the same.

    Case, white space and the marks of a sentence at the ends of words are ignored; signs inside
    (`5+3`, `C#`) are not. All turns count, the roles alternate anyway.
    """
    return "\n".join(_normalized(message["content"]) for message in query.messages)


def _normalized(text: str) -> str:
    words = unicodedata.normalize("NFC", text).casefold().split()
    kept = [word.strip(SENTENCE_MARKS) for word in words]
    return " ".join(word for word in kept if word) or " ".join(words)


def _check_columns(table: Table, query_column: str, split_column: str | None) -> None:
    first = table.rows[0]
    for setting, column in (("query_column", query_column), ("split_column", split_column)):
        if column is not None and column not in first:
            raise InputError(_missing_column_message(table.label, setting, column, list(first)))
    for name in first:
        if name in RESERVED_COLUMNS and name not in (query_column, split_column):
            raise InputError(
                f"{table.label} has a column '{name}', a name that rewards receive from rlprompt; "
                "rename the column"
            )
    expected = set(first)
    for position, row in enumerate(table.rows):
        if row.keys() == expected:
            continue
        name = sorted(expected.symmetric_difference(row))[0]
        states = "lacks" if name in expected else "has"
        other = "has" if name in expected else "lacks"
        raise InputError(
            f"{table.where(position)} {states} the column '{name}', which {table.where(0)} "
            f"{other}; give every row the same columns (null where there is no value)"
        )


def _missing_column_message(label: str, setting: str, column: str, present: list[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in present) or "none"
    near = difflib.get_close_matches(column, present, n=1)
    if not near and setting == "query_column":
        near = [name for name in USUAL_COLUMNS if name in present][:1]
    advice = f"set {setting}: {near[0]}" if near else f"set {setting} to one of them"
    return f"{label} has no column '{column}', its columns are {listed}; {advice}"


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where} is empty text; write a query or remove the row")
        _check_encodable(value, where)
        return ({"role": "user", "content": value},)
    if not isinstance(value, list):
        raise InputError(
            f"{where} holds {_shown(value)}; it must be text or a list of messages "
            "with role and content"
        )
    if not value:
        raise InputError(f"{where} is an empty conversation; add a user turn or remove the row")
    turns = tuple(_message(turn, i, f"{where} turn {i + 1}") for i, turn in enumerate(value))
    if turns[-1]["role"] != "user":
        raise InputError(
            f"{where} ends with the assistant's turn; a query must end with the user's, "
            "remove the last turn"
        )
    return turns


def _message(turn: Any, position: int, where: str) -> Message:
    """Check one turn; the user has the even positions, the assistant the odd ones."""
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise InputError(f"{where} is not a message; write a mapping with role and content")
    role, content = turn["role"], turn["content"]
    if role == "system":
        raise InputError(
            f"{where} is a system turn, the place of the learned prompt; remove it from the data"
        )
    expected = ("user", "assistant")[position % 2]
    if role != expected:
        raise InputError(
            f"{where} has the role {role!r} where '{expected}' is due; user and assistant must "
            "alternate, the user first"
        )
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"{where} has the content {_shown(content)}; it must be non-empty text")
    # Arrow fills the fields that only other turns have with nulls; those say nothing.
    others = [name for name in turn if name not in ("role", "content") and turn[name] is not None]
    if others:
        raise InputError(f"{where} has the field {others[0]!r} besides role and content; remove it")
    _check_encodable(content, where)
    return {"role": role, "content": content}


def _check_encodable(text: str, where: str) -> None:
    # JSON can spell half of a surrogate pair, which no tokenizer takes.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} has half of a surrogate pair at character {error.start + 1}; write the "
            "whole character"
        ) from error


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
