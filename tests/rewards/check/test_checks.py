"""`rlprompt reward check`: good rewards pass, and each defect is found by the check made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import BUILTIN, RewardSettings
from rlprompt.rewards.check.checks import CheckRow, Trial, check_reward
from rlprompt.rewards.check.inputs import Pair, read_pairs
from tests.cli.runs import rlprompt

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "reward_models").rglob("*.py"))
GOOD = """
from rlprompt.rewards import Example

def reward(prompts, completions, **kwargs):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [min(1.0, len(set(text.split())) / 8) for text in texts]

EXAMPLES = [
    Example("Why?", "Because the air scatters the blue light most of all.", True, 0.9),
    Example("Why?", "No no no.", False, high=0.4),
    Example("Why?", "", False, high=0.0),
]
"""


def check(path: str, folder: Path = ROOT, **fields: Any) -> dict[str, CheckRow]:
    columns = fields.pop("columns", {})
    pairs = fields.pop("pairs", ())
    settings = RewardSettings(path=path, name="r", **fields)
    rows = check_reward(Trial(settings, folder, columns, pairs))
    return {row.name: row for row in rows}


def check_source(tmp_path: Path, source: str, **fields: object) -> dict[str, CheckRow]:
    (tmp_path / "mine.py").write_text(source)
    return check("mine.py:reward", tmp_path, **fields)


def failed(rows: dict[str, CheckRow]) -> set[str]:
    return {name for name, row in rows.items() if row.outcome == "failed"}


PATHS = [f"builtin:{name}" for name in BUILTIN] + [f"{file}:reward" for file in FILES]


@pytest.mark.parametrize("path", PATHS)
def test_every_reward_that_ships_passes(path: str) -> None:
    try:
        rows = check(path)
    except InputError as error:
        if "rlprompt[rules]" not in str(error):
            raise
        pytest.skip(str(error))
    assert failed(rows) == set(), rows
    skipped = {name for name, row in rows.items() if row.outcome == "skipped"}
    assert skipped <= {"supplied pairs are in order", "wrong column types"}


def test_a_good_reward_passes_and_says_how_fast_it_is(tmp_path: Path) -> None:
    rows = check_source(tmp_path, GOOD)
    assert failed(rows) == set(), rows
    assert "completions/s" in rows["throughput"].detail
    assert rows["examples lie in their bounds"].detail == "3 examples"


DEFECTS = {
    "examples lie in their bounds": ("min(1.0,", "min(2.0, 2 *"),
    "answers get different scores": ("min(1.0,", "min(0.0,"),
    "good examples beat bad ones": ("len(set(text.split())) / 8", "(text == 'No no no.')"),
    "an empty answer never wins": ("len(set(text.split())) / 8", "(not text)"),
    "odd texts": ("min(1.0,", "min(1.0 / len(text.strip() or '?') if text else 1.0,"),
    "huge texts": (
        "    texts =",
        "    import time; x = time.process_time()\n"
        "    while len(str(completions)) > 9e4 and time.process_time() < x + 1.2: pass\n"
        "    texts =",
    ),
    "both formats": ("c if isinstance(c, str)", "'' if isinstance(c, str)"),
    "determinism": ("    texts =", "    import random\n    w = random.random()\n    texts ="),
    "picklability": ("EXAMPLES =", "reward = (lambda f: lambda **k: f(**k))(reward)\nEXAMPLES ="),
}


@pytest.mark.parametrize("name", [n for n in DEFECTS if n != "odd texts"])
def test_a_defect_fails_its_check(name: str, tmp_path: Path) -> None:
    old, new = DEFECTS[name]
    source = GOOD.replace(old, new)
    if name == "determinism":
        source = source.replace("return [min", "return [w * min")
    assert name in failed(check_source(tmp_path, source)), source


def test_a_crash_on_an_odd_text_is_named(tmp_path: Path) -> None:
    source = GOOD.replace("    return", "    texts[0].encode('utf-8')\n    return")
    rows = check_source(tmp_path, source)
    assert rows["odd texts"].outcome == "failed"
    assert "on a lone surrogate" in rows["odd texts"].detail


def test_a_crash_on_a_wrong_column_is_named(tmp_path: Path) -> None:
    source = GOOD.replace("**kwargs):", "gold, **kwargs):").replace(
        "    return", "    [each.lower() for each in gold]\n    return"
    )
    with pytest.raises(InputError, match="needs the dataset column 'gold'"):
        check_source(tmp_path, source)
    row = check_source(tmp_path, source, columns={"gold": "x"})["wrong column types"]
    assert row.outcome == "failed"
    assert "column 'gold' holding None: AttributeError" in row.detail


def test_without_examples_the_rest_is_checked(tmp_path: Path) -> None:
    rows = check_source(tmp_path, GOOD.split("EXAMPLES")[0])
    assert failed(rows) == set()
    assert rows["good examples beat bad ones"].outcome == "skipped"
    assert rows["determinism"].outcome == "passed"


@pytest.mark.parametrize(
    ("value", "sentence"), [("0.5", "a constant teaches nothing"), ("None", "score None")]
)
def test_a_reward_that_says_nothing_is_not_ready(value: str, sentence: str, tmp_path: Path) -> None:
    source = f"def reward(completions, **kwargs):\n    return [{value}] * len(completions)\n"
    row = check_source(tmp_path, source)["answers get different scores"]
    assert row.outcome == "failed" and sentence in row.detail


def test_supplied_pairs_are_compared(tmp_path: Path) -> None:
    pairs = [Pair("q", "one two three", "one one"), Pair("q", "a", "a b")]
    row = check_source(tmp_path, GOOD, pairs=pairs)["supplied pairs are in order"]
    assert row.outcome == "failed"
    assert row.detail == "1 of 2 pairs in the wrong order: 'a' 0.125, 'a b' 0.250"


def test_pairs_are_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"query": "q", "good": "g", "bad": "b", "label": 3}) + "\n")
    assert read_pairs(file) == [Pair("q", "g", "b", {"label": 3})]
    for text, sentence in [
        ("", "holds no pair"),
        ("{", "pairs.jsonl:1 is not JSON"),
        ('{"query": "q", "good": "g"}', "pairs.jsonl:1 has no texts 'query', 'good' and 'bad'"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_pairs(file)
    with pytest.raises(InputError, match="cannot read the pairs"):
        read_pairs(tmp_path / "none.jsonl")


def test_the_command_prints_a_table_and_its_exit_code_is_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "mine.py").write_text(GOOD)
    shown = rlprompt("reward", "check", "mine.py")
    assert (shown.code, shown.err) == (0, "")
    assert "mine.py:reward: ready to train on" in shown.out
    (tmp_path / "pairs.jsonl").write_text('{"query": "q", "good": "a", "bad": "a b"}\n')
    shown = rlprompt("reward", "check", "mine.py", "--pairs", "pairs.jsonl")
    assert shown.code == 1
    assert "1 of 12 checks failed" in shown.out
    shown = rlprompt("reward", "check", "builtin:length", "--option", "max=0")
    assert shown.code == 2
    assert shown.err.startswith("error: reward 'length': option 'max' is wrong")
