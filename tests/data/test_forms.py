"""Datasets as others write them: accepted, or told in one sentence with file and line."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlprompt.data import DataSettings, QuerySplit, load_queries
from rlprompt.errors import InputError

SYSTEM = {"role": "system", "content": "You are brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
ANSWER = {"role": "assistant", "content": "Air scatters blue light."}
WORSE = {"role": "assistant", "content": "No idea."}
MORE = {"role": "user", "content": "And at night?"}
THIRD = {"role": "user", "content": "Who are you?"}


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Turns as ShareGPT writes them."""
    return [{"from": speaker, "value": text} for speaker, text in turns]


def written(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def load(
    folder: Path, rows: Sequence[Any], answers: Sequence[str] = (), **settings: Any
) -> QuerySplit:
    path = written(folder, rows)
    return load_queries(DataSettings(path=path, heldout=0, **settings), folder, answers=answers)


def told(folder: Path, rows: Sequence[Any], answers: Sequence[str] = (), **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, rows, answers, **settings)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("rows.jsonl")
    return message


def test_sharegpt_rows_become_queries_and_their_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"id": "a", "conversations": said(("human", "Hi"), ("gpt", "Hello"))},
        {"id": "b", "conversations": said(("human", "A"), ("gpt", "B"), ("human", "C"))},
        {"id": "c", "conversations": said(("user", "D"), ("assistant", "E"))},
    ]
    with caplog.at_level(logging.INFO, logger="rlprompt.data"):
        split = load(tmp_path, rows, query_column="conversations")
    found = {query.columns["id"]: query for query in split.train}
    assert found["a"].messages == ({"role": "user", "content": "Hi"},)
    assert found["a"].columns["completion"] == [{"role": "assistant", "content": "Hello"}]
    assert [turn["role"] for turn in found["b"].messages] == ["user", "assistant", "user"]
    assert found["b"].columns["completion"] is None and found["b"].conversational
    assert found["c"].messages[0]["content"] == "D"
    assert "2 conversations end with the assistant's turn" in caplog.text


@pytest.mark.parametrize("column", ["messages", "conversations", "dialogue"])
def test_role_and_content_are_read_in_a_column_of_any_name(tmp_path: Path, column: str) -> None:
    split = load(tmp_path, [{column: [USER, ANSWER, MORE, WORSE]}], query_column=column)
    assert split.train[0].messages == (USER, ANSWER, MORE)
    assert split.train[0].columns == {"completion": [WORSE]}


def test_the_answer_goes_to_the_column_that_the_algorithm_reads(tmp_path: Path) -> None:
    split = load(tmp_path, [{"messages": [USER, ANSWER]}], ["target"], query_column="messages")
    assert split.train[0].columns == {"target": [ANSWER]}
    rows = [{"messages": [USER, ANSWER], "completion": "x"}]
    assert "and has a column 'completion' too; remove one" in told(
        tmp_path, rows, query_column="messages"
    )


def test_arrow_fills_other_fields_with_nulls(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ho", "url": None}]}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = DataSettings(path="rows.parquet", query_column="messages", heldout=0)
    split = load_queries(settings, tmp_path)
    assert sorted(query.text for query in split.train) == ["Hi", "Ho"]


def test_text_parts_are_joined_as_templates_join_them(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "snow?"}]
    split = load(
        tmp_path, [{"prompt": [{"role": "user", "content": parts}]}], query_column="prompt"
    )
    assert split.train[0].text == "What is snow?"


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"type": "image", "image": "a.png"}, "turn 1 has a part of type 'image'; only text is"),
        ({"type": "image_url", "image_url": {"url": "a"}}, "has a part of type 'image_url'"),
        ({"type": "input_audio", "input_audio": {}}, "has a part of type 'input_audio'"),
        ({"type": "text"}, "has the part {'type': 'text'}, which has no text"),
        ({"type": "text", "text": 3}, "which has no text"),
        ({"type": "text", "text": "a", "cache": 1}, "a part with the field 'cache' besides its"),
    ],
)
def test_other_parts_are_refused(tmp_path: Path, part: dict[str, Any], sentence: str) -> None:
    text = {"type": "text", "text": "Look:"}
    rows = [{"query": [USER]}, {"query": [{"role": "user", "content": [text, part]}]}]
    message = told(tmp_path, rows)
    assert message.startswith("rows.jsonl line 2, column 'query', turn 1") and sentence in message


def test_the_system_turn_is_refused_unless_the_recipe_says_more(tmp_path: Path) -> None:
    for row in ([SYSTEM, USER], said(("system", "You are brief."), ("human", "Hi"))):
        message = told(tmp_path, [{"query": [USER]}, {"query": row}])
        assert "line 2, column 'query', turn 1 is a system turn" in message
        assert "data.system: drop" in message and "init" in message
    developer = {"role": "developer", "content": "Be brief."}
    assert "is a system turn" in told(tmp_path, [{"query": [developer, USER]}])


def test_a_dropped_system_turn_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = {"role": "system", "content": "Be long."}
    rows = [{"query": [SYSTEM, USER]}, {"query": [other, MORE]}, {"query": [THIRD]}]
    with caplog.at_level(logging.WARNING, logger="rlprompt.data"):
        split = load(tmp_path, rows, system="drop")
    assert {query.messages[0]["content"] for query in split.train} == {
        turn["content"] for turn in (USER, MORE, THIRD)
    }
    assert split.system is None
    assert "left out the system turns of 2 rows (2 different texts)" in caplog.text
    with caplog.at_level(logging.WARNING, logger="rlprompt.data"):
        load(tmp_path, [{"query": [USER]}], system="drop")
    assert "data.system: drop has nothing to leave out" in caplog.text


def test_an_empty_system_turn_says_nothing(tmp_path: Path) -> None:
    for text in ("", " \n", None):
        rows = [{"query": [{"role": "system", "content": text}, USER]}]
        assert load(tmp_path, rows).train[0].messages == (USER,)


def test_one_system_turn_can_be_the_start(tmp_path: Path) -> None:
    rows = [
        {"query": [SYSTEM, USER]},
        {"query": [MORE]},
        {"query": said(("system", "You are brief. "), ("human", "Who?"))},
    ]
    assert load(tmp_path, rows, system="init").system == "You are brief."
    rows.append({"query": [{"role": "system", "content": "Be long."}, {**USER, "content": "E"}]})
    message = told(tmp_path, rows, system="init")
    assert "line 4 has another system turn than rows.jsonl line 1" in message
    assert "has no system turn for data.system: init" in told(
        tmp_path, [{"query": [USER]}], system="init"
    )
    held = written(
        tmp_path, [{"query": [{"role": "system", "content": "Go."}, MORE]}], "held.jsonl"
    )
    settings = DataSettings(rows=[{"query": [SYSTEM, USER]}], heldout_path=held, system="init")
    with pytest.raises(InputError, match=r"held\.jsonl line 1 has another system turn than data"):
        load_queries(settings, tmp_path)


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        (said(("tool", "x")), "turn 1 is from 'tool', which is neither human, gpt nor system"),
        (said(("gpt", "x"), ("human", "y")), "turn 1 has the role 'assistant' where 'user' is due"),
        (said(("human", "x"), ("human", "y")), "turn 2 has the role 'user' where 'assistant'"),
        ([USER, ANSWER, SYSTEM, MORE], "turn 3 is a system turn after others"),
        ([SYSTEM, SYSTEM, USER], "turn 2 is a system turn after others"),
        ([SYSTEM], "holds a system turn alone"),
        ([{"from": "human", "content": "x"}], "turn 1 is not a message; write a mapping with role"),
        ([{"from": "human", "value": "x", "weight": 0}], "the field 'weight' besides from"),
        ([{"from": 3, "value": "x"}], "turn 1 is from 3"),
        ([{"role": ["user"], "content": "x"}], "turn 1 has the role"),
        ([USER, {**ANSWER, "tool_calls": [{"id": 1}]}], "turn 2 has the field 'tool_calls'"),
        ([USER, {"role": "assistant", "content": None}], "turn 2 has the content None"),
    ],
)  # fmt: skip
def test_wrong_conversations_are_told(tmp_path: Path, turns: list[Any], sentence: str) -> None:
    rows = [{"chat": [USER]}, {"chat": turns}]
    message = told(tmp_path, rows, query_column="chat", system="drop")
    assert message.startswith("rows.jsonl line 2, column 'chat',") and sentence in message


def test_what_is_asked_ends_with_the_user(tmp_path: Path) -> None:
    for column in ("query", "prompt"):
        message = told(tmp_path, [{column: [USER, ANSWER]}], query_column=column)
        assert "ends with the assistant's turn" in message and "messages" in message


def test_the_usual_columns_are_named(tmp_path: Path) -> None:
    for column in ("prompt", "messages", "conversations"):
        message = told(tmp_path, [{"id": 1, column: [USER]}])
        assert message.endswith(f"set query_column: {column}")


PAIRS: list[dict[str, Any]] = [
    {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
    {"chosen": [USER, ANSWER, MORE, ANSWER], "rejected": [USER, ANSWER, MORE, WORSE]},
    {"chosen": said(("human", "A"), ("gpt", "B")), "rejected": said(("human", "A"), ("gpt", "C"))},
]


@pytest.mark.parametrize("answers", [(), ("chosen", "rejected")], ids=["rewards", "pairs"])
def test_preference_rows_with_an_implicit_prompt(tmp_path: Path, answers: Sequence[str]) -> None:
    split = load(tmp_path, PAIRS, answers)
    found = {query.index: query for query in split.train}
    assert found[0].messages == (USER,) and found[1].messages == (USER, ANSWER, MORE)
    assert found[2].messages == ({"role": "user", "content": "A"},)
    for query in split.train:
        assert [len(query.columns[name]) for name in ("chosen", "rejected")] == [1, 1]
    assert found[1].columns == {"chosen": [ANSWER], "rejected": [WORSE]}


def test_implicit_prompts_in_columns_with_other_names(tmp_path: Path) -> None:
    rows = [{"better": [USER, ANSWER], "worse": [USER, WORSE], "score": 1}]
    split = load(tmp_path, rows, ["better", "worse"])
    assert split.train[0].columns == {"better": [ANSWER], "worse": [WORSE], "score": 1}
    assert "has no column 'query'" in told(tmp_path, rows)


def test_implicit_prompts_may_begin_with_a_system_turn(tmp_path: Path) -> None:
    rows = [{"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, WORSE]}]
    assert "turn 1 is a system turn" in told(tmp_path, rows)
    split = load(tmp_path, rows, system="drop")
    assert split.train[0].messages == (USER,) and split.train[0].columns["chosen"] == [ANSWER]
    assert load(tmp_path, rows, system="init").system == "You are brief."


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"chosen": [USER, ANSWER], "rejected": [MORE, WORSE]}, "differ before their last turn"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "'rejected', ends with the user's turn"),
        ({"chosen": [USER, ANSWER], "rejected": "No."}, "'rejected', is text, and no column holds"),
        ({"chosen": [USER, ANSWER], "rejected": None}, "'rejected', holds None; write a list"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "turn 1 has the role 'assistant' where 'user'"),
        ({"chosen": [], "rejected": [USER, WORSE]}, "'chosen', is an empty conversation"),
    ],
)
def test_wrong_implicit_prompts_are_told(
    tmp_path: Path, row: dict[str, Any], sentence: str
) -> None:
    message = told(tmp_path, [PAIRS[0], row], ["chosen", "rejected"])
    assert message.startswith("rows.jsonl line 2") and sentence in message


def test_a_pair_of_texts_without_a_query_is_told(tmp_path: Path) -> None:
    rows = [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi"}]
    assert "line 1, column 'chosen', is text, and no column holds the query" in told(tmp_path, rows)
    rows = [{"prompt": "Hi", "chosen": "Yes", "rejected": "No"}]
    assert told(tmp_path, rows, ["chosen", "rejected"]).endswith("set query_column: prompt")


def test_answers_that_repeat_the_query_are_cut_to_the_answer(tmp_path: Path) -> None:
    text = {"query": USER["content"], "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}
    turns = {**text, "query": [USER]}
    single = {"query": [USER], "chosen": {"from": "gpt", "value": "Y"}, "rejected": [WORSE]}
    for row in (text, turns):
        split = load(tmp_path, [row], ["chosen", "rejected"])
        assert split.train[0].columns == {"chosen": [ANSWER], "rejected": [WORSE]}
    chosen = load(tmp_path, [single], ["chosen", "rejected"]).train[0].columns["chosen"]
    assert chosen == [{"role": "assistant", "content": "Y"}]


def test_trl_prompts_and_completions(tmp_path: Path) -> None:
    for row in (
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
    ):
        split = load(tmp_path, [row], ["completion"], query_column="prompt")
        assert split.train[0].columns == {"completion": row["completion"]}


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("  ", "'completion', holds no answer but '  '; write a non-empty text"),
        (None, "holds no answer but None"),
        ([], "holds no answer but []"),
        ([USER], "has one turn, with the role 'user'; an answer is the assistant's"),
        ([MORE, ANSWER], "is a conversation that does not begin with the row's query"),
        ([SYSTEM, USER, ANSWER], "is a conversation that does not begin with the row's query"),
        ([USER, ANSWER, MORE], "ends with the user's turn; add the assistant's answer"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "has a part of type 'image'"),
    ],
)
def test_wrong_answers_are_told_before_the_model_loads(
    tmp_path: Path, answer: Any, sentence: str
) -> None:
    rows = [{"query": [MORE], "completion": "A"}, {"query": [USER], "completion": answer}]
    message = told(tmp_path, rows, ["completion"])
    assert message.startswith("rows.jsonl line 2, column 'completion',") and sentence in message
    assert "no column 'completion' with answers" in told(tmp_path, [{"query": "A"}], ["completion"])


def test_a_query_column_with_a_usual_name_is_not_passed_over(tmp_path: Path) -> None:
    for chosen, rejected in (([ANSWER], [WORSE]), ([USER, ANSWER], [USER, WORSE])):
        rows = [{"prompt": [USER], "chosen": chosen, "rejected": rejected}]
        assert told(tmp_path, rows, ["chosen", "rejected"]).endswith("set query_column: prompt")


def test_a_conversation_written_out_in_a_csv_cell_is_told(tmp_path: Path) -> None:
    cell = json.dumps([USER]).replace('"', '""')
    (tmp_path / "rows.csv").write_text(f'id,messages\n1,What is snow?\n2,"{cell}"\n')
    settings = DataSettings(path="rows.csv", query_column="messages", heldout=0)
    with pytest.raises(InputError, match=r"rows\.csv line 3.* holds a list of messages as JSON"):
        load_queries(settings, tmp_path)
    texts = ['[{"a": 1}]', "[{not JSON", "[1, 2]", "[{" * 3000]
    assert len(load(tmp_path, texts).train) == 4  # other text is asked as it is
