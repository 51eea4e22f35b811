"""What rewards log, beside what the run logs: in files, for guards, and for a resumed run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.evaluation.compare import Comparison, PromptScores
from rlprompt.files import read_jsonl
from rlprompt.rewards import LoadedReward, RewardRunner, RewardSettings
from rlprompt.rewards.validation import Sink, mean
from rlprompt.runs.guards import PartingGuard
from rlprompt.types import Group
from tests.fixtures.http_server import Answer, Seen, answering
from tests.fixtures.runs import comparable_rows, completion, queries, tiny_trainer
from tests.fixtures.searches import search_run

TAKEN = {
    "reward": 1e6,
    "kl": -7.0,
    "step": 0.0,
    "time": 0.0,
    "loss": -5.0,
    "epoch": 99.0,
    "num_tokens": -1.0,
    "time/rollout": 1e9,
    "prompt/norm": -1.0,
    "completions/mean_length": 1e9,
    "guards/long": 1.0,
    "step_time": -1.0,
}
EXTRAS = (
    "step",
    "reward",
    "rewards",
    "query",
    "completion",
    "who",
    "split",
    "candidate",
    "advantage",
)
LOGGING = f"""
import math
TAKEN = {TAKEN!r}
EXTRAS = {EXTRAS!r}

def loud(completions, log_metric, log_extra, **kwargs):
    for name, value in TAKEN.items():
        log_metric(name, value)
    log_metric("mine", 1.0)
    log_metric("mine", True)
    for name in EXTRAS:
        log_extra(name, ["theirs"] * len(completions))
    log_extra("extra.reward", ["theirs too"] * len(completions))
    log_extra("note", [{{"a": {{1}}, 2: b"x", "n": math.nan, "o": object()}}] * len(completions))
    return [float(len(text)) for text in completions]

def quiet(completions, **kwargs):
    return [float(len(text)) for text in completions]
"""
GUARDS = [
    {"name": "long", "type": "limit", "metric": "completions/mean_length", "above": 1e6},
    {"name": "mine", "type": "limit", "metric": "mine", "above": 100.0, "window": 2},
]


def rewards(name: str, **more: Any) -> list[dict[str, Any]]:
    return [{"path": f"logging_rewards.py:{name}", "name": "letters"} | more]


@pytest.fixture(autouse=True)
def _rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logging_rewards.py").write_text(LOGGING)
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def test_a_loud_reward_changes_no_number_of_the_run(tmp_path: Path) -> None:
    for name, guards in (("quiet", GUARDS[:1]), ("loud", GUARDS)):
        run = tiny_trainer(tmp_path, tmp_path / name, rewards=rewards(name), guards=guards)
        assert run.run()["alarms"] == []
    quiet, loud = (comparable_rows(tmp_path / name, "metrics") for name in ("quiet", "loud"))
    for row, other in zip(quiet, loud, strict=True):
        assert row == {key: other[key] for key in row}
        assert other["mine"] == 1.0
        assert {name: other[f"logged/{name}"] for name in TAKEN if "time" not in name} == {
            name: value for name, value in TAKEN.items() if "time" not in name
        }
    rows = read_jsonl(tmp_path / "loud" / "metrics.jsonl")
    assert all(row["time"] > 1e9 and row["step_time"] > 0 for row in rows)
    assert comparable_rows(tmp_path / "quiet", "evaluation") == comparable_rows(
        tmp_path / "loud", "evaluation"
    )
    for row in read_jsonl(tmp_path / "loud" / "completions.jsonl"):
        assert row["step"] in range(4)
        assert row["who"] in ("base", "learned")
        assert isinstance(row["reward"], float) and isinstance(row["rewards"], dict)
        assert {row[f"extra.{name}"] for name in EXTRAS if name != "reward"} == {"theirs"}
        assert {row["extra.reward"], row["extra.extra.reward"]} == {"theirs", "theirs too"}
        assert row["note"]["a"] == [1] and row["note"]["n"] is None
        assert isinstance(row["note"]["o"], str)


def test_a_resumed_run_keeps_and_repeats_the_same_rows(tmp_path: Path) -> None:
    changes = {"rewards": rewards("loud"), "training": {"steps": 4, "save_every": 2}}
    tiny_trainer(tmp_path, tmp_path / "whole", **changes).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1])
    tiny_trainer(tmp_path, tmp_path / "parts", **changes).run(resume=True)
    one, two = (comparable_rows(tmp_path / name, "metrics") for name in ("whole", "parts"))
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    assert one == two


def test_a_guard_on_a_metric_that_only_a_reward_logs_under_a_taken_name_sees_none(
    tmp_path: Path,
) -> None:
    guard = {"name": "g", "type": "limit", "metric": "kl", "below": 0.0, "window": 2}
    run = tiny_trainer(tmp_path, tmp_path / "run", rewards=rewards("loud"), guards=[guard])
    with pytest.raises(InputError, match="watches the metric 'kl', which this run does not log"):
        run.run()


def test_a_search_keeps_its_own_names_too(tmp_path: Path) -> None:
    changes = {"training": {"steps": 2}, "rewards": rewards("loud")}
    search_run(tmp_path, tmp_path / "run", **changes).run()
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert row["step"] in (1, 2) and row["logged/step"] == 0.0
        assert row["reward"] < 1e3 and row["logged/reward"] == 1e6
    for row in read_jsonl(tmp_path / "run" / "completions.jsonl"):
        assert row["extra.candidate"] == "theirs"
        assert row["split"] == "heldout" or isinstance(row["candidate"], int)


def test_a_reward_server_takes_no_name_either(tmp_path: Path) -> None:
    def reply(seen: Seen) -> Answer:
        count = len(seen.body["completions"])
        answer = {"rewards": [1.0] * count, "metrics": TAKEN, "extras": {"reward": [9] * count}}
        return Answer(answer)

    with answering(reply) as (url, _):
        served = [{"path": "builtin:http", "name": "far", "options": {"url": url}}]
        tiny_trainer(tmp_path, tmp_path / "run", rewards=served).run()
    for row in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert row["reward"] == 1.0 and row["logged/reward"] == 1e6


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, tmp_path / "run", rewards=rewards("loud")).run()

    def refuse(text: str) -> float:
        raise AssertionError(text)

    for kind in ("metrics", "completions", "evaluation"):
        for line in (tmp_path / "run" / f"{kind}.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=refuse)


def test_a_reward_that_is_called_as_the_total_stays_apart_from_it() -> None:
    guard = PartingGuard(name="g", proxy="reward", gold="reward")
    assert guard.metrics == ("reward", "rewards/reward/mean")
    metrics = {"reward": 1.0, "rewards": {}, "mean_length": 3.0}
    scores = PromptScores("p", 1.0, {"reward": 2.0, "mean_length": 4.0, "r": 5.0}, metrics, ())
    assert Comparison({"p": scores}).rows == [
        {
            "prompt": "p",
            "reward": 1.0,
            "rewards/reward": 2.0,
            "rewards/mean_length": 4.0,
            "r": 5.0,
            "mean_length": 3.0,
        }
    ]


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("m", math.nan, "logged nan as metric 'm'"),
        ("m", math.inf, "logged inf as metric 'm'"),
        ("m", 10**400, "as metric 'm'; log a finite number"),
        ("m", 10**5000, "logged an integer of 16610 bits as metric 'm'"),
        ("m", "1.0", "logged '1.0' as metric 'm'"),
        ("m", None, "logged None as metric 'm'"),
        ("m", [1.0], r"logged \[1.0\] as metric 'm'"),
        ("", 1.0, "the name of a metric is ''"),
        ("a\nb", 1.0, "the name of a metric is 'a"),
        ("x" * 5000, 1.0, "the name of a metric is"),
        (7, 1.0, "the name of a metric is 7; give a text"),
        (["a"], 1.0, r"the name of a metric is \['a'\]; give a text"),
    ],
    ids=[
        "nan",
        "inf",
        "400 digits",
        "5000 digits",
        "text",
        "none",
        "list",
        "empty name",
        "line break in name",
        "long name",
        "number as name",
        "list as name",
    ],
)
def test_odd_names_and_values_are_refused_in_one_sentence(
    name: Any, value: Any, sentence: str
) -> None:

    def logs(completions: list[Any], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric(name, value)
        return [1.0] * len(completions)

    runner = RewardRunner([LoadedReward(RewardSettings(path="x:y", name="r"), logs)])
    with pytest.raises(InputError, match=sentence) as caught:
        runner.score([Group(queries(1)[0], (completion(1),))], step=0)
    assert "\n" not in str(caught.value)


def test_numbers_of_any_size_have_a_mean() -> None:

    sink = Sink()
    for value in (1.7e308, 1.7e308):
        sink.log_metric("m", value)
    sink.check(1)
    assert mean(sink.numbers()["m"]) == 1.7e308
