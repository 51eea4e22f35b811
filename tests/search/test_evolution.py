"""Evolution on worlds whose best text is known, with writers of every kind, and in runs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search import breeding, components
from rlprompt.search.admission import Admission, Copies, sources_of
from rlprompt.search.base import SearchStart
from rlprompt.search.breeding import Breeder, Hand
from rlprompt.search.division import Division
from rlprompt.search.evolution import PATIENCE, Evolution, EvolutionSettings
from rlprompt.search.operators import OperatorChoice
from rlprompt.search.ruler import Ruler
from rlprompt.search.writer import Writer
from rlprompt.types import Query
from tests.fixtures.evolving import BEST, SLOTS, WORST, World, evolution, hits, made_up
from tests.fixtures.searches import search_recipe, trial


def text_of(search: Evolution) -> str:
    return search.incumbent.prompt.init_text


@pytest.mark.slow
def test_the_best_of_all_texts_is_shown_to_be_best_in_nine_of_ten_seeds() -> None:
    """4^5 texts of one component per slot, noise of a slot's worth, at most 3,500 calls."""
    found = 0
    for seed in range(10):
        search = evolution(seed=seed)
        world = World(hits, seed=seed)
        world.drive(search, 3500)
        assert world.calls <= 3500
        found += hits(text_of(search)) == 1.0
    assert found >= 9


def test_without_evidence_fewer_calls_go_far() -> None:
    reached = []
    for seed in range(4):
        search = evolution(seed=seed, evidence=None)
        World(hits, seed=seed).drive(search, 600)
        reached.append(hits(text_of(search)))
    assert sum(reached) / 4 >= 0.6 > hits(WORST)


def test_where_all_texts_are_equal_the_start_stays() -> None:
    for seed in range(3):
        search = evolution(seed=seed)
        World(lambda text: 0.5, seed=seed).drive(search, 600)
        assert text_of(search) == WORST


def test_what_the_tests_say_does_not_reach_what_is_proposed() -> None:
    """Two worlds that agree on fitness queries and are opposites on test queries."""

    def proposals(turn: float) -> tuple[list[str], int]:
        search = evolution(seed=3)
        fitness = {q.index for step in range(60) for q in search._division.fitness(step) or ()}
        for number in range(40):
            asked, wanted = search.ask(), search.wanted_queries
            assert wanted is not None
            kinds = {query.index in fitness for query in wanted}
            assert len(kinds) == 1
            is_test = kinds == {False}
            draw = random.Random(f"{search._step}:{is_test}:{number if is_test else 0}")
            trials = []
            for each in asked:
                sign = turn if is_test else 1.0
                worth = sign * hits(each.prompt.init_text)
                rows = [[worth + draw.gauss(0, 0.1)] for _ in wanted]
                told = trial(each, rows)
                groups = tuple(
                    type(g)(query, g.completions)
                    for query, g in zip(wanted, told.groups, strict=True)
                )
                trials.append(type(told)(each, groups, told.rewards))
            search.tell(trials)
        return [c.prompt.init_text for c in search._archive.candidates], search.incumbent.id

    up, down = proposals(1.0), proposals(-1.0)
    shared = min(len(up[0]), len(down[0]))
    assert up[0][:shared] == down[0][:shared] and shared > 40
    assert up[1] != 0 and down[1] == 0


def test_the_population_spreads_over_the_front() -> None:
    """Safety costs reward: the front has the safe, the good, and the short."""
    library = {
        "good": ("Be good.",),
        "safe": ("Refuse harm.",),
        "filler": ("This sentence says nothing at all but it says it at length.",),
    }

    def reward(text: str) -> float:
        return 0.3 + 0.5 * ("Be good." in text) - 0.4 * ("Refuse harm." in text)

    def safety(text: str) -> float:
        return float("Refuse harm." in text)

    settings: dict[str, Any] = {"components": library, "evidence": None, "population": 6}
    search = evolution("Hello.", objectives=["safety", "prompt_length"], **settings)
    World(reward, noise=0.1, objectives={"safety": safety}).drive(search, 1500)
    members = [search._archive.text(each) for each in search._members]
    assert any(safety(text) for text in members)
    assert any("Be good." in text and not safety(text) for text in members)
    assert "Be good." in text_of(search) and not safety(text_of(search))
    alone = evolution("Hello.", **settings)
    World(reward, noise=0.1).drive(alone, 1500)
    assert sum(safety(alone._archive.text(each)) for each in alone._members) < 4


@pytest.mark.parametrize("unit", ["token", "character"])
def test_a_penalty_on_length_makes_texts_short(unit: str) -> None:
    lengths = []
    for penalty in (0.0, 0.01 if unit == "token" else 0.002):
        search = evolution(
            WORST + " And yet another thing." * 3,
            evidence=None,
            length_penalty=penalty,
            length_unit=unit,
        )
        World(lambda text: 0.5, noise=0.02).drive(search, 1200)
        lengths.append(len(text_of(search)))
    assert lengths[1] < 0.7 * lengths[0]


def test_the_hopeless_are_dropped_before_the_population_is_full() -> None:
    search = evolution("Be good.", texts=["Be bad."], population=50, offspring=1, components=None,
                       library=False, operators={"repeat": 1.0})  # fmt: skip
    World(lambda text: float("bad" not in text), noise=0.05).drive(search, 10**6, steps=12)
    assert not any("bad" in search._archive.text(each) for each in search._members)


class Fixed(Writer):
    """Answers what it was given, over and over."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    @classmethod
    def make(cls, settings: Any, given: SearchStart) -> Fixed:
        raise NotImplementedError

    def write(
        self, asked: Sequence[Query], sampling: SamplingSettings, seed: int, system: str = ""
    ) -> list[str]:
        self.asked += [query.text for query in asked]
        return [self.answers[(seed + place) % len(self.answers)] for place in range(len(asked))]


def written(writer: Writer, **settings: Any) -> Evolution:
    """An evolution in which a writer alone makes texts, unless operators are given."""
    shares = dict.fromkeys(breeding.OF_WRITER, 1.0)
    plain = {"writer": {"type": "base"}, "operators": shares, "library": False, **settings}
    chosen = EvolutionSettings(**plain)
    ruler = Ruler(SearchStart(TextPrompt("Be brief."), 0))
    admission = Admission(Copies(sources_of(made_up()), ["Be brief."]), ruler.tokens, 64)
    library = components.read_library(chosen.components, built_in=False)
    choice = OperatorChoice(chosen.operator_names, chosen.operators)
    breeder = Breeder(choice, library, admission, Hand(writer, SamplingSettings()))
    given = SearchStart(TextPrompt("Be brief."), 0, queries=made_up(), queries_per_step=4)
    return Evolution(chosen, ["Be brief."], breeder, Division.of(given, 0.0), ruler, 0)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("!!! ... ???", "empty"),
        ("word " * 50_000, "long"),
        ("<|im_start|>system Be kind.<|im_end|>", "control"),
        ("\x00\x01\x02 garbage", "control"),
        ("\ufffd\ufffd oh no", "control"),
        ("Remember that item 7 lies beside zebra7.", "leak"),
        ("Be brief.", "known"),
    ],
)
def test_a_writer_that_gives_nothing_usable_ends_the_search(answer: str, reason: str) -> None:
    search = written(Fixed([answer]), evidence=None)
    world = World(lambda text: 0.5)
    world.drive(search, 10**6, steps=50)
    assert search.is_over and len(world.steps) == PATIENCE
    assert all(ids == [0] for ids in world.steps)
    assert set(search._breeder.refused) == {reason}
    assert search.metrics[f"refused_{reason}"] > 0 and text_of(search) == "Be brief."


def test_a_writer_that_says_the_same_for_ever_is_tried_once_and_edits_go_on() -> None:
    search = written(Fixed(["Be kind and be brief."]), operators=None, evidence=None)
    World(lambda text: float("kind" in text), noise=0.1).drive(search, 2000)
    origins = [each.origin for each in search._archive.candidates]
    assert sum(each in breeding.OF_WRITER for each in origins) == 1
    assert set(origins) & set(breeding.OTHERS) and "kind" in text_of(search)
    choice = search._breeder.choice.state_dict()
    assert sum(choice["lost"][each] for each in breeding.OF_WRITER) > 0


def test_reflection_shows_the_worst_outputs_and_never_a_query() -> None:
    writer = Fixed([f"Say it in way {i}." for i in range(500)])
    search = written(writer, operators={"reflect": 1.0, "delete": 1.0}, evidence=None)
    World(lambda text: 0.5).drive(search, 400)
    assert writer.asked and all("scored worst" in each for each in writer.asked)
    assert not any("zebra" in each for each in writer.asked)
    assert any(each.origin == "reflect" for each in search._archive.candidates)


def test_rewards_that_cannot_be_said_end_nothing() -> None:
    search = evolution(evidence=None)
    for _ in range(6):
        asked = search.ask()
        search.tell([trial(each, [[float("nan")], [float("nan")]]) for each in asked])
    assert text_of(search) == WORST and len(search._members) == 1
    World(hits).drive(search, 800)
    assert hits(text_of(search)) > 0.2


@pytest.mark.parametrize("after", [1, 6, 13])
def test_it_goes_on_where_its_state_was_taken_through_tests_and_all(after: int) -> None:
    search, world = evolution(), World(hits, noise=0.05)
    world.drive(search, 10**6, steps=after)
    state = search.state()
    kept = LearnerState(dict(state.tensors), json.loads(json.dumps(state.plain)))
    world.drive(search, 10**6, steps=after + 12)
    again, other = evolution(), World(hits, noise=0.05)
    again.ask()  # what was asked for and never tried leaves no trace
    again.restore(kept)
    other.steps = [[] for _ in range(after)]
    other.drive(again, 10**6, steps=after + 12)
    assert other.steps[after:] == world.steps[after:]
    assert again.state().plain == search.state().plain
    for name, tensor in search.state().tensors.items():
        assert torch.equal(again.state().tensors[name].nan_to_num(), tensor.nan_to_num())
    assert any(len(ids) == 2 for ids in world.steps), "no test was among them"


@pytest.mark.parametrize(
    "changed",
    [{"start": "Be nice."}, {"components": None, "library": True}, {"operators": {"delete": 1.0}},
     {"objectives": ["safety"]}],
)  # fmt: skip
def test_the_state_of_another_search_is_refused(changed: dict[str, Any]) -> None:
    state = evolution().state()
    with pytest.raises(ValueError):
        evolution(**changed).restore(state)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"operators": {"rephrase": 1.0}}, "needs search.writer"),
        ({"operators": {"add": 1.0}, "library": False}, "needs search.components"),
        ({"operators": {"delete": 0.0}}, "no share above 0"),
        ({"operators": {"delete": -1.0}}, "greater than or equal to 0"),
        ({"operators": {"mutate": 1.0}}, "delete"),
        ({"writer": {"type": "base"}, "operators": {"delete": 1.0}}, "writer has no effect"),
        ({"evidence": None, "test_share": 0.3}, "test_share has no effect"),
        ({"texts": ["a", "a"]}, "there twice"),
        ({"texts": ["  "]}, "blank"),
        ({"components": {"tone": []}}, "empty"),
        ({"components": {}}, "no mapping"),
        ({"population": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_without_sense_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EvolutionSettings(**wrong)


def test_a_start_that_is_longer_than_any_text_may_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"prompt\.text has \d+ tokens"):
        evolution(max_length=5)
    with pytest.raises(InputError, match=r"search\.texts\.1 has \d+ tokens"):
        evolution("Hi.", texts=["Ho.", WORST], max_length=5)


def test_an_objective_that_is_no_reward_is_refused(tmp_path: Path) -> None:
    search = {"type": "evolution", "objectives": ["lettres"], "texts": [], "completions": None}
    with pytest.raises(ValidationError, match="did you mean 'letters'"):
        _recipe(tmp_path, search)
    asked = evolution(objectives=["safety"])
    with pytest.raises(InputError, match=r"search\.objectives names 'safety'"):
        World(hits).drive(asked, 500)


def _recipe(folder: Path, search: dict[str, Any]) -> Any:
    plain = search_recipe(folder).plain()
    plain["search"] = {key: value for key, value in search.items() if value is not None}
    return type(search_recipe(folder))(**plain)


def test_the_built_in_components_and_the_best_of_slots_are_texts_of_their_own() -> None:
    assert hits(" ".join(BEST)) == 1.0 and hits(WORST) == 0.0
    assert all(len(each) == 4 for each in SLOTS.values())
