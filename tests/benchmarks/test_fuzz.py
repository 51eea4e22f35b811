"""A small part of benchmarks/fuzz.py in every run of the tests; by hand it reads 22,000 inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fuzz import CATEGORIES, FAULTS, run
from benchmarks.fuzzing.judge import Case, judge
from rlprompt.errors import InputError

ROOT = Path(__file__).parents[2]
COUNTS = {
    "recipes": 60,
    "overrides": 60,
    "data": 120,
    "artifacts": 200,
    "checkpoints": 80,
    "models": 40,
    "templates": 12,
    "requests": 60,
}


@pytest.mark.parametrize("name", sorted(CATEGORIES))
def test_hostile_inputs_are_accepted_or_refused(name: str) -> None:
    found = run(name, COUNTS[name], seed=3)
    assert found.inputs == COUNTS[name]
    assert {fault: getattr(found, fault) for fault in FAULTS} == dict.fromkeys(FAULTS, 0), (
        found.examples
    )
    assert found.refused and found.accepted + found.refused == found.inputs


def test_the_judge_tells_each_fault() -> None:
    def lines() -> None:
        raise InputError("of an error whose sentence is fine")

    def crash() -> None:
        raise KeyError("r")

    def leak() -> None:
        raise InputError("the token s3cr3t-9f2c71d0 is wrong; send another")

    def hang() -> None:
        while True:
            pass

    cases = iter(
        [
            Case("fine", lines),
            Case("crash", crash),
            Case("leak", leak),
            Case("hang", hang),
            Case("silent", lambda: None, invalid=True),
        ]
    )
    found = judge(cases, 5, seconds=1)
    assert {fault: getattr(found, fault) for fault in FAULTS} == dict.fromkeys(FAULTS, 1)
    assert (found.accepted, found.refused) == (1, 2)


def test_the_whole_of_it_found_nothing() -> None:
    report = json.loads((ROOT / "docs" / "results" / "fuzz.json").read_text())
    assert report["inputs"] >= 20_000
    assert {fault: report[fault] for fault in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert set(report["categories"]) == set(CATEGORIES)
