"""One budget on texts and numbers: where each wins, what it costs, and that it resumes exactly."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load, save

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.runs.learner import LearnerState
from rlprompt.runs.run import Run
from rlprompt.search.base import Candidate, SearchStart, Trial
from rlprompt.search.mixed import Mixed, MixedSettings
from rlprompt.types import Group, Query
from tests.fixtures.runs import comparable_rows, completion, tiny_policy
from tests.fixtures.searches import TEXTS, search_recipe, stops

Reward = Callable[[Candidate], float]

POLICY = tiny_policy(prompt=SoftSettings(init_text="Be nice."))
ENGINE = NativeEngine(POLICY)
QUERIES = [Query(messages=({"role": "user", "content": "hello"},), index=i) for i in range(400)]


@pytest.fixture(autouse=True)
def _report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def settings(**changes: Any) -> MixedSettings:
    plain: dict[str, Any] = {
        "max_calls": 1200,
        "text_search": {"texts": list(TEXTS), "completions": 16},
        "number_search": {"type": "es", "dim": 3, "sigma": 1.0, "population": 6},
        "num_virtual_tokens": None,
    }
    return MixedSettings(**(plain | changes))


def made(seed: int = 0, count: int = 400, **changes: Any) -> Mixed:
    given = SearchStart(TextPrompt("Be nice."), seed, ENGINE, QUERIES[:count], 4)
    return Mixed.make(settings(**changes), given)


class Ledger:
    """Does what a step of a search does, and writes down what was tried."""

    def __init__(self, search: Mixed, reward: Reward, noise: float = 0.0) -> None:
        self.search, self.reward, self.noise = search, reward, noise
        self.calls = 0
        self.steps: list[tuple[list[Candidate], list[int]]] = []
        self._draw = random.Random(7)

    def step(self) -> bool:
        """One step; False where the search is over or its calls do not suffice."""
        limit, n = self.search.settings.max_calls, self.search.settings.completions_per_query
        assert limit is not None
        if self.search.is_over or limit - self.calls < self.search.num_next * n:
            return False
        asked = self.search.ask()
        wanted = self.search.wanted_queries
        assert wanted is not None
        met = wanted[: (limit - self.calls) // (len(asked) * n)]
        if not met:
            return False
        self.search.tell([self._trial(candidate, met, n) for candidate in asked])
        self.calls += len(asked) * len(met) * n
        self.steps.append((list(asked), [query.index for query in met]))
        return True

    def run(self, steps: int = 10_000) -> Ledger:
        """All steps, or so many."""
        for _ in range(steps):
            if not self.step():
                break
        return self

    def _trial(self, candidate: Candidate, met: Any, n: int) -> Trial:
        mean = self.reward(candidate)
        rows = [[mean + self.noise * self._draw.gauss(0, 1) for _ in range(n)] for _ in met]
        groups = tuple(Group(query, (completion(1),) * n) for query in met)
        return Trial(candidate, groups, torch.tensor(rows, dtype=torch.float32))

    @property
    def text_steps(self) -> list[tuple[list[Candidate], list[int]]]:
        return [each for each in self.steps if all(c.prompt.kind == "text" for c in each[0])]

    @property
    def number_steps(self) -> list[tuple[list[Candidate], list[int]]]:
        return [each for each in self.steps if each not in self.text_steps]


def texts_win(candidate: Candidate) -> float:
    """The third text is best, and whatever is a soft prompt is worse than it."""
    text = candidate.prompt.init_text
    worth = 1.0 if text == TEXTS[2] else 0.2
    return worth if candidate.prompt.kind == "text" else worth - 0.5


def numbers_win(candidate: Candidate) -> float:
    """The third text is best, and further along the first entries of its embeddings is better."""
    worth = 0.6 if candidate.prompt.init_text == TEXTS[2] else 0.2
    if not isinstance(candidate.prompt, SoftPrompt):
        return worth
    start = SoftPrompt.create(settings().soft(candidate.prompt.init_text), POLICY, 0)
    moved = candidate.prompt.embeddings.detach() - start.embeddings.detach()
    return worth + float(moved[:, :8].sum())


def test_a_toy_where_texts_win_ends_with_the_best_text() -> None:
    done = Ledger(made(), texts_win, 0.1).run()
    best = done.search.incumbent
    assert (best.prompt.kind, best.prompt.init_text, best.origin) == ("text", TEXTS[2], "given")
    assert done.number_steps and done.text_steps
    # The text stands beside all numbers that are tried, under its own id.
    assert all(asked[0] == best for asked, _ in done.number_steps)


def test_a_toy_where_numbers_win_ends_with_a_soft_prompt_that_descends_from_the_best_text() -> None:
    done = Ledger(made(), numbers_win, 0.1).run()
    best = done.search.incumbent
    assert isinstance(best.prompt, SoftPrompt) and best.prompt.init_text == TEXTS[2]
    tried = {c.id: c for asked, _ in done.steps for c in asked}
    above = best
    while above.prompt.kind != "text":
        (parent,) = above.parents
        above = tried[parent]
    assert above.prompt.init_text == TEXTS[2] and above.id == 3
    text = next(c for c in tried.values() if c.prompt.init_text == TEXTS[2])
    assert numbers_win(best) > numbers_win(text)


def test_pure_noise_leaves_the_text() -> None:
    kept = 0
    for seed in range(6):
        done = Ledger(made(seed, max_calls=500, evidence={"alpha": 0.1}), lambda _: 0.0, 1.0)
        done._draw.seed(seed)
        kept += done.run().search.incumbent.prompt.kind == "text"
    assert kept >= 5


def test_without_evidence_the_mean_of_the_numbers_is_believed_as_by_the_number_search() -> None:
    done = Ledger(made(evidence=None), texts_win, 0.1).run()
    assert done.search.incumbent.prompt.kind == "soft"


def test_ids_are_those_of_one_search() -> None:
    done = Ledger(made(), texts_win, 0.1).run()
    kinds: dict[int, Candidate] = {}
    for asked, _ in done.steps:
        assert len({c.id for c in asked}) == len(asked)
        for c in asked:
            assert kinds.setdefault(c.id, c).prompt.init_text == c.prompt.init_text
            assert kinds[c.id].prompt.kind == c.prompt.kind
    assert (
        sorted(kinds)[:5] == list(range(5))
        and min(i for i, c in kinds.items() if c.prompt.kind == "soft") == 5
    )


@pytest.mark.parametrize("share", [0.1, 0.37, 0.8])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_share_of_the_texts_is_never_exceeded(share: float, copies: int) -> None:
    search = made(
        max_calls=701,
        text_share=share,
        completions_per_query=copies,
        text_search={"texts": list(TEXTS)},
        evidence=None,
    )
    done = Ledger(search, lambda _: 0.0, 1.0).run()
    spent = sum(len(asked) * len(met) for asked, met in done.text_steps) * copies
    assert spent <= share * 701 and search.metrics["text_calls"] == spent
    assert share * 701 - spent < 5 * copies  # no query for all five is left over
    assert done.calls <= 701 and 701 - done.calls < search.num_next * copies


def test_what_a_decided_race_leaves_over_goes_to_the_numbers() -> None:
    done = Ledger(made(text_share=0.9), texts_win).run()
    spent = sum(len(asked) * len(met) for asked, met in done.text_steps)
    assert spent < 300 and done.calls - spent > 850


def test_with_evidence_numbers_meet_no_query_that_the_text_was_chosen_by() -> None:
    done = Ledger(made(max_calls=1000), texts_win, 0.1).run()
    of_texts = {query for _, met in done.text_steps for query in met}
    of_numbers = [query for _, met in done.number_steps for query in met]
    assert of_texts and of_numbers and not of_texts & set(of_numbers)
    assert len(set(of_numbers)) == len(of_numbers)  # none twice, so each is new to the test


def test_it_hands_over_when_texts_are_expected_to_gain_too_little() -> None:
    """Equal texts: a race by evidence goes on to the end of its share, unless told otherwise."""
    steps = {}
    for least in (None, 0.02, 0.5):
        search = made(text_search={"texts": list(TEXTS)}, min_gain=least, text_share=0.8)
        steps[least] = len(Ledger(search, lambda _: 0.0, 0.5).run(50).text_steps)
    assert steps[0.5] < steps[0.02] <= steps[None]
    early = Ledger(made(min_gain=0.5, text_search={"texts": list(TEXTS)}), texts_win, 0.1)
    early.run(2)
    assert early.search.metrics["expected_gain"] > 0.5  # the best text is not believed in yet


@pytest.mark.parametrize("kind", ["texts", "evolution"])
@pytest.mark.parametrize("numbers", ["cmaes", "es"])
@pytest.mark.parametrize("after", [3, 12])
def test_it_resumes_exactly(kind: str, numbers: str, after: int) -> None:
    """In the part of texts, and in that of numbers; through the files of a checkpoint."""

    def new() -> Mixed:
        text_search = {"type": kind, "texts": list(TEXTS)}
        number_search = {"type": numbers, "dim": 3, "population": 6}
        return made(text_search=text_search, number_search=number_search, max_calls=500)

    straight = Ledger(new(), numbers_win, 0.2).run(after)
    state = straight.search.state()
    kept = LearnerState(load(save(dict(state.tensors))), json.loads(json.dumps(state.plain)))
    again = Ledger(new(), numbers_win, 0.2)
    again.search.restore(kept)
    again.calls, again.steps = straight.calls, list(straight.steps)
    again._draw.setstate(straight._draw.getstate())
    straight.run()
    again.run()
    assert [([c.id for c in a], m) for a, m in again.steps] == [
        ([c.id for c in a], m) for a, m in straight.steps
    ]
    assert again.calls == straight.calls and again.search.metrics == straight.search.metrics
    for (one, _), (two, _) in zip(straight.steps, again.steps, strict=True):
        for a, b in zip(one, two, strict=True):
            assert (a.parents, a.origin) == (b.parents, b.origin)
            assert a.prompt.state_dict().keys() == b.prompt.state_dict().keys()
            for name, tensor in a.prompt.state_dict().items():
                assert torch.equal(tensor, b.prompt.state_dict()[name])


def test_a_state_of_other_numbers_is_refused() -> None:
    state = Ledger(made(), texts_win).run(3).search.state()
    for change in (
        {"number_search": {"type": "es", "dim": 4}},
        {"evidence": None},
        {"num_virtual_tokens": 5},
    ):
        with pytest.raises(ValueError, match="with other settings"):
            made(**change).restore(state)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_calls": None}, "max_calls is what texts and numbers share"),
        ({"number_search": {"evidence": {}}}, r"number_search\.evidence has no effect"),
        ({"number_search": {"max_calls": 5}}, r"number_search\.max_calls has no effect"),
        ({"text_search": {"texts": ["a", "b"], "max_calls": 5}}, r"text_search\.max_calls has no"),
        (
            {"text_search": {"texts": ["a", "b"], "completions_per_query": 2}},
            r"text_search\.completions_per_query has no effect",
        ),
        ({"evidence": None, "number_query_share": 0.5}, "number_query_share has no effect"),
        ({"text_search": {"type": "cmaes"}}, "text_search"),
        ({"number_search": {"type": "texts"}}, "number_search"),
        ({"text_share": 1.0}, "text_share"),
        ({"text_share": math.nan}, "text_share"),
        ({"min_gain": 0.0}, "min_gain"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_calls": 10, "text_share": 0.4}, "leaves 4 of search.max_calls, 10, for texts"),
        ({"max_calls": 10, "text_share": 0.6}, "leaves 4 of search.max_calls, 10, for numbers"),
        ({"number_search": {"dim": 65}}, r"search\.num_virtual_tokens"),
        (
            {"number_search": {"dim": 200}, "num_virtual_tokens": 3},
            r"search\.number_search\.dim is 200, but the prompt has only 192",
        ),
        (
            {"number_search": {"dim": 4, "components": 1000}},
            r"search\.number_search\.components is 1000",
        ),
        (
            {"text_search": {"type": "evolution", "texts": ["the rain"], "max_length": 1}},
            r"search\.text_search\.max_length",
        ),
    ],
    ids=["texts", "numbers", "dim", "size", "components", "length"],
)
def test_what_would_fail_later_is_refused_at_the_start(
    changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        made(**changes)


def test_without_a_base_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"no base here.*use search\.type: texts or evolution"):
        Mixed.make(settings(), SearchStart(TextPrompt("Be nice."), 0))


def test_too_few_queries_to_set_some_apart_are_refused() -> None:
    with pytest.raises(InputError, match=r"set search\.evidence to null"):
        made(count=3)
    assert made(count=3, evidence=None).num_next == 5


def test_errors_of_a_part_name_its_settings() -> None:
    spread = {"texts": list(TEXTS), "evidence": {"spread": 0.2}}
    with pytest.raises(InputError, match=r"^search\.text_search\.evidence\.spread does not hold"):
        Ledger(made(text_search=spread), texts_win).run()
    with pytest.raises(InputError, match=r"^search\.evidence\.spread does not hold"):
        Ledger(made(evidence={"spread": 0.2}), texts_win, 0.1).run()


RUN: dict[str, Any] = {
    "type": "mixed",
    "max_calls": 61,
    "evidence": None,
    "text_share": 0.4,
    "text_search": {"texts": list(TEXTS), "completions": 4},
    "number_search": {"type": "es", "dim": 4, "population": 4},
}


def mixed_run(folder: Path, output: Path, **more: Any) -> Run:
    """A run of `RUN` over a tiny model."""
    training = {"steps": 40, "queries_per_step": 2, "save_every": 1}
    tree = search_recipe(folder, training=training, **more).plain()
    recipe = Recipe(**(tree | {"search": RUN}))
    return build_single_run(recipe, folder, output, Console(file=StringIO()))


def test_a_run_spends_one_budget_and_leaves_what_it_believes(tmp_path: Path) -> None:
    summary = mixed_run(tmp_path, tmp_path / "run").run()
    rows = [r for r in read_jsonl(tmp_path / "run/completions.jsonl") if r["split"] == "train"]
    metrics = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert metrics[-1]["search/calls"] == len(rows) and 61 - 5 < len(rows) <= 61
    assert summary["stopped_because"] == "finished"
    assert metrics[0]["search/numbers"] == 0.0 and metrics[-1]["search/numbers"] == 1.0
    assert 0 < metrics[-1]["search/text_calls"] <= 0.4 * 61
    kinds = {row["id"]: row["kind"] for row in summary["candidates"]}
    assert set(kinds.values()) == {"text", "soft"}
    soft = [row for row in summary["candidates"] if row["kind"] == "soft"]
    assert kinds[soft[0]["parents"][0]] == "text" and soft[0]["text"] in ["Be nice.", *TEXTS]
    info = read_artifact_info(tmp_path / "run" / "artifact")
    assert info.init_text in ["Be nice.", *TEXTS]


def test_a_run_that_falls_over_resumes_exactly(tmp_path: Path) -> None:
    """Once among texts, once among numbers."""
    mixed_run(tmp_path, tmp_path / "straight", **stops(99, "crash")).run()
    for at, resume in ((1, False), (4, True)):
        with pytest.raises(InputError, match="fell over"):
            mixed_run(tmp_path, tmp_path / "cut", **stops(at, "crash")).run(resume=resume)
    mixed_run(tmp_path, tmp_path / "cut", **stops(99, "crash")).run(resume=True)
    numbers = [row["search/numbers"] for row in read_jsonl(tmp_path / "cut/metrics.jsonl")]
    assert numbers[1] == 0.0 and numbers[4] == 1.0
    for kind in ("metrics", "completions", "evaluation"):
        one, two = (comparable_rows(tmp_path / name, kind) for name in ("straight", "cut"))
        assert one == two, kind


def test_a_recipe_for_a_soft_prompt_is_refused(tmp_path: Path) -> None:
    tree = search_recipe(tmp_path).plain() | {"search": RUN, "prompt": {"type": "soft"}}
    with pytest.raises(ValidationError, match=r"search\.type: mixed starts from .* type text"):
        Recipe(**tree)
