"""Searching the numbers of a prompt: what is asked, what is believed, and what noise does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.engines.native import NativeEngine
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.search.base import Candidate, Searcher, SearchStart, Trial
from rlprompt.search.cmaes import CMAESSettings
from rlprompt.search.continuous import NoiseSettings
from rlprompt.search.es import ESSettings
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.make import make_searcher
from rlprompt.search.subspace import flat_parameters
from rlprompt.types import Group
from tests.fixtures.prompts import make
from tests.fixtures.runs import completion, queries, tiny_policy
from tests.fixtures.searches import search_run, search_step, trial

SETTINGS = {"cmaes": CMAESSettings, "es": ESSettings}
KINDS = [(searcher, kind) for searcher in SETTINGS for kind in ("soft", "prefix")]


def made(searcher: str = "es", kind: str = "soft", **settings: Any) -> tuple[Searcher, Prompt]:
    prompt = make(kind, tiny_policy())
    chosen = SETTINGS[searcher](**{"dim": 4, "sigma": 0.5, **settings})
    return make_searcher(chosen, SearchStart(prompt, 3, scale=0.1)), prompt


def quality(start: Prompt) -> Callable[[Candidate], float]:
    """Minus the distance to a prompt beside the start, in the first tenth of the numbers."""
    origin = flat_parameters(start)
    draw = torch.Generator().manual_seed(0)
    aim = origin + 0.1 * torch.randn(len(origin), generator=draw, dtype=torch.float64)

    def of(candidate: Candidate) -> float:
        return -float((flat_parameters(candidate.prompt) - aim).square().mean())

    return of


@pytest.mark.parametrize(("searcher", "kind"), KINDS)
def test_the_reward_of_what_is_believed_rises(searcher: str, kind: str) -> None:
    search, start = made(searcher, kind, dim=6)
    reward = quality(start)
    begun = reward(search.incumbent)
    for _ in range(40):
        search.tell([trial(c, [[reward(c)]]) for c in search.ask()])
    assert reward(search.incumbent) > begun + 0.3 * 6 / len(flat_parameters(start)) * abs(begun)
    assert search.metrics["sigma"] < 0.5 and search.metrics["generation"] == 40


@pytest.mark.parametrize("searcher", SETTINGS)
def test_candidates_are_prompts_of_their_own_around_the_mean(searcher: str) -> None:
    search, start = made(searcher)
    before = flat_parameters(start)
    asked = search.ask()
    assert [c.id for c in asked] == list(range(9)) and search.num_next == 9
    assert torch.equal(flat_parameters(asked[0].prompt), before)
    assert search.incumbent is asked[0] and asked[0].origin == "start"
    kept = [flat_parameters(candidate.prompt) for candidate in asked]
    assert all(not torch.equal(kept[0], other) for other in kept[1:])
    assert all(c.parents == (0,) and c.origin == "sampled" for c in asked[1:])
    spread = torch.stack(kept[1:]) - before
    assert float(spread.square().mean().sqrt()) == pytest.approx(0.05, rel=0.5)
    search.tell([trial(c, [[float(c.id)]]) for c in asked])
    following = search.ask()
    assert [c.id for c in following] == list(range(9, 18))
    assert following[0].origin == "mean" and following[0].parents == (0,)
    for candidate, values in zip(asked, kept, strict=True):
        assert torch.equal(flat_parameters(candidate.prompt), values)
    assert torch.equal(flat_parameters(start), before)


@pytest.mark.parametrize("searcher", SETTINGS)
def test_asked_twice_it_asks_for_the_same(searcher: str) -> None:
    search, _ = made(searcher)
    one, two = search.ask(), search.ask()
    assert [c.id for c in one] == [c.id for c in two]
    assert all(a.prompt is b.prompt for a, b in zip(one, two, strict=True))


def test_what_is_believed_was_tried_and_is_no_lucky_candidate() -> None:
    """One candidate gets 100; the mean that was tried beside it is what is believed in."""
    search, _ = made()
    for _ in range(3):
        asked = search.ask()
        search.tell([trial(c, [[100.0 if c is asked[3] else 0.0]]) for c in asked])
        assert search.incumbent is asked[0]


@pytest.mark.parametrize("searcher", SETTINGS)
@pytest.mark.parametrize("rewards", [math.nan, 0.5])
def test_rewards_that_say_nothing_change_nothing(searcher: str, rewards: float) -> None:
    search, start = made(searcher)
    for _ in range(3):
        search.tell([trial(c, [[rewards], [rewards]]) for c in search.ask()])
    assert torch.equal(flat_parameters(search.ask()[0].prompt), flat_parameters(start))
    assert search.metrics["sigma"] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("searcher", SETTINGS)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_missing_or_infinite_leaves_numbers_finite(
    searcher: str, odd: float
) -> None:
    search, start = made(searcher)
    reward = quality(start)
    for step in range(10):
        asked = search.ask()
        told = [[odd if c is asked[2 + step % 3] else reward(c), reward(c)] for c in asked]
        search.tell([trial(c, [[a], [b]]) for c, (a, b) in zip(asked, told, strict=True)])
    assert all(bool(flat_parameters(c.prompt).isfinite().all()) for c in search.ask())
    if odd != math.inf:  # which is the best reward that there is
        assert reward(search.incumbent) > reward(Candidate(0, start))


@pytest.mark.parametrize("searcher", SETTINGS)
def test_only_the_order_of_rewards_counts(searcher: str) -> None:
    one, start = made(searcher)
    other, _ = made(searcher)
    reward = quality(start)
    for _ in range(6):
        one.tell([trial(c, [[reward(c)]]) for c in one.ask()])
        other.tell([trial(c, [[100.0 * math.exp(1000.0 * reward(c))]]) for c in other.ask()])
    pairs = zip(one.ask(), other.ask(), strict=True)
    assert all(torch.equal(flat_parameters(a.prompt), flat_parameters(b.prompt)) for a, b in pairs)


def noisy(search: Searcher, draw: torch.Generator, noise: float) -> list[int]:
    """One step on two queries of a reward that grows with the id; the ids asked for."""
    asked = search.ask()
    drawn = torch.randn(len(asked), 2, generator=draw)
    search.tell(
        [
            trial(c, [[c.id % 9 + noise * float(z)] for z in row])
            for c, row in zip(asked, drawn, strict=True)
        ]
    )
    return [candidate.id for candidate in asked]


@pytest.mark.parametrize(("noise", "steps"), [(0.01, 1), (100.0, 3)])
def test_a_generation_is_tried_again_while_it_is_noise(noise: float, steps: int) -> None:
    """The reliability of pure noise exceeds 0.9 by luck in far less than one case in a thousand."""
    settings = NoiseSettings(reliability=0.9, max_steps=3)
    search, _ = made(noise=settings)
    draw = torch.Generator().manual_seed(0)
    tried = [noisy(search, draw, noise) for _ in range(2 * steps)]
    assert tried == [list(range(9))] * steps + [list(range(9, 18))] * steps
    assert search.metrics["generation"] == 2


def test_all_steps_of_a_generation_count() -> None:
    """Two steps contradict each other, the third decides: as if all had been one."""
    search, _ = made(noise=NoiseSettings(reliability=0.99, max_steps=3))
    whole, _ = made()
    signs = torch.tensor([1.0, -1.0, 0.5])
    table: dict[int, list[list[float]]] = {}
    for sign in signs.tolist():
        asked = search.ask()
        for c in asked:
            table.setdefault(c.id, []).extend([[sign * c.id], [sign * c.id + 3.0 * (c.id % 2)]])
        search.tell([trial(c, table[c.id][-2:]) for c in asked])
    whole.tell([trial(c, table[c.id]) for c in whole.ask()])
    pairs = zip(search.ask(), whole.ask(), strict=True)
    assert all(torch.equal(flat_parameters(a.prompt), flat_parameters(b.prompt)) for a, b in pairs)


def met(candidate: Candidate, rewards: list[float], first: int) -> Trial:
    """A trial on queries numbered from `first`."""
    asked = queries(1)[0]
    groups = tuple(
        Group(type(asked)(messages=asked.messages, index=first + i), (completion(1),))
        for i in range(len(rewards))
    )
    return Trial(candidate, groups, torch.tensor(rewards)[:, None])


def test_with_evidence_only_what_is_shown_to_be_better_is_believed() -> None:
    """A reward that a challenger's numbers raise by much; the incumbent stays until it is shown."""
    search, start = made(evidence=EvidenceSettings(alpha=0.05, min_effect=0.2), dim=3)
    reward = quality(start)
    believed = [search.incumbent.id]
    for step in range(60):
        asked = search.ask()
        assert asked[0].id == believed[-1]
        assert len(asked) == search.num_next == (9 if step == 0 else 10)
        search.tell([met(c, [reward(c)] * 4, 4 * step) for c in asked])
        believed.append(search.incumbent.id)
    assert believed[1:6] == [0] * 5 and len(set(believed)) >= 3
    values = [reward(c) for c in (search.incumbent, Candidate(0, start))]
    assert values[0] > values[1]


def test_noise_is_never_evidence() -> None:
    """Runs of pure noise at alpha 0.2: at most that share of them ever believes in another."""
    wrong = 0
    draw = torch.Generator().manual_seed(0)
    for seed in range(20):
        prompt = make("soft", tiny_policy())
        settings = ESSettings(dim=3, population=4, evidence=EvidenceSettings(alpha=0.2))
        search = make_searcher(settings, SearchStart(prompt, seed, scale=0.1))
        for step in range(40):
            noise = torch.randn(6, 4, generator=draw).tolist()
            told = zip(search.ask(), noise, strict=False)
            search.tell([met(c, row, 4 * step) for c, row in told])
        wrong += search.incumbent.id != 0
    assert wrong <= 20 * 0.2


def test_where_all_queries_were_met_evidence_ends_the_search() -> None:
    search, _ = made(evidence=EvidenceSettings())
    for step in range(3):
        assert not search.is_over
        search.tell([met(c, [0.0, 1.0], 2 * min(step, 1)) for c in search.ask()])
    assert search.is_over


def test_a_spread_that_does_not_hold_is_an_error() -> None:
    search, _ = made(evidence=EvidenceSettings(spread=1.0))
    search.tell([met(c, [0.0, float(c.id)], 0) for c in search.ask()])
    with pytest.raises(InputError, match=r"evidence\.spread does not hold"):
        search.tell([met(c, [0.0, float(c.id)], 2) for c in search.ask()])


def test_more_dimensions_than_numbers_are_refused() -> None:
    with pytest.raises(InputError, match=r"search\.dim is 1000, but the prompt has only 448"):
        made(dim=1000)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_directions_may_come_from_the_vocabulary(kind: str) -> None:
    """Every change of a token lies in the span of the leading principal directions."""
    policy = tiny_policy()
    prompt = make(kind, policy)
    settings = ESSettings(dim=4, components=3)
    start = SearchStart(prompt, 3, NativeEngine(policy), scale=0.1)
    if kind == "prefix":
        with pytest.raises(InputError, match="components is about embeddings, which a prefix"):
            make_searcher(settings, start)
        return
    moved = torch.stack([flat_parameters(c.prompt) for c in make_searcher(settings, start).ask()])
    changes = (moved[1:] - moved[0]).view(-1, policy.hidden_size)
    table = policy.embed(list(range(policy.vocab_size))).detach().double()
    leading = torch.linalg.svd(table - table.mean(0)).Vh[:3]
    assert torch.allclose(changes @ leading.T @ leading, changes, atol=1e-6)
    for dim, components in ((4, 1000), (30, 1)):
        with pytest.raises(InputError, match=r"search\.components is \d+; choose 64 or less"):
            make_searcher(ESSettings(dim=dim, components=components), start)
    with pytest.raises(InputError, match="this search has no base"):
        make_searcher(settings, SearchStart(prompt, 3))


def test_a_state_of_another_search_is_refused() -> None:
    state = made()[0].state()
    for other, sentence in (
        (made("cmaes")[0], "another strategy"),
        (made(population=6)[0], "another size"),
        (made(evidence=EvidenceSettings())[0], "another rule"),
    ):
        with pytest.raises(ValueError, match=sentence):
            other.restore(state)


@pytest.mark.parametrize("searcher", SETTINGS)
@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_a_run_searches_from_a_recipe(tmp_path: Path, searcher: str, kind: str) -> None:
    """The unit is the base's; the artifact holds a prompt of the start's kind."""
    search = {"type": searcher, "dim": 4, "population": 4, "texts": None, "completions": None}
    prompt = {"type": kind, "init_text": "Be nice.", "text": None}
    run = tiny_search(tmp_path, search, prompt)
    summary = run.run()
    assert summary["steps"] == 4 and len(summary["candidates"]) == 20
    assert {row["kind"] for row in summary["candidates"]} == {kind}
    metrics = search_step(run).parts.searcher.metrics
    assert metrics["generation"] == 4


def tiny_search(folder: Path, search: dict[str, Any], prompt: dict[str, Any]) -> Any:
    """A run that searches from another kind of prompt than a text."""
    tree: dict[str, Any] = dict(search_run(folder, folder / "texts").parts.recipe)
    tree["search"] = {k: v for k, v in search.items() if v is not None}
    tree["prompt"] = {k: v for k, v in prompt.items() if v is not None}
    tree["training"] = {"steps": 4, "queries_per_step": 2}
    for name in ("algorithm", "reference"):
        tree.pop(name, None)
    return build_single_run(Recipe(**tree), folder, folder / "run")
