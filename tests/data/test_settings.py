"""DataSettings: which settings fit together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.data import DataSettings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "exactly one of path and rows must be given, neither is"),
        ({"path": "a.jsonl", "rows": ["hi"]}, "both are; keep one"),
        ({"path": " "}, "path is empty"),
        ({"rows": ["hi"], "query_column": ""}, "query_column is empty"),
        ({"rows": ["hi"], "heldout": 1.0}, "the share 1.0; write a share between 0 and 1"),
        ({"rows": ["hi"], "heldout": 0.0}, "the share 0.0"),
        ({"rows": ["hi"], "heldout": -3}, "heldout is -3"),
        ({"rows": ["hi"], "heldout": True}, "heldout is True; write a count such as 40"),
        ({"rows": ["hi"], "heldout": "half"}, "heldout is 'half'"),
        (
            {"rows": ["hi"], "heldout_path": "b.jsonl", "split_column": "split"},
            "both say what is held out; remove one",
        ),
        (
            {"rows": ["hi"], "heldout_path": "b.jsonl", "heldout": 5},
            "heldout has no effect beside heldout_path",
        ),
        (
            {"rows": ["hi"], "split_column": "side", "heldout": 0.5},
            "heldout has no effect beside split_column",
        ),
        ({"rows": ["hi"], "test": 1.0}, "test is the share 1.0; write a share between 0 and 1"),
        ({"rows": ["hi"], "test": float("nan")}, "test is the share nan"),
        ({"rows": ["hi"], "test": -1}, "test is -1; write 0 or a positive count"),
        ({"rows": ["hi"], "test": True}, "test is True; write a count, a share like 0.2, or {path"),
        ({"rows": ["hi"], "test": "t.jsonl"}, "test is 't.jsonl'; write a count, a share"),
        ({"rows": ["hi"], "test": {"file": "t"}}, "test is {'file': 't'}; write {path: FILE}"),
        ({"rows": ["hi"], "test": {"path": " "}}, "write {path: FILE}, a count, or a share"),
        ({"rows": ["hi"], "test": {}}, "test is {}; write {path: FILE}"),
        (
            {"rows": ["hi"], "split_column": "side", "test": 5},
            "test has no effect beside split_column",
        ),
        (
            {"rows": ["hi"], "split_column": "side", "test": 0},
            "test has no effect beside split_column",
        ),
        ({"rows": ["hi"], "split_column": "query"}, "split_column and query_column are both"),
        ({"rows": ["hi"], "max_queries": 1}, "greater than or equal to 2"),
        ({"rows": ["hi"], "querycolumn": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DataSettings(**values)
    assert sentence in str(caught.value)


def test_heldout_keeps_count_and_share_apart() -> None:
    assert isinstance(DataSettings(rows=["hi"], heldout=1).heldout, int)
    assert isinstance(DataSettings(rows=["hi"], heldout=0.5).heldout, float)
    assert isinstance(DataSettings(rows=["hi"], test=1).test, int)
    assert isinstance(DataSettings(rows=["hi"], test=0.5).test, float)


def test_every_field_is_described_and_resolved_settings_load_again() -> None:
    schema = DataSettings.model_json_schema()
    assert all(field.get("description") for field in schema["properties"].values())
    for values in ({"split_column": "split"}, {"test": 3}, {"test": 0.5}, {"test": {"path": "b"}}):
        settings = DataSettings.model_validate({"path": "a.jsonl", **values})
        assert DataSettings(**settings.model_dump()) == settings
