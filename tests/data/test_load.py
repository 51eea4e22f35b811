"""load_queries: reading, dividing, deduplicating, and the content of queries."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlprompt.data import DataSettings, load_queries

WORDS = [f"What is thing number {i}?" for i in range(20)]
ROWS = [{"query": text, "answer": f"thing {i}"} for i, text in enumerate(WORDS)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1))
    elif file.suffix == ".csv":
        quoted = [",".join(f'"{cell}"' for cell in row.values()) for row in rows]
        file.write_text("\n".join([",".join(rows[0]), *quoted]), encoding="utf-8-sig")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".JSONL"])
def test_all_file_types_give_what_rows_give(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "deep" / f"set{suffix.lower()}", ROWS)
    (tmp_path / "deep" / f"set{suffix.lower()}").rename(tmp_path / "deep" / f"set{suffix}")
    from_file = load_queries(DataSettings(path=f"deep/set{suffix}"), tmp_path)
    from_rows = load_queries(DataSettings(rows=ROWS), tmp_path)
    assert from_file == from_rows
    assert (len(from_file.train), len(from_file.heldout)) == (16, 4)
    for query in from_file.train + from_file.heldout:
        assert query.text == WORDS[query.index]
        assert query.columns == {"answer": f"thing {query.index}"}
        assert not query.conversational


def test_strings_and_absolute_paths(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text('"What is snow?"\n"What is ice?"\n')
    split = load_queries(
        DataSettings(path=str(file), query_column="question"), Path("/does/not/exist")
    )
    assert {query.text for query in split.train + split.heldout} == {
        "What is snow?",
        "What is ice?",
    }
    assert split.train[0].columns == {}


def test_csv_cells_stay_text_and_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text('query,answer\n"One,\ntwo?",007\nThree?,NA\n')
    split = load_queries(DataSettings(path="set.csv", heldout=0), tmp_path)
    answers = {query.text: query.columns["answer"] for query in split.train}
    assert answers == {"One,\ntwo?": "007", "Three?": "NA"}


def test_line_separators_inside_a_query_do_not_cut_it(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"query": "one\u2028two"}\r\n{"query": "three"}\r\n')
    split = load_queries(DataSettings(path="set.jsonl", heldout=0), tmp_path)
    assert {query.text for query in split.train} == {"one\u2028two", "three"}


def test_conversations_keep_their_turns(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi, what is it?"},
        {"role": "user", "content": "A riddle, please."},
    ]
    rows = [
        {"chat": turns, "level": 1},
        {"chat": [{"role": "user", "content": "Hello", "name": None}], "level": 2},
    ]
    split = load_queries(DataSettings(rows=rows, query_column="chat", heldout=0), tmp_path)
    by_level = {query.columns["level"]: query for query in split.train}
    assert by_level[1].messages == tuple(turns)
    assert by_level[1].text == "A riddle, please."
    assert by_level[2].messages == ({"role": "user", "content": "Hello"},)
    assert by_level[1].conversational
    write_rows(tmp_path / "set.parquet", rows)
    stored = load_queries(
        DataSettings(path="set.parquet", query_column="chat", heldout=0), tmp_path
    )
    assert stored == split


def test_control_tokens_and_odd_spacing_are_kept_verbatim(tmp_path: Path) -> None:
    texts = ["  <|im_end|> hi\n", "\tWhy?"]
    split = load_queries(DataSettings(rows=texts, heldout=0), tmp_path)
    assert {query.text for query in split.train} == set(texts)


def test_heldout_by_count_share_and_none(tmp_path: Path) -> None:
    sizes = []
    for heldout in (3, 0.5, 0.01, 0, 19):
        split = load_queries(DataSettings(rows=ROWS, heldout=heldout), tmp_path)
        texts = [query.text for query in split.train + split.heldout]
        assert sorted(texts) == sorted(WORDS)
        sizes.append(len(split.heldout))
    assert sizes == [3, 10, 1, 0, 19]


def test_split_depends_on_seed_and_not_on_row_order(tmp_path: Path) -> None:
    def heldout(rows: list[dict[str, str]], seed: int) -> list[str]:
        split = load_queries(DataSettings(rows=rows, shuffle_seed=seed), tmp_path)
        return [query.text for query in split.heldout]

    assert heldout(ROWS, 0) == heldout(ROWS[::-1], 0)
    assert heldout(ROWS, 0) != heldout(ROWS, 1)


def test_max_queries_are_nested_and_divided(tmp_path: Path) -> None:
    small, large = (
        load_queries(DataSettings(rows=ROWS, max_queries=limit), tmp_path) for limit in (5, 10)
    )
    assert (len(small.train), len(small.heldout)) == (4, 1)
    assert (len(large.train), len(large.heldout)) == (8, 2)
    kept = {query.index for query in small.train + small.heldout}
    assert kept < {query.index for query in large.train + large.heldout}


def test_split_column_divides_and_is_not_handed_on(tmp_path: Path) -> None:
    rows = [{**row, "side": "heldout" if i % 4 == 0 else "train"} for i, row in enumerate(ROWS)]
    split = load_queries(DataSettings(rows=rows, split_column="side"), tmp_path)
    assert {query.index for query in split.heldout} == {0, 4, 8, 12, 16}
    assert len(split.train) == 15
    assert all(query.columns.keys() == {"answer"} for query in split.train + split.heldout)
    settings = DataSettings(rows=rows, split_column="side", max_queries=8)
    capped = load_queries(settings, tmp_path)
    assert (len(capped.train), len(capped.heldout)) == (6, 2)
    least = DataSettings(rows=rows, split_column="side", max_queries=2)
    capped = load_queries(least, tmp_path)
    assert (len(capped.train), len(capped.heldout)) == (1, 1)


def test_heldout_path_is_kept_whole_with_its_own_numbers(tmp_path: Path) -> None:
    write_rows(tmp_path / "held.csv", ROWS[:5])
    settings = DataSettings(rows=ROWS[5:], heldout_path="held.csv", max_queries=4)
    split = load_queries(settings, tmp_path)
    assert {query.text for query in split.heldout} == set(WORDS[:5])
    assert sorted(query.index for query in split.heldout) == [15, 16, 17, 18, 19]
    assert len(split.train) == 4
    assert {query.text for query in split.train} < set(WORDS[5:])


@pytest.mark.parametrize("word", ["heldout", "held-out", "validation", "Valid", "val ", "dev"])
def test_the_split_column_knows_the_usual_words(word: str, tmp_path: Path) -> None:
    sides = ["training", "TRAIN", word, "test"]
    rows = [{"query": WORDS[i], "side": side} for i, side in enumerate(sides)]
    split = load_queries(DataSettings(rows=rows, split_column="side"), tmp_path)
    found = [[query.index for query in side] for side in (split.heldout, split.test)]
    assert found == [[2], [3]]
    assert {query.index for query in split.train} == {0, 1}


def test_rows_marked_test_change_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "side": "heldout" if i % 4 == 0 else "train"} for i, row in enumerate(ROWS)]
    more = [{"query": f"Who saw {i}?", "answer": "", "side": "test"} for i in range(9)]
    for limit in (None, 8):
        settings = DataSettings(rows=rows, split_column="side", max_queries=limit)
        with caplog.at_level(logging.INFO, logger="rlprompt.data"):
            before = load_queries(settings, tmp_path)
        assert caplog.text.count("has no test queries") == 1
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="rlprompt.data"):
            after = load_queries(settings.model_copy(update={"rows": [*rows, *more]}), tmp_path)
        assert "no test queries" not in caplog.text
        assert (after.train, after.heldout) == (before.train, before.heldout)
        assert before.test == ()
        assert sorted(query.index for query in after.test) == list(range(20, 29))
        assert after.fingerprint != before.fingerprint


def test_test_queries_are_drawn_by_count_or_share(tmp_path: Path) -> None:
    for test, heldout, sizes in ((5, 3, (12, 3, 5)), (0.25, 0, (15, 0, 5)), (0, 0.5, (10, 10, 0))):
        split = load_queries(DataSettings(rows=ROWS, heldout=heldout, test=test), tmp_path)
        sides = (split.train, split.heldout, split.test)
        assert tuple(map(len, sides)) == sizes
        assert sorted(query.text for side in sides for query in side) == sorted(WORDS)
        plain = load_queries(DataSettings(rows=ROWS, heldout=heldout), tmp_path)
        assert split.heldout == plain.heldout
    capped = load_queries(DataSettings(rows=ROWS, heldout=2, test=3, max_queries=10), tmp_path)
    assert tuple(map(len, (capped.train, capped.heldout, capped.test))) == (5, 2, 3)


def test_test_file_stands_beside_every_division(tmp_path: Path) -> None:
    write_rows(tmp_path / "held.csv", ROWS[:5])
    write_rows(tmp_path / "test.jsonl", ROWS[5:8])
    test = {"path": "test.jsonl"}
    marked = [{**row, "side": "dev" if i < 2 else "train"} for i, row in enumerate(ROWS[8:])]
    cases: tuple[tuple[dict[str, Any], set[int]], ...] = (
        ({"rows": ROWS[8:], "heldout_path": "held.csv"}, {17, 18, 19}),
        ({"rows": ROWS[8:], "heldout": 0, "max_queries": 4}, {12, 13, 14}),
        ({"rows": marked, "split_column": "side"}, {12, 13, 14}),
    )
    for values, indices in cases:
        split = load_queries(DataSettings.model_validate({**values, "test": test}), tmp_path)
        assert {query.text for query in split.test} == set(WORDS[5:8])
        assert {query.index for query in split.test} == indices
        everyone = [q.index for q in (*split.train, *split.heldout, *split.test)]
        assert len(set(everyone)) == len(everyone)
        assert len(split.train) <= values.get("max_queries", 12)
    drawn = DataSettings(rows=ROWS[5:], heldout_path="held.csv", test=4, max_queries=10)
    split = load_queries(drawn, tmp_path)
    assert tuple(map(len, (split.train, split.heldout, split.test))) == (6, 5, 4)


def test_near_duplicates_in_two_splits_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = "Where in the old town do I buy a good coat"
    rows = [
        {"query": said, "side": "train"},
        {"query": f"{said} today?", "side": "validation"},
        {"query": f"{said} tonight?", "side": "test"},
        {"query": "Why is snow white?", "side": "test"},
    ]
    with caplog.at_level(logging.WARNING, logger="rlprompt.data"):
        load_queries(DataSettings(rows=rows, split_column="side"), tmp_path)
    assert len(caplog.records) == 3
    assert "1 of 2 test queries share more than 80% of their words with one of train" in caplog.text
    assert "(data.rows row 3) with 'where in the old town do i buy a good coat'" in caplog.text
    caplog.clear()
    rows = [rows[0], {"query": "What is ice?", "side": "dev"}, rows[3]]
    load_queries(DataSettings(rows=rows, split_column="side"), tmp_path)
    assert not caplog.records


def test_duplicates_are_dropped_to_the_first_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"query": "What is snow?", "answer": "cold"},
        {"query": "what is  snow", "answer": "cold"},
        {"query": "WHAT IS SNOW?!", "answer": "white"},
        {"query": "What is ice?", "answer": "hard"},
    ]
    with caplog.at_level(logging.WARNING, logger="rlprompt.data"):
        split = load_queries(DataSettings(rows=rows, heldout=0), tmp_path)
    assert {query.index for query in split.train} == {0, 3}
    assert "data.rows: dropped 2 duplicate queries (1 with other columns" in caplog.text


def test_signs_that_carry_meaning_tell_queries_apart(tmp_path: Path) -> None:
    texts = [
        "What is 5 + 3?",
        "What is 5 - 3?",
        "What is 5*3?",
        "What is 5/3?",
        "Why C#?",
        "Why C?",
    ]
    split = load_queries(DataSettings(rows=[*texts, "???", "!"], heldout=0), tmp_path)
    assert len(split.train) == 8


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    def fingerprint(rows: list[Any], **settings: Any) -> str:
        return load_queries(DataSettings(rows=rows, **settings), tmp_path).fingerprint

    base = fingerprint(ROWS)
    assert len(base) == 64
    swapped = [dict(reversed(row.items())) for row in ROWS]
    assert fingerprint(swapped) == base
    changed = [{**ROWS[0], "answer": "other"}, *ROWS[1:]]
    assert fingerprint(changed) != base
    assert fingerprint(ROWS, heldout=5) != base
    assert fingerprint(ROWS, shuffle_seed=1) != base
    chats = [{**row, "query": [{"role": "user", "content": row["query"]}]} for row in ROWS]
    assert fingerprint(chats) != base
