"""Keys of a server: where they come from, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.serving.access import KEYS_VARIABLE, open_access

KEY = "k" * 20


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ([], "at least 1 item"),
        ([{"name": "a"}], "has 0 of key, key_env and sha256"),
        ([{"name": "a", "key": KEY, "key_env": "X"}], "has 2 of key, key_env and sha256"),
        ([{"name": "a", "key": "short-but-secret"[:9]}], "at least 16 characters"),
        ([{"name": "a", "key_env": "NOT_SET_ANYWHERE"}], "NOT_SET_ANYWHERE"),
        ([{"name": "a", "key": KEY, "scopes": ["root"]}], "scopes.0"),
        ([{"name": "a", "key": KEY, "scopes": []}], "scopes"),
        ([{"name": "a", "key": KEY}, {"name": "b", "key": KEY}], "two keys are the same"),
        ([{"name": "a", "key": KEY}, {"name": "a", "key": KEY * 2}], "two keys have one name"),
        ([{"name": "a", "key": KEY, "rate": 1}], "rate"),
        ([{"name": "a", "key": KEY, "requests_per_minute": 0}], "requests_per_minute"),
        ([{"name": "a", "sha256": "abc"}], "sha256"),
    ],
)  # fmt: skip
def test_wrong_keys_are_told_without_their_text(
    tmp_path: Path, keys: list[Any], sentence: str
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": keys}))
    with pytest.raises(InputError) as told:
        open_access(path, "127.0.0.1")
    assert sentence in str(told.value)
    assert KEY not in str(told.value) and "short-but" not in str(told.value)


def test_a_file_that_is_not_there_or_no_json_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_access(tmp_path / "nowhere", "127.0.0.1")
    (tmp_path / "bad").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        open_access(tmp_path / "bad", "127.0.0.1")


def test_without_keys_only_loopback_is_listened_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert open_access(None, "127.0.0.1").is_open
    with pytest.raises(InputError, match="give --keys"):
        open_access(None, "0.0.0.0")
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    monkeypatch.setenv(KEYS_VARIABLE, json.dumps({"keys": [{"name": "a", "sha256": digest}]}))
    assert not open_access(None, "0.0.0.0").is_open
    monkeypatch.setenv(KEYS_VARIABLE, "no json")
    with pytest.raises(InputError, match=KEYS_VARIABLE):
        open_access(None, "127.0.0.1")
