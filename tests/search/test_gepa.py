"""GEPA by ask and tell against `gepa.optimize` itself, on scores that are functions of the text."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load, save

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.runs.learner import LearnerState
from rlprompt.runs.run import Run
from rlprompt.search.base import SearchStart
from rlprompt.search.gepa import GEPA, GEPASettings, plan_of
from rlprompt.search.gepa_reflection import Reflecting, examples_of
from rlprompt.search.writer import BaseWriterSettings, Writer
from rlprompt.types import Query
from tests.fixtures.runs import comparable_rows, completion, tiny_policy
from tests.fixtures.searches import search_recipe, search_step, stops, trial

gepa = pytest.importorskip("gepa", reason="the extra `gepa`")

from gepa.core.adapter import EvaluationBatch  # noqa: E402

WORDS = tuple(f"word {number}" for number in range(20))
Score = Callable[[str, int, int], float]
"""(text, place of the query, how many questions came before) -> a reward."""


def many(count: int) -> list[Query]:
    return [Query(({"role": "user", "content": f"q {i}"},), index=i) for i in range(count)]


def start(count: int = 40, seed: int = 3, minibatch: int = 3) -> SearchStart:
    return SearchStart(TextPrompt("begin"), seed, None, many(count), minibatch)


def searcher(given: SearchStart | None = None, **settings: Any) -> GEPA:
    settings = {"proposals": WORDS, **settings}
    return GEPA.make(GEPASettings(**settings), given or start())


def noisy(text: str, place: int, question: int) -> float:
    return random.Random(f"{text} {place} {question}").random()


def answer(found: GEPA, score: Score, question: int = 0, most: int | None = None) -> list[str]:
    """Answers one question, on the first `most` of its queries; gives what was asked."""
    asked = found.ask()
    met = found.wanted_queries[:most]
    told = [
        trial(c, [[score(c.prompt.init_text, q.index, question)] for q in met], met) for c in asked
    ]
    found.tell(told)
    return [f"{c.prompt.init_text} {[q.index for q in met]}" for c in asked]


def play(found: GEPA, score: Score, first: int = 0, count: int = 1000) -> list[list[str]]:
    """Answers questions `first` to `first + count`, or up to the end."""
    out: list[list[str]] = []
    while len(out) < count and not found.is_over:
        out.append(answer(found, score, first + len(out)))
    return out


def theirs(score: Score, settings: GEPASettings, given: SearchStart) -> tuple[list[list[str]], Any]:
    """The same search by `gepa.optimize` alone: what it evaluated, and its result."""
    evaluated: list[list[str]] = []
    texts = iter(settings.proposals or ())
    plan = plan_of(settings, given)

    class Plain:
        propose_new_texts = None

        def evaluate(
            self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False
        ) -> EvaluationBatch[Any, Any]:
            text = candidate["it"]
            scores = [score(text, place, len(evaluated)) for place in batch]
            evaluated.append([f"{text} {batch}"])
            return EvaluationBatch(outputs=batch, scores=scores, trajectories=batch)

        def make_reflective_dataset(
            self, candidate: dict[str, str], eval_batch: Any, components: list[str]
        ) -> Mapping[str, Sequence[Mapping[str, Any]]]:
            return {"it": [{"Feedback": "none"}]}

    used: list[str] = []

    def propose(candidate: Any, dataset: Any, components: Any) -> dict[str, str]:
        used.append(next(texts))
        return {"it": used[-1]}

    result = gepa.optimize(
        seed_candidate={"it": "begin"},
        trainset=list(plan.reflection),
        valset=list(plan.ranking),
        adapter=Plain(),
        custom_candidate_proposer=propose,
        reflection_minibatch_size=3,
        skip_perfect_score=False,
        stop_callbacks=lambda state: len(used) == len(settings.proposals or ()),
        seed=3,
    )
    return evaluated, result


def test_it_is_gepa_itself() -> None:
    """The same evaluations in the same order, the same pool, the same best text."""
    settings = GEPASettings(proposals=WORDS)
    evaluated, result = theirs(noisy, settings, start())
    found = searcher()
    assert play(found, noisy) == evaluated
    assert found.is_over
    assert found.incumbent.prompt.init_text == result.best_candidate["it"]
    assert len(result.candidates) > 5  # else nothing was chosen between


def test_it_goes_on_from_every_state_as_if_it_was_never_stopped() -> None:
    straight = searcher()
    expected = play(straight, noisy, count=30)
    stopped = searcher()
    for place, asked in enumerate(expected):
        assert answer(stopped, noisy, place) == asked
        state = stopped.state()
        stopped = searcher()
        plain = json.loads(json.dumps(state.plain, allow_nan=False))
        stopped.restore(LearnerState(load(save(dict(state.tensors))), plain))
    assert stopped.state().plain == straight.state().plain
    assert stopped.incumbent.id == straight.incumbent.id


def test_nothing_is_left_running() -> None:
    before = threading.active_count()
    found = searcher()
    play(found, noisy, count=5)
    assert threading.active_count() == before


def test_a_question_that_was_answered_in_part_is_asked_for_the_rest() -> None:
    """As where `max_calls` ends a search that is given more of them later."""
    whole, parted = searcher(), searcher()
    play(whole, noisy, count=1)
    (first,) = answer(parted, noisy, most=3)
    state = parted.state()
    parted = searcher()
    parted.restore(state)
    (rest,) = answer(parted, noisy)
    places = json.loads(first.removeprefix("begin ")) + json.loads(rest.removeprefix("begin "))
    assert tuple(places) == whole._plan.ranking
    assert play(parted, noisy, 1, 9) == play(whole, noisy, 1, 9)


def test_a_better_text_is_found_and_a_worse_start_left() -> None:
    def score(text: str, place: int, question: int) -> float:
        return float(text == "word 7") + 0.01 * noisy(text, place, question)

    found = searcher()
    assert found.incumbent.prompt.init_text == "begin"
    play(found, score)
    assert found.incumbent.prompt.init_text == "word 7"
    assert found.incumbent.id == 8 and found.incumbent.origin == "given"


def test_a_score_that_is_missing_counts_as_the_worst_and_none_at_all_ends_well() -> None:
    def score(text: str, place: int, question: int) -> float:
        if text == "word 2":
            return float("nan")
        return -5.0 + noisy(text, place, 0)

    found = searcher()
    play(found, score)
    assert found.incumbent.prompt.init_text != "word 2"
    silent = searcher()
    play(silent, lambda text, place, question: float("nan"))
    assert silent.is_over and silent.incumbent.prompt.init_text == "begin"


def test_fresh_queries_decide_and_both_sides_meet_them_in_one_step() -> None:
    settings = {"acceptance": "fresh", "evidence": {"spread": 1.0, "min_effect": 0.2}}

    def score(text: str, place: int, question: int) -> float:
        return float(noisy(text, place, question) < (0.95 if text == "word 4" else 0.3))

    found = searcher(start(300), **settings)
    asked = play(found, score)
    pairs = [each for each in asked if len(each) == 2]
    assert pairs and all(a.split("[")[1] == b.split("[")[1] for a, b in pairs)
    assert found.incumbent.prompt.init_text == "word 4"
    plan = found._plan
    assert not {*plan.fresh} & {*plan.ranking, *plan.reflection}
    assert len({*plan.fresh, *plan.ranking, *plan.reflection}) == 300
    equal = searcher(start(300), **settings)
    play(equal, lambda text, place, question: float(noisy(text, place, question) < 0.5))
    assert equal.incumbent.prompt.init_text == "begin"


def test_a_spread_that_does_not_hold_is_one_sentence() -> None:
    found = searcher(start(200), acceptance="fresh", evidence={"spread": 0.5})
    with pytest.raises(InputError, match=r"search.evidence.spread does not hold: a difference is"):
        play(found, lambda text, place, question: float(text != "begin"))


class Written(Writer):
    """Gives what it is told to, and keeps what it was asked."""

    def __init__(self, *answers: str | Exception) -> None:
        self.answers, self.requests = list(answers), list[str]()

    @classmethod
    def make(cls, settings: Any, given: SearchStart) -> Written:
        return cls()

    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        self.requests.append(asked[0].text)
        found = self.answers[min(len(self.requests), len(self.answers)) - 1]
        if isinstance(found, Exception):
            raise found
        return [found]


def reflecting(writer: Writer, template: str | None = None) -> GEPA:
    settings = BaseWriterSettings()
    engine = NativeEngine(tiny_policy())
    plan = plan_of(GEPASettings(), start())
    return GEPA(plan, many(40), Reflecting(writer, settings, template, 0, engine))


def test_a_writer_sees_the_parent_its_completions_and_the_feedback() -> None:
    writer = Written("Surely!\n```\nBe brief.\n```\nGood luck.")
    found = reflecting(writer)
    play(found, lambda text, place, question: 0.25, count=2)
    (request,) = writer.requests
    assert "begin" in request and request.count("Reward: 0.25") == 3
    assert all(
        f"q {place}\n" in request for place in json.loads(play(found, noisy, 2, 1)[0][0][10:])
    )
    assert found.state().plain["proposals"] == ["Be brief."]


def test_what_no_prompt_can_be_made_of_is_not_tried_and_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = reflecting(Written("``` ```", "begin", "", "word 1"))
    asked = play(found, lambda text, place, question: 0.5, count=7)
    assert [each[0].split(" [")[0] for each in asked[:6]] == ["begin"] * 5 + ["word 1"]
    assert caplog.text.count("is not tried") == 2
    assert found.state().plain["proposals"][:4] == [None, "begin", None, "word 1"]


@pytest.mark.parametrize(
    "error", [InputError("no key."), RuntimeError("a bug")], ids=["own", "bug"]
)
def test_a_writer_that_fails_ends_the_search(error: Exception) -> None:
    found = reflecting(Written(error))
    expected = (
        r"GEPA's proposal 0 could not be written: no key" if error.args[0] == "no key." else "a bug"
    )
    with pytest.raises(type(error), match=expected):
        play(found, noisy, count=3)


def test_an_error_inside_of_gepa_is_one_sentence() -> None:
    found = searcher()
    found._plan = replace(found._plan, select="nothing")
    with pytest.raises(InputError, match=r"^GEPA failed with ValueError: .*search\.type$"):
        answer(found, noisy)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gepa", None)
    with pytest.raises(InputError, match=r"run `pip install 'rlprompt\[gepa\]'`"):
        searcher()


def test_examples_hold_rewards_by_name_notes_and_whether_it_was_cut() -> None:
    told = trial(searcher().incumbent, [[0.5, float("nan")]], many(1))
    group = told.groups[0]
    cut = completion(1, text="so on and", terminated=False)
    groups = (replace(group, completions=(group.completions[0], cut)),)
    values = {"a": torch.tensor([[0.5, float("nan")]]), "b": torch.tensor([[1.0, 0.0]])}
    told = replace(told, groups=groups, values=values, notes={"why": ["too long", None]})
    first, second = examples_of(told)
    assert first["Feedback"] == "Reward: 0.5\na: 0.5\nb: 1\nwhy: too long"
    assert second["Feedback"] == (
        "Reward: could not be said\na: could not be said\nb: 0\n"
        "The answer was too long and was cut off."
    )
    assert second["Generated Outputs"] == "so on and" and second["Inputs"] == "q 0"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"proposals": ["a"], "writer": {"type": "base"}}, "writer has no effect"),
        ({"proposals": ["a"], "template": "<curr_param><side_info>"}, "template has no effect"),
        ({"template": "<curr_param>"}, "template has no <side_info>"),
        ({"proposals": ["a", " "]}, "proposal 1 is blank"),
        ({"proposals": ["a", "a "]}, "proposal 1 is there twice"),
        ({"proposals": []}, "at least 1 item"),
        ({"evidence": {}}, "set acceptance: fresh"),
        ({"ranking_queries": 0}, "greater than or equal to 1"),
    ],
    ids=["writer", "template", "placeholder", "blank", "twice", "none", "evidence", "ranking"],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GEPASettings(**wrong)


@pytest.mark.parametrize(
    ("count", "settings"),
    [(1, {}), (2, {"acceptance": "fresh"}), (5, {"ranking_queries": 5})],
    ids=["one", "fresh", "ranking"],
)
def test_too_few_training_queries_are_refused(count: int, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"add queries or lower search\.ranking_queries"):
        searcher(start(count), **settings)


def test_a_state_of_another_search_is_refused() -> None:
    found = searcher()
    play(found, noisy, count=4)
    state = found.state()
    with pytest.raises(ValueError, match="other settings"):
        searcher(start(seed=4)).restore(state)
    with pytest.raises(ValueError, match=r"ran with gepa 0\.0\.9"):
        searcher().restore(LearnerState(state.tensors, {**state.plain, "gepa": "0.0.9"}))


SEARCH = {
    "type": "gepa",
    "template": "<curr_param> the <side_info>",  # the tiny base has no room for GEPA's own
    "writer": {"type": "base", "max_tokens": 8},
}


def gepa_run(folder: Path, output: Path, **changes: Any) -> Run:
    """A run on a tiny model that writes its own proposals."""
    training = {"steps": 12, "queries_per_step": 2, "save_every": 2}
    search = changes.pop("search", SEARCH)
    tree = search_recipe(folder, training=training, **changes).plain()
    tree["search"] = search
    return build_single_run(Recipe(**tree), folder, output, Console(file=StringIO()))


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def test_a_run_reflects_with_its_base_and_is_resumed_exactly(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run = gepa_run(tmp_path, whole, **stops(99, "crash"))
    summary = run.run()
    proposals = search_step(run).parts.searcher.state().plain["proposals"]
    assert len({each for each in proposals if each}) >= 2
    assert {row["origin"] for row in summary["candidates"]} == {"start", "reflection"}
    with pytest.raises(InputError, match="the machine fell over"):
        gepa_run(tmp_path, stopped, **stops(7, "crash")).run()
    resumed = gepa_run(tmp_path, stopped, **stops(99, "crash"))
    assert resumed.run(resume=True)["candidates"] == summary["candidates"]
    for kind in ("metrics", "evaluation", "completions"):
        assert comparable_rows(stopped, kind) == comparable_rows(whole, kind)
    assert search_step(resumed).state().plain == search_step(run).state().plain


def test_max_calls_ends_it_exactly_and_more_of_them_go_on(tmp_path: Path) -> None:
    """The last question is answered in part, and its rest is asked for first."""
    output = tmp_path / "run"
    search = {**SEARCH, "ranking_queries": 3, "max_calls": 10}
    summary = gepa_run(tmp_path, output, search=search).run()
    assert summary["stopped_because"] == "finished"
    assert sum(row["completions"] for row in summary["candidates"]) == 10
    more = gepa_run(tmp_path, output, search={**search, "max_calls": 17})
    assert sum(row["completions"] for row in more.run(resume=True)["candidates"]) == 17
    whole = gepa_run(tmp_path, tmp_path / "whole", search={**search, "max_calls": 17})
    whole.run()
    before, after = (search_step(each).parts.searcher.state().plain for each in (more, whole))
    assert before["sizes"] == after["sizes"]
