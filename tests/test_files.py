from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlprompt.errors import InputError
from rlprompt.files import JsonlWriter, read_jsonl, to_json, write_atomic


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    write_atomic(path, b"new \xc3\xa9")
    assert path.read_text(encoding="utf-8") == "new \u00e9"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_numbers_without_a_json_form_become_null() -> None:
    values = {"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": -float("inf")}, "e": True}
    assert json.loads(to_json(values)) == {
        "a": None,
        "b": [None, 1.5],
        "c": {"d": None},
        "e": True,
    }
    assert json.loads(
        to_json({"a": np.float32("nan"), "b": np.float32(0.5), "c": np.int64(3)})
    ) == {
        "a": None,
        "b": 0.5,
        "c": 3,
    }


def test_an_object_without_a_json_form_is_an_error(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    with pytest.raises(TypeError):
        writer.write({"step": 1, "bad": object()})
    writer.close()
    assert read_jsonl(tmp_path / "a.jsonl") == []


@pytest.mark.parametrize("text", ["a\nb", "line\u2028separator", "\ud83d alone", "\x00\x1b[2J"])
def test_any_text_survives_a_line(tmp_path: Path, text: str) -> None:
    writer = JsonlWriter(tmp_path / "a.jsonl")
    writer.write({"step": 1, "text": text})
    writer.write({"step": 2, "text": "next"})
    writer.close()
    assert [row["text"] for row in read_jsonl(tmp_path / "a.jsonl")] == [text, "next"]


def test_a_row_is_readable_before_the_file_is_closed(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "folder" / "a.jsonl")
    writer.write({"step": 1})
    assert read_jsonl(writer.path) == [{"step": 1}]
    writer.close()


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xc3')
    assert read_jsonl(path) == [{"step": 1}]
    path.write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        read_jsonl(path)
    path.write_text('{"step": 1}\n[2]\n')
    with pytest.raises(InputError, match="line 2 is not a JSON object"):
        read_jsonl(path)


def test_resume_drops_later_rows_and_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = "".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 2, 3, 4))
    path.write_text(rows + '{"step": 2, "te')
    writer = JsonlWriter(path, resume_step=2)
    writer.write({"step": 3, "again": True})
    writer.close()
    assert read_jsonl(path) == [
        {"step": 0},
        {"step": 1},
        {"step": 2},
        {"step": 2},
        {"step": 3, "again": True},
    ]


def test_resume_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n')
    JsonlWriter(path, resume_step=-1).close()
    assert read_jsonl(path) == []


def test_resume_completes_a_last_line_without_line_break(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}')
    writer = JsonlWriter(path, resume_step=1)
    writer.write({"step": 2})
    writer.close()
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="already holds the rows of another run"):
        JsonlWriter(path)
    assert path.read_text() == '{"step": 1}\n'
