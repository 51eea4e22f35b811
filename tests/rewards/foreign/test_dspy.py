"""Metrics of DSPy give through a recipe what DSPy would get of them; dspy itself if it is there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import RewardBatch, RewardSettings, build_rewards
from rlprompt.rewards.check.inputs import make_group
from rlprompt.rewards.foreign.dspy import Fields, make_dspy

SOURCE = """
def metric(example, pred, trace=None):
    assert trace is None
    return example.result == pred.answer  # a bool, as DSPy's own metrics

def positional(gold, pred, trace, pred_name, pred_trace):
    assert trace is pred_name is pred_trace is None
    right = float(gold["result"] in pred.answer)
    return {"score": right, "feedback": "" if right else f"{gold.question} is {gold.result}"}

class Said:
    def __init__(self, score, feedback):
        self.score, self.feedback = score, feedback

def said(gold, pred, trace=None, pred_name=None, pred_trace=None):
    return Said(0.5, "half") if pred.answer == "4" else 0.0

def partly(example, pred, trace=None, frac=1.0):
    return frac * len(pred.answer)

async def slow(example, pred, trace=None):
    return example.result == pred.answer

class Judge:
    def __init__(self, least=0):
        self.least = least
    def __call__(self, example, pred, trace=None):
        return float(len(pred.answer) > self.least)

def unsure(example, pred, trace=None):
    return None if pred.answer == "4" else 1

def labelled(example, pred, trace=None):
    return pred.label == example.result and example.text == "2 + 2?"

def text(example, pred, trace=None):
    return "good"

def typo(example, pred, trace=None):
    return pred.answr == "4"

def no_score(example, pred, trace=None):
    return {"feedback": "fine"}

def greedy(example, pred, trace, more, and_more, still_more):
    return 1.0

def keywords(example, pred, **rest):
    return float(not rest)

number = 3
"""


def score(tmp_path: Path, name: str, columns: Any = None, **options: Any) -> RewardBatch:
    (tmp_path / "metrics.py").write_text(SOURCE)
    path = f"metrics.py:{name}" if name else "metrics.py"
    settings = RewardSettings(path=path, name="r", adapter="dspy", options=options)
    runner = build_rewards([settings], tmp_path)
    batch = runner.score([make_group("2 + 2?", columns or {"result": "4"}, ["4", "no 4"])], step=0)
    runner.close()
    return batch


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("metric", [1.0, 0.0]),
        ("", [1.0, 0.0]),
        ("slow", [1.0, 0.0]),
        ("partly", [1.0, 4.0]),
        ("keywords", [1.0, 1.0]),
        ("Judge", [1.0, 1.0]),
    ],
)
def test_a_metric_gives_its_number(tmp_path: Path, name: str, expected: list[float]) -> None:
    batch = score(tmp_path, name)
    assert batch.values["r"].tolist() == expected
    assert batch.extras == {}


def test_feedback_is_logged_with_the_completion(tmp_path: Path) -> None:
    batch = score(tmp_path, "positional", {"result": "no"})
    assert batch.values["r"].tolist() == [0.0, 1.0]
    assert batch.extras == {"feedback": ["2 + 2? is no", ""]}
    batch = score(tmp_path, "said")
    assert batch.values["r"].tolist() == [0.5, 0.0]
    assert batch.extras == {"feedback": ["half", None]}


def test_none_is_no_zero(tmp_path: Path) -> None:
    values = score(tmp_path, "unsure").values["r"]
    assert values.isnan().tolist() == [True, False]


def test_options_name_fields_and_reach_the_metric(tmp_path: Path) -> None:
    assert score(tmp_path, "labelled", input="text", output="label").values["r"].tolist() == [1, 0]
    assert score(tmp_path, "partly", frac=0.5).values["r"].tolist() == [0.5, 2.0]
    assert score(tmp_path, "Judge", least=2).values["r"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("typo", {}, r"no field 'answr'; did you mean 'answer'\?"),
        ("no_score", {}, "without 'score'"),
        ("text", {}, "'good'"),
        ("greedy", {}, "cannot be called as DSPy does"),
        ("number", {}, "of type int, which cannot be called"),
        ("partly", {"frak": 1}, r"no option 'frak'; did you mean 'frac'\?"),
        ("Judge", {"lest": 1}, r"no option 'lest'; did you mean 'least'\?"),
        ("metric", {"output": "a b"}, "option 'output' is 'a b'"),
        ("metric", {"input": "result"}, "a column 'result'"),
    ],
    ids=["field", "score", "word", "many", "number", "option", "class", "name", "taken"],
)
def test_a_wrong_metric_is_one_sentence(
    tmp_path: Path, name: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as found:
        score(tmp_path, name, **options)
    assert "\n" not in str(found.value)


def test_a_metric_without_the_adapter_is_known_for_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(SOURCE)
    with pytest.raises(InputError, match=r"parameters of a DSPy metric.*set adapter: dspy"):
        build_rewards([RewardSettings(path="metrics.py:metric")], tmp_path)


def test_earlier_turns_are_the_history() -> None:
    seen = []

    def metric(example: Any, pred: Any, trace: Any = None) -> float:
        seen.append((example, pred))
        return 1.0

    chat = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "2 + 2?"},
    ]
    reward = make_dspy(metric, {})
    done = [[{"role": "assistant", "content": "4"}]]
    assert reward(prompts=[chat], completions=done, log_extra=print, result=["4"]) == [1.0]
    ((example, pred),) = seen
    assert example.history.messages == chat[:2] and example.question == "2 + 2?"
    assert pred.answer == "4"
    assert example.labels().keys() == {"result"}
    assert set(example.inputs().keys()) == {"question", "history"}


def test_fields_are_attributes_and_items() -> None:
    fields = Fields({"a": 1, "b": 2}, ["a"])
    assert (fields.a, fields["b"], fields.get("c", 3)) == (1, 2, 3)
    assert "a" in fields and len(fields) == 2 and [*fields] == ["a", "b"]
    assert fields.toDict() == {**fields} == dict(fields.items())
    assert [*fields.values()] == [1, 2]
    fields.c, fields["d"] = 5, 6
    assert fields.toDict() == {"a": 1, "b": 2, "c": 5, "d": 6}
    with pytest.raises(KeyError, match="no field 'z'"):
        fields["z"]


CHILD = """
import sys
import dspy
sys.path.append(sys.argv[1])  # what rlprompt needs, behind what dspy does
from rlprompt.rewards.foreign.dspy import make_dspy

seen = []

def metric(gold, pred, trace=None, pred_name=None, pred_trace=None):
    seen.append((gold, pred))
    right = dspy.evaluate.metrics.answer_exact_match(gold, dspy.Prediction(answer=pred.reply))
    return dspy.Prediction(score=float(right), feedback=f"it is {gold.answer}")

example = dspy.Example(question="2 + 2?", answer="4").with_inputs("question")
logged = {}
reward = make_dspy(metric, {"output": "reply"})
chat = [{"role": "user", "content": "2 + 2?"}]
ours = reward(
    prompts=[chat, chat],
    completions=[[{"role": "assistant", "content": text}] for text in ("4", "5")],
    log_extra=logged.__setitem__,
    answer=["4", "4"],
)
theirs = [metric(example, dspy.Prediction(reply=text)).score for text in ("4", "5")]
assert ours == theirs == [1.0, 0.0], (ours, theirs)
assert logged == {"feedback": ["it is 4", "it is 4"]}
gold, pred = seen[0]
assert type(gold) is dspy.Example and type(pred) is dspy.Prediction
assert gold.toDict() == example.toDict()
assert gold.inputs().toDict() == example.inputs().toDict()
assert gold.labels().toDict() == example.labels().toDict()
judge = make_dspy(dspy.evaluate.metrics.answer_exact_match, {})
assert judge(prompts=[chat], completions=["4"], log_extra=print, answer=["4"]) == [1.0]
print("equal")
"""


def test_metrics_of_dspy_itself() -> None:
    """In a process of its own, since dspy stays loaded; RLPROMPT_DSPY may name a Python with it."""
    python = os.environ.get("RLPROMPT_DSPY", sys.executable)
    there = subprocess.run([python, "-c", "import dspy"], capture_output=True, check=False)
    if there.returncode:
        pytest.skip("dspy is not installed (RLPROMPT_DSPY may name a Python that has it)")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [python, "-c", CHILD, sysconfig.get_path("purelib")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]
