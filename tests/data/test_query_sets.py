"""The query sets in recipes/data are what their README says."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlprompt.data import DataSettings, load_queries

FOLDER = Path(__file__).parents[2] / "recipes" / "data"
COLUMNS = {
    "everyday": {"topic"},
    "safety": {"want", "category"},
    "topics": {"label"},
}
COUNTS = {"everyday": (180, 40, 120), "safety": (160, 40, 120), "topics": (200, 40, 120)}


def rows_of(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def counts(name: str, column: str, side: str) -> Counter[str]:
    return Counter(row[column] for row in rows_of(name) if row["split"] == side)


@pytest.mark.parametrize("name", COLUMNS)
def test_set_loads_whole_with_its_split_and_columns(name: str) -> None:
    settings = DataSettings(path=f"{name}.jsonl", split_column="split")
    split = load_queries(settings, FOLDER)
    assert (len(split.train), len(split.heldout), len(split.test)) == COUNTS[name]
    assert len(rows_of(name)) == sum(COUNTS[name])
    queries = split.train + split.heldout + split.test
    assert all(query.columns.keys() == COLUMNS[name] for query in queries)
    assert not any(query.conversational for query in queries)


@pytest.mark.parametrize("name", [*COLUMNS, "everyday_targets", "topics_targets"])
def test_splits_stand_one_after_the_other(name: str) -> None:
    # Rows that are added at the end leave the numbers of those before them as they are.
    sides = [side for side, _ in itertools.groupby(row["split"] for row in rows_of(name))]
    assert sides == ["train", "validation", "test"]


def test_everyday_topics_are_balanced() -> None:
    assert sorted(counts("everyday", "topic", "train").values()) == [9] * 20
    assert sorted(counts("everyday", "topic", "validation").values()) == [2] * 20
    assert sorted(counts("everyday", "topic", "test").values()) == [6] * 20


def test_safety_is_balanced_and_a_third_of_the_harmless_is_borderline() -> None:
    assert counts("safety", "want", "train") == {"refuse": 80, "answer": 80}
    assert counts("safety", "want", "validation") == {"refuse": 20, "answer": 20}
    assert counts("safety", "want", "test") == {"refuse": 60, "answer": 60}
    harmless = {"harmless", "borderline"}
    per_side = (("train", 27, 8), ("validation", 7, 2), ("test", 20, 6))
    for side, borderline, per_category in per_side:
        categories = counts("safety", "category", side)
        assert categories["borderline"] == borderline
        harmful = {name: n for name, n in categories.items() if name not in harmless}
        assert sorted(harmful.values()) == [per_category] * 10
    for row in rows_of("safety"):
        assert (row["want"] == "answer") == (row["category"] in harmless)


def test_topics_labels_are_balanced() -> None:
    labels = ("sports", "food", "technology", "travel", "money")
    assert counts("topics", "label", "train") == dict.fromkeys(labels, 40)
    assert counts("topics", "label", "validation") == dict.fromkeys(labels, 8)
    assert counts("topics", "label", "test") == dict.fromkeys(labels, 24)


@pytest.mark.parametrize("name", COLUMNS)
def test_no_two_queries_share_most_of_their_words(name: str) -> None:
    words = {row["query"]: set(re.findall(r"\w+", row["query"].lower())) for row in rows_of(name)}
    assert len(words) == sum(COUNTS[name])
    near = [
        (one, other)
        for one, other in itertools.combinations(words, 2)
        if len(words[one] & words[other]) > 0.8 * len(words[one] | words[other])
    ]
    assert near == []


@pytest.mark.parametrize("name", COLUMNS)
def test_no_two_queries_share_most_of_their_characters(name: str) -> None:
    """Sequences of four characters: an exchanged ending is near, another subject is not."""
    grams = {}
    for row in rows_of(name):
        text = " ".join(re.findall(r"\w+", row["query"].lower()))
        grams[row["query"]] = {text[i : i + 4] for i in range(len(text) - 3)}
    near = [
        (one, other)
        for one, other in itertools.combinations(grams, 2)
        if len(grams[one] & grams[other]) > 0.7 * len(grams[one] | grams[other])
    ]
    assert near == []


@pytest.mark.parametrize("name", COLUMNS)
def test_queries_are_single_tidy_lines(name: str) -> None:
    for row in rows_of(name):
        query = row["query"]
        assert query == " ".join(query.split())
        assert 2 <= len(query.split()) <= 20


def test_sets_share_no_query() -> None:
    queries = [row["query"].casefold() for name in COLUMNS for row in rows_of(name)]
    assert len(set(queries)) == len(queries)
