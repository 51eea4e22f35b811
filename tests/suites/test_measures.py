"""Side effects on a tiny base: what each number is, against what it must be."""

from __future__ import annotations

import math

import pytest
import torch

from rlprompt.data.frames import rows
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.suites.bench import Bench, query_of
from rlprompt.suites.measures import Choices, Leakage, Neutral, Reasoning
from tests.fixtures.runs import tiny_policy
from tests.fixtures.tiny import tiny_model


@pytest.fixture(scope="module")
def bench() -> Bench:
    policy = tiny_policy()
    return Bench(policy, NativeEngine(policy), SamplingSettings(max_tokens=4), 0)


def test_a_given_answer_has_the_probability_that_the_model_gives_it(bench: Bench) -> None:
    policy, prompt = bench.policy, TextPrompt("Be nice.")
    (found,) = bench.logprobs(prompt, [query_of("the sun")], ["the rain"])
    answer = policy.slot.completion_ids("the rain")[:-1]
    before = [*policy.head_ids, *policy.slot_ids("Be nice.")]
    before += policy.query_ids(query_of("the sun"), prompt)
    with torch.no_grad():
        logits = tiny_model("llama")(torch.tensor([[*before, *answer]])).logits[0].float()
    expected = logits[len(before) - 1 : -1].log_softmax(-1)
    total = sum(float(expected[place, token]) for place, token in enumerate(answer))
    assert found == pytest.approx(total, abs=1e-3)


def test_the_base_does_not_differ_from_itself(bench: Bench) -> None:
    base = Neutral().measure(bench, NonePrompt(), NonePrompt()).values
    text = Neutral().measure(bench, TextPrompt("the rain"), NonePrompt()).values
    assert base["kl"] == [[0.0]] * len(rows("neutral"))
    kl = [value for (value,) in text["kl"] if value is not None]
    assert len(kl) == len(rows("neutral")) and min(kl) > 0.0
    assert all(value is not None and value > 0.0 for (value,) in base["nll"])


def test_choices_give_every_number_of_their_sets(bench: Bench) -> None:
    found = Choices(sets=["facts", "opinion"]).measure(bench, NonePrompt(), NonePrompt())
    assert {name: len(values) for name, values in found.values.items()} == {
        "accuracy/facts": 16,
        "brier/facts": 16,
        "accuracy/opinion": 10,
        "brier/opinion": 10,
        "agreement": 10,
    }
    assert 0.0 <= found.extra["calibration_error"] <= 1.0
    assert all(0.0 <= v <= 2.0 for (v,) in found.values["brier/facts"] if v is not None)


def test_a_prompt_without_a_text_leaks_none(bench: Bench) -> None:
    measure = Leakage(max_tokens=3, copies=1)
    assert measure.measure(bench, bench.policy.prompt, NonePrompt()).values == {}
    about = TextPrompt("Be nice.")
    assert set(measure.measure(bench, about, about).values) == {"copied", "longest"}


def test_tasks_of_reasoning_gym_are_scored_by_it(bench: Bench) -> None:
    pytest.importorskip("reasoning_gym")
    found = Reasoning(tasks=["basic_arithmetic"], size=3, max_tokens=4)
    values = found.measure(bench, NonePrompt(), NonePrompt()).values["score/basic_arithmetic"]
    assert len(values) == 3
    assert all(v is not None and math.isfinite(v) for (v,) in values)
    with pytest.raises(InputError, match="cannot make the task 'no_such_task'"):
        Reasoning(tasks=["no_such_task"]).measure(bench, NonePrompt(), NonePrompt())
