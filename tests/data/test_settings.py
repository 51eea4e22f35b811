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


def test_every_field_is_described_and_resolved_settings_load_again() -> None:
    schema = DataSettings.model_json_schema()
    assert all(field.get("description") for field in schema["properties"].values())
    settings = DataSettings(path="a.jsonl", split_column="split")
    assert DataSettings(**settings.model_dump()) == settings
