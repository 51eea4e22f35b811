"""docs/reward_faults.md: what a run does when a reward misbehaves in one batch.

Each fault happens once, in the second step of a real run of three: under `on_error: skip` the run
must go on to its end without that reward's batch, under `raise` it must stop with one line and,
when it is resumed, do the steps that are left. Nothing that was learned may be lost either way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import Shown, rlprompt, write_recipe
from tests.docs.pages import DOCS, UPDATE, code
from tests.fixtures.http_server import Answer, Seen, answering
from tests.fixtures.tiny import save_tiny

HEAD = """# What a run does when a reward misbehaves

Each row is a reward that fails in one batch of a real training run of three steps, in a worker
process of its own (`isolation: {}`), in the run's process, or behind HTTP (`builtin:http`). With
`on_error: skip` every run did all its steps, lost this reward's values for that one batch, counted
it in `rewards/faulty/failures` and logged the line below once. With `on_error: raise` every run
stopped with that line and exit code 2, and `--resume` did the steps that were left.
`tests/docs/test_reward_faults.py` makes the runs and writes this page. A call that hangs in the
run's own process cannot be ended: it runs on in its thread until the process ends, which it neither
delays nor makes fail (`tests/cli/test_hanging_reward.py`).

| fault | where | kind | the line |
|---|---|---|---|
"""

REWARD = """
import os, re, signal, time
from pathlib import Path

NOTE = Path("happened")


def faulty(completions, trainer_state, fault, **kwargs):
    honest = [1.0 / (1 + len(text)) for text in completions]
    if trainer_state.global_step != 1 or NOTE.exists():
        return honest
    NOTE.write_text("once")
    if fault == "hang":
        time.sleep(30)
    if fault == "lock":
        re.match(r"(a+)+$", "a" * 40 + "b")
    if fault == "raise":
        return [float(text) for text in ["no number"]]
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(3)
    if fault == "memory":
        return [len(bytearray(3 << 30))]
    return {"nan": [float("nan")] * len(honest), "short": honest[:1], "none": None}[fault]


def vowels(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / 8 for text in completions]
"""


@dataclass(frozen=True)
class Fault:
    """A way to misbehave."""

    title: str
    where: str
    kind: str
    name: str = ""
    answer: Answer | None = None

    def settings(self, url: str, on_error: str) -> dict[str, Any]:
        """The reward of a recipe."""
        common = {"name": "faulty", "on_error": on_error, "timeout": 1.0}
        if self.answer is not None:
            options = {"url": url, "request_timeout": 0.5, "retries": 1, "backoff": 0.01}
            return common | {"path": "builtin:http", "options": options, "timeout": 20.0}
        reward = common | {"path": "reward.py:faulty", "options": {"fault": self.name}}
        return reward | ({"isolation": {"memory_gb": 1.0}} if self.where == "worker" else {})


FAULTS = [
    Fault("hangs", "worker", "timeout", "hang"),
    Fault("hangs", "run", "timeout", "hang"),
    Fault("hangs and holds the interpreter lock", "worker", "timeout", "lock"),
    Fault("kills its process", "worker", "exception", "kill"),
    Fault("ends its process", "worker", "exception", "exit"),
    Fault("asks for more memory than it may have", "worker", "exception", "memory"),
    Fault("raises", "worker", "exception", "raise"),
    Fault("raises", "run", "exception", "raise"),
    Fault("returns NaN", "run", "values", "nan"),
    Fault("returns too few values", "run", "values", "short"),
    Fault("returns None", "run", "values", "none"),
    Fault("server is slow", "HTTP", "exception", answer=Answer({}, delay=2.0)),
    Fault("server answers 500", "HTTP", "exception", answer=Answer(b"oops", 500)),
    Fault("server hangs up", "HTTP", "exception", answer=Answer(hang_up=True)),
    Fault("server answers with a web page", "HTTP", "exception", answer=Answer(b"<html>Hi")),
    Fault("server answers with too few values", "HTTP", "values", answer=Answer({"rewards": [1]})),
]


@contextmanager
def project(fault: Fault, folder: Path, model: Path, on_error: str) -> Iterator[Path]:
    """A recipe with the faulty reward, and its server when it has one."""

    def reply(seen: Seen) -> Answer:
        note = folder / "happened"
        if seen.body["step"] == 1 and (not note.exists() or note.read_text() == "still"):
            note.write_text("still")  # until the test says that it is over
            return fault.answer or Answer()
        return Answer({"rewards": [0.5] * len(seen.body["completions"])})

    with answering(reply) as (url, _):
        rewards = [
            fault.settings(url, on_error),
            {"path": "reward.py:vowels", "name": "vowels"},
        ]
        write_recipe(folder, model, rewards=rewards, evaluation__every=100)
        (folder / "reward.py").write_text(REWARD)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            yield folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "rewards/vowels/mean" in row]


def check_skipped(folder: Path, shown: Shown) -> str:
    """The run did everything but one batch of one reward; returns its one line."""
    assert shown.code == 0, shown.err
    rows = steps_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["rewards/faulty/failures"] for row in rows] == [0.0, 1.0, 0.0]
    assert ["rewards/faulty/mean" in row for row in rows] == [True, False, True]
    assert all("rewards/vowels/mean" in row for row in rows)
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["base_fingerprint_before"] == summary["base_fingerprint_after"]
    said = [line for line in shown.out.splitlines() if "on_error: skip" in line]
    assert len(said) == 1, shown.out
    return said[0].partition("(on_error: skip): ")[2]


def check_raised(folder: Path, shown: Shown) -> str:
    """The run stopped with one line and goes on when it is asked to; returns the line."""
    assert shown.code == 2, shown
    assert shown.err.count("\n") == 1
    assert [row["step"] for row in steps_of(folder)] == [1]
    (folder / "happened").write_text("over")
    again = rlprompt("train", "recipe.yaml", "--output", "run", "--resume")
    assert again.code == 0, again.err
    assert [row["step"] for row in steps_of(folder)] == [1, 2, 3]
    return shown.err.removeprefix("error: ").strip()


def sentence_of(fault: Fault, folder: Path, model: Path) -> str:
    lines = []
    for on_error, check in (("skip", check_skipped), ("raise", check_raised)):
        with project(fault, folder / on_error, model, on_error) as place:
            shown = rlprompt("train", "recipe.yaml", "--output", "run")
            lines.append(general(check(place, shown), place))
    assert lines[0] == lines[1]
    return lines[0]


def general(line: str, folder: Path) -> str:
    """The line as it would be anywhere."""
    line = line.replace(f"{folder.resolve()}", "/home/me").replace(f"{folder}", "/home/me")
    line = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8770", line)
    return re.sub(r"with completion '.*?'(?=[;)])", "with completion '...'", line)


def row(fault: Fault, sentence: str) -> str:
    return f"| {fault.title} | {fault.where} | {fault.kind} | {code(sentence)} |"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("faults") / "model")


@pytest.mark.slow
def test_the_page_has_a_row_for_every_fault_and_no_other(model: Path, tmp_path: Path) -> None:
    if UPDATE:
        rows = [row(f, sentence_of(f, tmp_path / str(i), model)) for i, f in enumerate(FAULTS)]
        (DOCS / "reward_faults.md").write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    shown = (DOCS / "reward_faults.md").read_text(encoding="utf-8")
    assert shown.startswith(HEAD)
    titles = re.findall(r"^\| (.+?) \| (\w+) \| ", shown.removeprefix(HEAD), re.MULTILINE)
    assert titles == [(fault.title, fault.where) for fault in FAULTS]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.title} ({fault.where})")
def test_a_fault_costs_one_batch_and_one_line(fault: Fault, model: Path, tmp_path: Path) -> None:
    lines = (DOCS / "reward_faults.md").read_text(encoding="utf-8").splitlines()
    assert row(fault, sentence_of(fault, tmp_path, model)) in lines
