"""Turns rows into queries: checks columns, messages and their roles.

A query column holds plain text or a conversation. Every problem is reported with the place of its
row, before any model is loaded.
"""

from __future__ import annotations

import difflib
import json
import logging
import unicodedata
from collections.abc import Sequence
from typing import Any

from rlprompt.data.answers import (
    USUAL_COLUMNS,
    read_answer,
    system_text,
    with_implicit_queries,
)
from rlprompt.data.base import SystemTurns, Table
from rlprompt.data.messages import (
    Conversation,
    check_encodable,
    is_message,
    read_conversation,
    shown,
)
from rlprompt.errors import InputError
from rlprompt.types import Query

logger = logging.getLogger(__name__)

# Keywords that a reward function is called with besides the columns.
RESERVED_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)
# A conversation in these is what is asked, so it must end with the user's turn. In any other column
# the assistant's last turn is the answer, as in ShareGPT's `conversations` and TRL's `messages`.
ASKED_COLUMNS = ("query", "prompt")
ANSWER_COLUMN = "completion"
# Marks of a sentence. Signs such as + - * / # are left alone: they tell 5+3 from 5-3, C from C#.
SENTENCE_MARKS = ".,;:!?\"'`()[]{}\u2018\u2019\u201c\u201d\u00ab\u00bb\u2026\u00bf\u00a1"


def build_queries(
    table: Table,
    query_column: str,
    split_column: str | None = None,
    first_index: int = 0,
    *,
    system: SystemTurns = "refuse",
    answers: Sequence[str] = (),
) -> list[Query]:
    """Turn every row of a table into a query, in order.

    Args:
        table: The rows.
        query_column: The column with the text or the conversation.
        split_column: The column left out of `Query.columns`, None for none.
        first_index: `Query.index` of the first row.
        system: The use of system turns; whoever begins with one asks `common_system` for it.
        answers: The columns with the answers that an algorithm learns from.

    Returns:
        One query per row; `columns` holds all other columns, and the answer of a conversation that
        has one.

    Raises:
        InputError: A column is missing, reserved or not in every row; a query is neither text nor
            a valid conversation; an answer is none; or the rows mix both forms.
    """
    table, answers = with_implicit_queries(table, query_column, answers)
    _check_columns(table, query_column, split_column)
    found = [
        _asked(row[query_column], query_column, system, _place(table, i, query_column))
        for i, row in enumerate(table.rows)
    ]
    left_out = {query_column, split_column}
    columns = [
        {name: cell for name, cell in row.items() if name not in left_out} for row in table.rows
    ]
    answer_column = answers[0] if len(answers) == 1 else ANSWER_COLUMN
    _add_answers(table, columns, found, answer_column)
    _read_answers(table, columns, found, answers)
    _report(table, found, answer_column, system)
    queries: list[Query] = []
    for position, row in enumerate(table.rows):
        conversational = not isinstance(row[query_column], str)
        if queries and conversational != queries[0].conversational:
            forms = ("text", "a conversation")
            raise InputError(
                f"{table.where(position)} holds {forms[conversational]} while {table.where(0)} "
                f"holds {forms[not conversational]} in column '{query_column}'; use one form "
                "throughout"
            )
        turns, index = found[position].turns, first_index + position
        place = table.where(position)
        queries.append(Query(turns, columns[position], index, conversational, place))
    return queries


def common_system(tables: Sequence[Table], query_column: str, answers: Sequence[str]) -> str:
    """The system turn that all rows begin with, as the start of a prompt.

    Args:
        tables: The tables whose queries were built.
        query_column: Their column with the text or the conversation.
        answers: Their columns with answers.

    Raises:
        InputError: No row has one, or two rows have different ones.
    """
    first: tuple[str, str] | None = None
    for given in tables:
        table, _ = with_implicit_queries(given, query_column, answers)
        for position, row in enumerate(table.rows):
            text = system_text(row[query_column])
            if not text:
                continue
            if first is not None and text != first[0]:
                raise InputError(
                    f"{table.where(position)} has another system turn than {first[1]}, and "
                    "data.system: init needs one text; set data.system: drop, and write the start "
                    "as prompt.init_text"
                )
            first = first or (text, table.where(position))
    if first is None:
        raise InputError(
            f"{tables[0].label} has no system turn for data.system: init to start from; write "
            "the start as prompt.init_text and remove data.system"
        )
    return first[0]


def _place(table: Table, position: int, column: str) -> str:
    return f"{table.where(position)}, column '{column}',"


def _add_answers(
    table: Table, columns: Sequence[dict[str, Any]], found: Sequence[Conversation], name: str
) -> None:
    """Put the answers of whole conversations into a column, None where a row has none."""
    answered = [i for i, each in enumerate(found) if each.answer is not None]
    if not answered:
        return
    if name in columns[0]:
        raise InputError(
            f"{table.where(answered[0])} ends with the assistant's turn and has a column '{name}' "
            "too; remove one of the two answers"
        )
    for row, each in zip(columns, found, strict=True):
        given = each.answer
        row[name] = None if given is None else [{"role": "assistant", "content": given}]


def _read_answers(
    table: Table,
    columns: Sequence[dict[str, Any]],
    found: Sequence[Conversation],
    answers: Sequence[str],
) -> None:
    for column in answers:
        if column not in columns[0]:
            known = ", ".join(f"'{name}'" for name in columns[0]) or "none"
            raise InputError(
                f"{table.label} has no column '{column}' with answers, its other columns are "
                f"{known}; name the column that holds them in the algorithm's settings"
            )
        for position, row in enumerate(columns):
            place = _place(table, position, column)
            row[column] = read_answer(row[column], found[position], place)


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


def _asked(value: Any, column: str, system: SystemTurns, where: str) -> Conversation:
    """What a row asks; without a system turn unless one may be there."""
    if isinstance(value, str):
        if not value.strip():
            raise InputError(f"{where} is empty text; write a query or remove the row")
        check_encodable(value, where)
        _refuse_written_out(value, where)
        return Conversation(None, ({"role": "user", "content": value},), None)
    if not isinstance(value, list):
        raise InputError(
            f"{where} holds {shown(value)}; it must be text or a list of messages "
            "with role and content"
        )
    found = read_conversation(value, where)
    if found.system is not None and system == "refuse":
        raise InputError(
            f"{where} turn 1 is a system turn, the place of the learned prompt; remove it from the "
            "data, or set data.system: drop to leave it out, or init to start from it"
        )
    if found.answer is not None and column in ASKED_COLUMNS:
        raise InputError(
            f"{where} ends with the assistant's turn; a query must end with the user's, remove the "
            f"last turn (or name the column messages: its last turn is then the answer)"
        )
    return found


def _refuse_written_out(text: str, where: str) -> None:
    """Refuse a conversation that a CSV cell holds as JSON: it would be asked with its brackets."""
    if not text.lstrip().startswith("[{"):
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    if all(is_message(each) for each in value):
        raise InputError(
            f"{where} is text that holds a list of messages as JSON; write the rows as JSONL or "
            "Parquet, where a column can be a list"
        )


def _report(
    table: Table, found: Sequence[Conversation], answer_column: str, system: SystemTurns
) -> None:
    """Say what was taken out of conversations; nothing is left out in silence."""
    texts = {each.system for each in found} - {None}
    systems = sum(each.system is not None for each in found)
    if systems:
        logger.warning(
            "%s: left out the system turns of %d rows (%d different texts)",
            table.label,
            systems,
            len(texts),
        )
    elif system == "drop":
        logger.warning("%s: data.system: drop has nothing to leave out; remove it", table.label)
    answers = sum(each.answer is not None for each in found)
    if answers:
        logger.info(
            "%s: %d conversations end with the assistant's turn, which is now their column '%s'",
            table.label,
            answers,
            answer_column,
        )
