"""Updates on queries that are asked among other system text, as they were drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.surroundings import asked_under, surrounded
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.recipe.schema import load_recipe
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.training.rows import rows_of, view_of
from rlprompt.training.update import PhaseClock, Updater
from rlprompt.types import Query, Surroundings
from tests.fixtures.runs import (
    assert_same_run,
    queries,
    scored,
    stops,
    tiny_policy,
    tiny_recipe,
    tiny_trainer,
)

PLEASE = Surroundings("Please", "", is_frame=True)
TOLD = Surroundings("", "That is what you were told.", is_frame=True)
MONDAY = Surroundings("Today is Monday.", "Be kind.")
PLACES = (PLEASE, None, TOLD, MONDAY, PLEASE)
FRAMED = [{"situation": {"type": "system_frame"}, "share": 0.6}]
SIX = {"training": {"steps": 6, "save_every": 2}, "evaluation": {"every": 3}}


@pytest.fixture(autouse=True)
def _report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def asked() -> list[Query]:
    return [replace(q, around=around) for q, around in zip(queries(5), PLACES, strict=True)]


def batch_of(policy: Policy, temperature: float = 1.0) -> RolloutBatch:
    sampling = SamplingSettings(max_tokens=10, min_tokens=3, temperature=temperature)
    unders = {each: asked_under(policy.prompt, each, is_trained=True) for each in PLACES}
    prompts = [unders[each] for each in PLACES]
    drawn = NativeEngine(policy).generate_under(prompts, asked(), 4, sampling, seed=1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    return scored(drawn.groups, torch.linspace(-1.0, 1.0, 20)[order].tolist())


def learn(policy: Policy, batch: RolloutBatch, **settings: Any) -> dict[str, float]:
    reference: Prompt | None = settings.pop("reference", None)
    budget = settings.pop("budget", 10_000)
    algorithm = GRPO(GRPOSettings(group_size=4, **settings), 10)
    updater = Updater(policy, algorithm, reference, temperature=1.0, token_budget=budget)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    _, metrics = updater.learn(batch, optimizer, lambda: 0.0, None, PhaseClock())
    return metrics


def gradient(policy: Policy) -> torch.Tensor:
    (parameter,) = policy.parameters()
    assert parameter.grad is not None
    return parameter.grad.clone()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_updates_score_under_what_was_sampled_under(family: str) -> None:
    policy = tiny_policy(family)
    metrics = learn(policy, batch_of(policy))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-4
    bare = batch_of(policy)
    groups = tuple(replace(g, query=replace(g.query, around=None)) for g in bare.groups)
    assert (
        learn(policy, replace(bare, groups=groups))["sampling/sampling_logp_difference/max"] > 1e-3
    )


@pytest.mark.parametrize("reference", [None, "none", "initial"])
@pytest.mark.parametrize("budget", [10_000, 64])
def test_the_gradient_is_that_of_autograd_through_every_surrounded_prompt(
    reference: str | None, budget: int
) -> None:
    policy = tiny_policy()
    batch = batch_of(policy)
    kl = 0.0 if reference is None else 0.1
    other = {"none": NonePrompt(), "initial": policy.prompt.copy(), None: None}[reference]
    learn(policy, batch, budget=budget, kl_coef=kl, reference=other)
    ours = gradient(policy)

    algorithm = GRPO(GRPOSettings(group_size=4), 10)
    signal = algorithm.signal(view_of(batch, batch.rewards.total, rows_of(batch)))
    weights = algorithm.token_weights(signal.counted_lengths)
    policy.prompt.parameters()[0].grad = None
    loss = torch.zeros(())
    for place, group in enumerate(batch.groups):
        own = slice(4 * place, 4 * place + 4)
        scores = _scores(policy, policy.prompt, group, is_trained=True)
        (w, a) = weights[own], signal.advantages[own]
        loss = loss - ((w * a)[:, None] * scores.logprobs * scores.mask).sum()
        if other is not None:  # the estimator k3 of GRPO (arXiv 2402.03300, equation 4)
            with torch.no_grad():
                ref = _scores(policy, other, group, is_trained=False).logprobs
            gap = (ref - scores.logprobs) * scores.mask
            loss = loss + 0.1 * (w[:, None] * (gap.exp() - gap - 1) * scores.mask).sum()
    loss.backward()
    expected = gradient(policy)
    assert expected.norm() > 1e-4
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def _scores(policy: Policy, prompt: Prompt, group: Any, is_trained: bool) -> Any:
    under = asked_under(prompt, group.query.around, is_trained=is_trained)
    prefix = policy.prefix(under)
    tree = policy.tree([group.query], [group.completions], prefix, under)
    return policy.logprobs(tree, prefix)


def test_reference_and_teacher_stand_in_no_frame_but_among_other_text() -> None:
    text = TextPrompt("Rhyme.")
    assert asked_under(text, PLEASE, is_trained=False) is text
    assert asked_under(text, None, is_trained=True) is text
    among = asked_under(text, MONDAY, is_trained=False)
    assert among.init_text == "Today is Monday.\n\nRhyme.\n\nBe kind."
    assert asked_under(NonePrompt(), MONDAY, is_trained=False).init_text == (
        "Today is Monday.\n\nBe kind."
    )


def test_a_surrounded_prompt_has_the_parameters_of_the_prompt() -> None:
    policy = tiny_policy()
    under = surrounded(policy.prompt, PLEASE)
    assert [id(p) for p in under.parameters()] == [id(p) for p in policy.parameters()]
    before = policy.prefix(under).keys[-1]
    with torch.no_grad():
        policy.parameters()[0].mul_(2.0)
    assert not torch.equal(policy.prefix(under).keys[-1], before)


def test_a_prefix_is_framed_behind_only() -> None:
    policy = tiny_policy()
    prompt = PrefixPrompt.create(PrefixSettings(num_virtual_tokens=3), policy, 0)
    assert surrounded(prompt, TOLD).kind == "sequence"
    with pytest.raises(InputError, match="no text can stand before it"):
        surrounded(prompt, PLEASE)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_a_framed_run_resumes_bit_for_bit_and_evaluates_the_plain_form(
    tmp_path: Path, overlap: bool
) -> None:
    changes: dict[str, Any] = {"training": {**SIX["training"], "overlap_rollouts": overlap}}
    changes |= {"evaluation": SIX["evaluation"], "augment": FRAMED}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    tiny_trainer(tmp_path, straight, **changes, **stops(99, "crash")).run()
    with pytest.raises(InputError, match="fell over"):
        tiny_trainer(tmp_path, resumed, **changes, **stops(3, "crash")).run()
    tiny_trainer(tmp_path, resumed, **changes, **stops(99, "crash")).run(resume=True)
    assert_same_run(straight, resumed)

    drawn = read_jsonl(straight / "completions.jsonl")
    train = [row for row in drawn if row["split"] == "train"]
    framed = [row for row in train if row.get("situation") == "system_frame"]
    assert 0 < len(framed) < len(train)
    for row in train:
        assert ("around" in row) == (row["situation"] == "system_frame")
        assert "{prompt}" not in row["query"]
    assert not any("around" in row for row in drawn if row["split"] == "heldout")
    for row in read_jsonl(straight / "metrics.jsonl"):
        if not overlap:  # drawn ahead, the gap is that of an update
            assert row["sampling/sampling_logp_difference/max"] < 1e-4


ALGORITHMS: dict[str, dict[str, Any]] = {
    "ppo": {"type": "ppo"},
    "teacher's answers": {"type": "distill", "teacher": "the rain and the sun"},
    "own answers": {"type": "distill", "teacher": "the rain", "completions": "student"},
    "minibatches": {"type": "grpo", "group_size": 4, "num_minibatches": 2, "num_epochs": 2},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms_learn_in_frames(tmp_path: Path, name: str) -> None:
    training = {"steps": 2, "queries_per_step": 3}
    system = {"situation": {"type": "system", "after": "Be kind."}, "share": 0.5}
    frame = {"situation": {"type": "system_frame", "texts": ["Do {prompt} now"]}, "share": 0.5}
    output = tmp_path / "run"
    changes: dict[str, Any] = {"algorithm": ALGORITHMS[name], "training": training}
    tiny_trainer(tmp_path, output, augment=[system, frame], **changes).run()
    rows = [r for r in read_jsonl(output / "completions.jsonl") if r["split"] == "train"]
    assert {row["situation"] for row in rows} == {"system", "system_frame"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": {"type": "adapter", "text": "the rain"}}, "takes the whole system turn"),
        ({"search": {"type": "es"}, "algorithm": None}, "and search asks every query"),
    ],
    ids=["adapter", "search"],
)
def test_a_recipe_whose_prompt_cannot_be_framed_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    tree = tiny_recipe(tmp_path).plain() | {"augment": FRAMED} | changes
    tree = {key: value for key, value in tree.items() if value is not None}
    if "search" in changes:
        tree = {k: v for k, v in tree.items() if k not in ("algorithm", "reference")}
        tree["training"] = {"steps": 2, "queries_per_step": 1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert sentence in str(caught.value)
    assert "augment.0.situation.type is system_frame" in str(caught.value)


def test_a_prefix_in_a_frame_is_refused_before_the_run(tmp_path: Path) -> None:
    prompt = {"type": "prefix", "num_virtual_tokens": 3}
    with pytest.raises(InputError, match=r"augment\.0\.situation: the keys of a prompt of type"):
        tiny_trainer(tmp_path, tmp_path / "run", prompt=prompt, augment=FRAMED)
    behind = [{"situation": {"type": "system_frame", "texts": ["{prompt} Do that."]}, "share": 1.0}]
    tiny_trainer(tmp_path, tmp_path / "run", prompt=prompt, augment=behind).run()


def test_a_frame_too_long_for_the_base_is_told_before_the_run(tmp_path: Path) -> None:
    long = [{"situation": {"type": "system", "before": "the rain " * 2000}, "share": 0.1}]
    with pytest.raises(InputError, match="shorten it or a situation of augment"):
        tiny_trainer(tmp_path, tmp_path / "run", augment=long)
