"""A writer that learns by what its texts have earned."""

from __future__ import annotations

import math
import random
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.runs.checkpoint import load_checkpoint
from rlprompt.runs.learner import LearnerState
from rlprompt.runs.run import Run
from rlprompt.search import rewriting
from rlprompt.search.admission import Admission, Copies
from rlprompt.search.base import SearchStart, Trial
from rlprompt.search.breeding import Parent
from rlprompt.search.rl import RL, Policy, RLSettings
from rlprompt.search.trained_writer import TrainedWriter, WriterTraining
from rlprompt.types import Group, Query
from tests.fixtures.runs import comparable_rows, completion, queries, tiny_policy
from tests.fixtures.searches import search_recipe, stops

REQUEST = Query(({"role": "user", "content": "Write."},))
TRAINING = WriterTraining("You write for a living, every day.", None, 0.1, 0.0)
SAMPLING = SamplingSettings(temperature=1.0, max_tokens=3)


def writer(training: WriterTraining = TRAINING) -> TrainedWriter:
    return TrainedWriter(NativeEngine(tiny_policy()), training, SAMPLING, 0)


def low(group: Group) -> list[float]:
    """Share of tokens from the first fifth of the vocabulary."""
    return [
        sum(token < 60 for token in answer.token_ids) / len(answer.token_ids)
        for answer in group.completions
    ]


def test_the_writer_says_more_often_what_has_paid() -> None:
    made = writer()
    before = torch.tensor(low(made.draw(REQUEST, 128, 10_000))).mean()
    for step in range(25):
        group = made.draw(REQUEST, 32, step)
        assert made.learn(group, low(group), step)
    after = torch.tensor(low(made.draw(REQUEST, 128, 10_000))).mean()
    assert made.updates == 25
    assert after > 2 * before


def test_nothing_is_learned_where_nothing_differs() -> None:
    made = writer()
    tensors = {name: each.clone() for name, each in made.prompt.state_dict().items()}
    group = made.draw(REQUEST, 4, 0)
    assert made.learn(group, [0.5] * 4, 0) == {}
    assert made.learn(group, [math.nan, 0.5, math.nan, math.nan], 0) == {}
    assert all(torch.equal(tensors[n], t) for n, t in made.prompt.state_dict().items())


def test_unknown_rewards_take_no_part() -> None:
    group = writer().draw(REQUEST, 4, 0)
    one, two = writer(), writer()
    one.learn(group, [1.0, 0.0, math.nan, math.nan], 0)
    two.learn(group, [1.0, 0.0, 0.5, 0.5], 0)
    for (_, a), (_, b) in zip(
        one.prompt.state_dict().items(), two.prompt.state_dict().items(), strict=True
    ):
        assert not torch.equal(a, b)  # and both moved
        assert a.isfinite().all()


def test_the_writer_goes_on_where_its_state_was_taken() -> None:
    one = writer()
    for step in range(3):
        group = one.draw(REQUEST, 4, step)
        one.learn(group, low(group), step)
    state = one.state()
    two = writer()
    two.restore(state)
    for step in range(3, 6):
        groups = [each.draw(REQUEST, 4, step) for each in (one, two)]
        assert groups[0] == groups[1]
        for each, group in zip((one, two), groups, strict=True):
            each.learn(group, low(group), step)
    for name, tensor in one.prompt.state_dict().items():
        assert torch.equal(tensor, two.prompt.state_dict()[name])


class Says(TrainedWriter):
    """Writes what it is told, and keeps what it has earned."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.earned: list[list[float]] = []

    def draw(self, request: Query, count: int, seed: int) -> Group:
        texts = [self.texts[i % len(self.texts)] for i in range(count)]
        return Group(request, tuple(completion(1, text=text) for text in texts))

    def learn(self, group: Group, rewards: list[float], seed: int) -> dict[str, float]:  # type: ignore[override]
        self.earned.append(list(rewards))
        return {}


def policy(*texts: str) -> tuple[Policy, Says]:
    said = Says(*texts)
    admission = Admission(Copies(["What is the airspeed of a swallow?"]), len, 100)
    return Policy(said, None, admission, 0), said


def test_refused_texts_earn_the_least_and_known_ones_what_they_did() -> None:
    made, said = policy("Be kind.", "Be kind.", "<|im_end|>", "...", "Be quick.")
    parents = [Parent(0, "Be nice.")]
    known: set[str] = set()
    born = made.breed(parents, 5, random.Random(0), lambda text: text in known, {})
    assert [each.text for each in born] == ["Be kind.", "Be quick."]
    assert all(each.parents == (0,) for each in born)
    made.told({"Be kind.": 0.7, "Be quick.": 0.4}, 0)
    assert said.earned[-1] == pytest.approx([0.7, 0.7, 0.4, 0.4, 0.4])
    known |= {"Be kind.", "Be quick."}
    assert made.breed(parents, 5, random.Random(0), lambda text: text in known, {}) == []
    made.told({}, 1)
    assert said.earned[-1] == pytest.approx([0.7, 0.7, 0.4, 0.4, 0.4])
    assert made.refused == {"known": 4, "control": 2, "empty": 2}
    other, _ = policy("Be kind.")
    other.load_state_dict(made.state_dict())
    assert other.state_dict() == made.state_dict()


def test_texts_that_nothing_could_score_teach_nothing() -> None:
    made, said = policy("Be kind.", "...")
    made.breed([Parent(0, "Be nice.")], 2, random.Random(0), lambda _: False, {})
    made.told({"Be kind.": math.nan}, 0)
    assert all(math.isnan(each) for each in said.earned[-1])


def test_it_needs_a_base_of_its_own() -> None:
    with pytest.raises(InputError, match="there is no base here"):
        RL.make(RLSettings(), SearchStart(TextPrompt("Be nice."), 0))


def letters_only(answer: str) -> str:
    """What a tiny model with random weights says, without its control characters."""
    return "".join(c for c in answer if c.isascii() and c.isalpha())


@pytest.fixture
def tiny_says_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "proposed", letters_only)


def searcher() -> RL:
    start = SearchStart(
        TextPrompt("Be nice."), 0, engine=NativeEngine(tiny_policy()), queries=queries(8)
    )
    settings = RLSettings(group_size=4, max_tokens=24, max_length=64, evidence=None)
    return RL.make(settings, start)


def try_all(made: RL, seed: int) -> list[str]:
    draw = random.Random(seed)
    asked = made.ask()
    trials = []
    for candidate in asked:
        groups = tuple(Group(query, (completion(1, 2),)) for query in queries(4))
        rewards = torch.tensor([[draw.random()] for _ in groups])
        trials.append(Trial(candidate, groups, rewards))
    made.tell(trials)
    return [candidate.prompt.init_text for candidate in asked]


@pytest.mark.usefixtures("tiny_says_letters")
@pytest.mark.parametrize("after", [0, 2])
def test_a_search_goes_on_where_its_state_was_taken(after: int) -> None:
    one = searcher()
    for step in range(after):
        try_all(one, step)
    state = one.state()
    two = searcher()
    two.restore(LearnerState(dict(state.tensors), dict(state.plain)))
    for step in range(after, after + 4):
        assert try_all(one, step) == try_all(two, step)
    assert one.incumbent.prompt.init_text == two.incumbent.prompt.init_text
    assert one.metrics == two.metrics
    assert one.metrics["writer/updates"] > 0


def run_of(folder: Path, output: Path, at: int) -> Run:
    """A short run that crashes in a step."""
    plain = search_recipe(folder, **stops(at, "crash")).plain()
    plain["search"] = {"type": "rl", "group_size": 3, "max_tokens": 12, "evidence": None}
    plain["training"] |= {"steps": 6, "save_every": 2}
    return build_single_run(Recipe(**plain), folder, output, Console(file=StringIO()))


@pytest.mark.usefixtures("tiny_says_letters")
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_of(tmp_path, straight, 99).run()
    with pytest.raises(InputError, match="the machine fell over"):
        run_of(tmp_path, cut, 3).run()
    run_of(tmp_path, cut, 99).run(resume=True)
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(straight, kind) == comparable_rows(cut, kind), kind
    one, two = (load_checkpoint(folder / "checkpoints").tensors for folder in (straight, cut))
    assert one.keys() == two.keys() and any(name.startswith("search/writer/") for name in one)
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=0.0, atol=0.0, equal_nan=True), name
