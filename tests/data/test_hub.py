"""Hub datasets without a network: the cache is read, everything else fails soon and clearly."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import datasets
import pytest

from rlprompt.data import DataSettings, load_queries
from rlprompt.errors import InputError


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store a dataset `ann/riddles` in a cache of its own, as a download would."""
    source = tmp_path / "source.jsonl"
    rows = [{"question": f"What has {i} legs?", "answer": i} for i in range(10)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    built = tmp_path / "built"
    datasets.load_dataset("json", data_files=str(source), cache_dir=str(built))
    folder = next(built.glob("json/default-*/0.0.0/*/"))
    cache = tmp_path / "cache"
    stored = cache / "ann___riddles" / "default" / "0.0.0" / folder.name
    shutil.copytree(folder, stored)
    (stored / "json-train.arrow").rename(stored / "riddles-train.arrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


@pytest.mark.usefixtures("hub_cache")
def test_cached_dataset_is_read_offline(tmp_path: Path) -> None:
    settings = DataSettings(path="ann/riddles", query_column="question", heldout=2)
    split = load_queries(settings, tmp_path)
    assert (len(split.train), len(split.heldout)) == (8, 2)
    assert all(query.text == f"What has {query.index} legs?" for query in split.train)
    assert all(query.columns == {"answer": query.index} for query in split.train)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    "values",
    [{"path": "ann/poems"}, {"path": "ann/riddles", "split": "test"}],
)
def test_missing_dataset_or_split_is_refused(tmp_path: Path, values: dict[str, str]) -> None:
    with pytest.raises(InputError) as caught:
        load_queries(DataSettings.model_validate(values), tmp_path)
    message = str(caught.value)
    assert f"the hub dataset '{values['path']}'" in message
    assert "check path, name and split" in message
    assert "\n" not in message


def test_unreachable_hub_is_told_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_queries(DataSettings(path="ann/riddles"), tmp_path)
    assert time.monotonic() - start < 8
    message = str(caught.value)
    assert "'ann/riddles' cannot be fetched because http://127.0.0.1:9 cannot be reached" in message
    assert "name a local file in path" in message
