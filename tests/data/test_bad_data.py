"""Every wrong dataset gets one sentence: what, where, what to do."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from rlprompt.data import DataSettings, load_queries
from rlprompt.errors import InputError

GOOD = ["What is snow?", "What is ice?", "What is rain?"]
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}


def message_of(settings: DataSettings, base_dir: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_queries(settings, base_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([], "data.rows is empty; write at least one query"),
        (["Hi", 3], "data.rows row 2 is a number; a row must be text or a mapping"),
        (["Hi", True], "data.rows row 2 is a boolean"),
        ([["Hi"]], "data.rows row 1 is a list"),
        ([{"query": "Hi", 3: "x"}], "has the column name 3, which is not text; put it in quotes"),
        (["Hi", " \n"], "data.rows row 2, column 'query', is empty text; write a query"),
        ([{"query": 5}], "row 1, column 'query', holds 5; it must be text or a list of messages"),
        ([{"query": None}], "holds None; it must be text"),
        ([{"query": USER}], "it must be text or a list of messages with role and content"),
        ([{"question": "Hi", "id": 1}], "its columns are 'question', 'id'; set query_column: que"),
        ([{"id": 1, "prompt": "Hi"}], "no column 'query', its columns are 'id', 'prompt'; set qu"),
        ([{"a": "Hi", "b": 1}], "its columns are 'a', 'b'; set query_column to one of them"),
        ([{}], "data.rows has no column 'query', its columns are none"),
        (
            [{"query": "Hi", "a": 1}, {"query": "Ho"}],
            "data.rows row 2 lacks the column 'a', which data.rows row 1 has; give every row",
        ),
        (
            [{"query": "Hi"}, {"query": "Ho", "a": 1}],
            "data.rows row 2 has the column 'a', which data.rows row 1 lacks",
        ),
        (
            [{"query": "Hi", "completions": 1}],
            "has a column 'completions', a name that rewards receive from rlprompt; rename",
        ),
        (["Hi", {"query": [USER]}], "row 2 holds a conversation while data.rows row 1 holds text"),
        ([{"query": [USER]}, "Hi"], "row 2 holds text while data.rows row 1 holds a conversation"),
        ([{"query": []}], "row 1, column 'query', is an empty conversation; add a user turn"),
        (
            [{"query": [{"role": "system", "content": "Be nice"}, USER]}],
            "turn 1 is a system turn, the place of the learned prompt; remove it from the data",
        ),
        ([{"query": [USER, ASSISTANT]}], "ends with the assistant's turn; a query must end"),
        ([{"query": [ASSISTANT, USER]}], "turn 1 has the role 'assistant' where 'user' is due"),
        ([{"query": [USER, USER]}], "turn 2 has the role 'user' where 'assistant' is due"),
        ([{"query": [{"role": "tool", "content": "x"}]}], "has the role 'tool' where 'user'"),
        ([{"query": [{"role": "user"}]}], "turn 1 is not a message; write a mapping with role"),
        ([{"query": ["Hello"]}], "turn 1 is not a message"),
        ([{"query": [{"role": "user", "content": ""}]}], "has the content ''; it must be non-em"),
        ([{"query": [{"role": "user", "content": [1]}]}], "has the content [1]; it must be non-"),
        ([{"query": [{**USER, "name": "Ann"}]}], "has the field 'name' besides role and content"),
        (["Hi \ud83d there"], "has half of a surrogate pair at character 4; write the whole"),
        (["Hi"], "data.rows gives 1 distinct query, too few to hold out 1 and train on the rest"),
        (["Hi", "hi!"], "data.rows gives 1 distinct query"),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: list[Any], sentence: str) -> None:
    assert sentence in message_of(DataSettings(rows=rows), tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("a.jsonl", b"", "the data file 'a.jsonl' holds no rows; add queries to it"),
        ("a.json", b"[]", "the data file 'a.json' holds no rows"),
        ("a.csv", b"", "the data file 'a.csv' holds no rows"),
        ("a.csv", b"query,id\n", "the data file 'a.csv' holds no rows"),
        (
            "a.jsonl",
            b'{"query": "Hi"}\n\n{"query": "Ho"\n',
            "a.jsonl line 3 is not valid JSON (Expecting ',' delimiter at column 15); write one",
        ),
        ("a.jsonl", b'{"query": "Hi"}\n[1]\n', "a.jsonl line 2 is a list; a row must be text"),
        ("a.jsonl", b'{"query": "Hi"}\n{"query": 1}\n', "a.jsonl line 2, column 'query', holds 1"),
        ("a.jsonl", b'{"query": "Hi"}\n"caf\xe9"\n', "a.jsonl line 2 is not UTF-8 text; save the"),
        ("a.json", b'[\n{"query": "Hi"},\n]', "a.json line 3 is not valid JSON"),
        ("a.json", b'{"query": "Hi"}\n{"query": "Ho"}', "rename it to end in .jsonl"),
        ("a.json", b'{"query": "Hi"}', "a.json holds a JSON mapping at its top; it must be a list"),
        ("a.csv", b"query,id\nHi,1\nHi, you,2\n", "a.csv line 3 has 3 cells where the header has"),
        ("a.csv", b'query,id\n"Hi,1\n', "is not valid CSV (unexpected end of data); mend it"),
        ("a.csv", b"query,id,id\nHi,1,2\n", "names the column 'id' twice in its header; rename"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read as Parquet"),
        ("a.txt", b"Hi\n", "'a.txt' is not of a type that is read; use .jsonl, .json, .csv or"),
    ],
)
def test_wrong_files(tmp_path: Path, file: str, content: bytes, sentence: str) -> None:
    (tmp_path / file).write_bytes(content)
    assert sentence in message_of(DataSettings(path=file), tmp_path)


def test_missing_file_names_near_ones(tmp_path: Path) -> None:
    for name in ("everyday.jsonl", "everyday.csv", "notes.md"):
        (tmp_path / name).write_text("x")
    message = message_of(DataSettings(path="evryday.jsonl"), tmp_path)
    assert f"'evryday.jsonl' does not exist in {tmp_path}; did you mean everyday.jsonl" in message
    far = message_of(DataSettings(path="zzz.parquet"), tmp_path)
    assert "did you mean everyday.csv or everyday.jsonl?" in far


def test_missing_folder_and_empty_folder(tmp_path: Path) -> None:
    assert "nor does its folder" in message_of(DataSettings(path="no/a.jsonl"), tmp_path)
    assert "no data file is there" in message_of(DataSettings(path="a.jsonl"), tmp_path)


def test_folder_as_path(tmp_path: Path) -> None:
    (tmp_path / "queries").mkdir()
    assert "'queries' is a folder; name one file" in message_of(
        DataSettings(path="queries"), tmp_path
    )


def test_neither_file_nor_hub_id(tmp_path: Path) -> None:
    message = message_of(DataSettings(path="everyday"), tmp_path)
    assert "'everyday' is neither a file ending in .jsonl" in message
    assert "nor a hub id of the form owner/name" in message


@pytest.mark.parametrize(("setting", "value"), [("name", "main"), ("split", "test")])
def test_hub_settings_on_local_data(tmp_path: Path, setting: str, value: str) -> None:
    (tmp_path / "a.jsonl").write_text('"Hi"\n')
    for source in ({"path": "a.jsonl"}, {"rows": ["Hi"]}):
        settings = DataSettings.model_validate({**source, setting: value})
        assert f"data.{setting} is for hub datasets and has no effect" in message_of(
            settings, tmp_path
        )


def test_too_few_to_hold_out(tmp_path: Path) -> None:
    message = message_of(DataSettings(rows=GOOD, heldout=3), tmp_path)
    assert "gives 3 distinct queries, too few to hold out 3 and train on the rest" in message
    assert "(0 holds out none)" in message


def test_wrong_split_columns(tmp_path: Path) -> None:
    def message(sides: list[Any]) -> str:
        rows = [{"query": text, "side": side} for text, side in zip(GOOD, sides, strict=True)]
        return message_of(DataSettings(rows=rows, split_column="side"), tmp_path)

    wanted = "in the split column 'side'; write 'train', 'validation' or 'test'"
    for wrong in ("tests", "", None, 1, ["train"], {"split": "train"}):
        assert f"row 2 has {wrong!r} {wanted}" in message(["train", wrong, "heldout"])
    assert "no row of data.rows has 'validation' in the split column" in message(["train"] * 3)
    assert "no row of data.rows has 'validation'" in message(["train", "test", "test"])
    assert "no row of data.rows has 'train' in the split column" in message(["heldout"] * 3)
    settings = DataSettings(rows=[{"query": "Hi", "sides": "train"}], split_column="side")
    assert "no column 'side', its columns are 'query', 'sides'; set split_column: sides" in (
        message_of(settings, tmp_path)
    )


SIDES = ("train", "validation", "test")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SIDES, 2)))
def test_overlap_in_the_split_column(one: str, other: str, tmp_path: Path) -> None:
    rows = [{"query": f"What is {side}?", "side": side} for side in SIDES]
    rows += [{"query": "What is snow?", "side": one}, {"query": "what is SNOW", "side": other}]
    message = message_of(DataSettings(rows=rows, split_column="side"), tmp_path)
    assert f"the query 'what is snow' is in both {one} (data.rows row 4) and {other}" in message
    assert "(data.rows row 5); remove it from one" in message


def test_heldout_file_that_does_not_fit(tmp_path: Path) -> None:
    def message(content: str) -> str:
        (tmp_path / "held.jsonl").write_text(content)
        return message_of(DataSettings(rows=GOOD, heldout_path="held.jsonl"), tmp_path)

    assert "is in both train (data.rows row 2) and validation (held.jsonl line 2)" in message(
        '"What is fog?"\n"What is ICE"\n'
    )
    assert "only one of data.rows and held.jsonl has the column 'id'" in message(
        '{"query": "What is fog?", "id": 1}\n'
    )
    assert "holds text, the other conversations" in message(
        '{"query": [{"role": "user", "content": "What is fog?"}]}\n'
    )
    assert "'held.jsonl' holds no rows" in message("")


def test_test_file_that_does_not_fit(tmp_path: Path) -> None:
    def message(content: str, **settings: Any) -> str:
        (tmp_path / "test.jsonl").write_text(content)
        values = {"rows": GOOD, "test": {"path": "test.jsonl"}, **settings}
        return message_of(DataSettings.model_validate(values), tmp_path)

    assert "is in both train (data.rows row 2) and test (test.jsonl line 2)" in message(
        '"What is fog?"\n"What is ICE"\n', heldout=0
    )
    held = {"rows": GOOD[:2], "heldout_path": "held.jsonl"}
    (tmp_path / "held.jsonl").write_text('"What is fog?"\n')
    assert "is in both validation (held.jsonl line 1) and test (test.jsonl line 1)" in message(
        '"what is fog"\n', **held
    )
    assert "only one of data.rows and test.jsonl has the column 'id'" in message(
        '{"query": "What is fog?", "id": 1}\n'
    )
    assert "'test.jsonl' holds no rows" in message("")
    rows = [{"query": text, "side": side} for text, side in zip(GOOD, SIDES, strict=True)]
    both = message('{"query": "What is fog?", "side": "test"}\n', rows=rows, split_column="side")
    assert "are in 'test.jsonl' and marked in the split column 'side' of data.rows" in both
    rows[2]["side"] = "validation"
    stray = message('{"query": "What is fog?", "side": "val"}\n', rows=rows, split_column="side")
    assert "test.jsonl line 1 is for the test split and has 'val'" in stray
    missing = DataSettings.model_validate({"rows": GOOD, "test": {"path": "no.jsonl"}})
    assert "'no.jsonl' does not exist" in message_of(missing, tmp_path)


def test_overlap_beyond_max_queries_is_still_refused(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text("".join(f'"{text}"\n' for text in GOOD))
    for beside in ({"heldout_path": "held.jsonl"}, {"test": {"path": "held.jsonl"}, "heldout": 0}):
        values = {"rows": ["Why?", "How?", *GOOD], "max_queries": 2, **beside}
        message = message_of(DataSettings.model_validate(values), tmp_path)
        assert "is in both train (data.rows row" in message


def test_too_few_to_hold_out_and_test_on(tmp_path: Path) -> None:
    message = message_of(DataSettings(rows=GOOD, heldout=1, test=2), tmp_path)
    assert "too few to hold out 1, test on 2 and train on the rest" in message
    assert "lower data.heldout or data.test (0 holds out none)" in message
    shares = message_of(DataSettings(rows=GOOD, heldout=0.5, test=0.5), tmp_path)
    assert "too few to hold out 2, test on 2" in shares
    held = DataSettings(rows=GOOD, heldout=0, test=3)
    assert (
        "too few to test on 3 and train on the rest; add queries, or lower data.test (0"
        in message_of(held, tmp_path)
    )


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    assert "'loop.jsonl'" in message_of(DataSettings(path="loop.jsonl"), tmp_path)
