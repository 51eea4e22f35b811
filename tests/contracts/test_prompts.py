"""Every representation keeps the contract of a prompt, on three kinds of attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlprompt.algorithms.grpo import GRPO, GRPOSettings
from rlprompt.artifacts.format import load_artifact, read_artifact_info, save_artifact
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import verify_unchanged
from rlprompt.policy import Policy, SharedPrefix
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import PROMPTS
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.rewards import RewardRunner
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.runs.checkpoint import load_checkpoint, save_checkpoint
from rlprompt.runs.state import RunState
from rlprompt.training.settings import TrainingSettings
from rlprompt.training.startup import check_trainable
from rlprompt.training.step import GradientStep, StepParts
from rlprompt.types import Stateful
from tests.fixtures.prompts import KINDS, TEXT, TRAINABLE, make, move, settings_of
from tests.fixtures.runs import queries, sampled_batch, tiny_policy, tiny_recipe
from tests.invariants.oracle import QUERIES, completions, flat, policy_of, scores

FAMILIES = ("llama", "qwen3", "gemma3")
GROUPS = [completions(4, 7, seed=1), completions(3, seed=2), completions(2, 5, seed=3)]
SAMPLING = SamplingSettings(max_tokens=12, temperature=0.9)


def _logprobs(policy: Policy, prompt: Prompt) -> Tensor:
    return flat(scores(policy, prompt, QUERIES, GROUPS))


def _bits(prompt: Prompt) -> dict[str, Tensor]:
    return prompt.state_dict()


def test_every_registered_representation_is_tested() -> None:
    assert {str(settings["type"]) for settings in KINDS.values()} == set(PROMPTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_prompt_is_its_text(kind: str, family: str) -> None:
    policy = policy_of(family)
    expected = _text_of(kind, policy)
    torch.testing.assert_close(_logprobs(policy, make(kind, policy)), expected, rtol=0, atol=1e-5)


def _text_of(kind: str, policy: Policy) -> Tensor:
    """Under the tokens that a fresh prompt starts from: a text's, or the parts' joined."""
    parts = KINDS[kind].get("parts")
    if parts is None:
        return _logprobs(policy, TextPrompt(TEXT))
    ids = [policy.slot_ids(p.get("text") or p["init_text"]) for p in parts]
    ids = [i[: p.get("num_virtual_tokens") or len(i)] for i, p in zip(ids, parts, strict=True)]
    joined = [token for part in ids for token in part]
    return _logprobs(policy, SoftPrompt(policy.embed(joined)))


@pytest.mark.parametrize("kind", TRAINABLE)
def test_it_acts_and_can_be_learned_and_the_check_leaves_no_trace(kind: str) -> None:
    policy = policy_of("qwen3")
    policy.prompt = make(kind, policy)
    before = _bits(policy.prompt)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    check_trainable(policy, optimizer, QUERIES[0])
    after = _bits(policy.prompt)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in policy.parameters())
    moved = _logprobs(policy, move(policy.prompt, policy, 0.5))
    assert not torch.allclose(moved, _logprobs(policy, make(kind, policy)), atol=1e-3)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_only_gated_parameters_may_start_without_a_gradient(kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy)
    gated = {id(p) for p in prompt.gated_parameters()}
    assert gated < {id(p) for p in prompt.parameters()}
    _backward(policy, prompt)
    for parameter in prompt.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all()) == (id(parameter) in gated)


def _backward(policy: Policy, prompt: Prompt) -> None:
    shared = SharedPrefix(policy.prefix(prompt))
    tree = policy.tree(QUERIES, GROUPS, shared.leaves, prompt)
    policy.logprobs(tree, shared.leaves).logprobs.sum().backward()
    shared.backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TRAINABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_is_untouched_by_a_backward(kind: str, family: str, dtype: torch.dtype) -> None:
    policy = policy_of(family, dtype)
    prompt = make(kind, policy, noise=0.2)
    _backward(policy, prompt)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prompt.parameters())
    assert verify_unchanged(policy.base) == policy.base.fingerprint
    assert all(p.grad is None and not p.requires_grad for p in policy.base.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_another_prompt_is_not_touched_by_it(kind: str) -> None:
    """Base and hand-written text are the plain base, also right after and between."""
    policy = policy_of("gemma3")
    text = TextPrompt("the hand")
    expected = _logprobs(policy, text)
    _logprobs(policy, make(kind, policy, noise=0.5))
    _backward(policy, make(kind, policy, noise=0.5))
    assert torch.equal(_logprobs(policy, text), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_logprobs_are_those_of_the_training_forward(kind: str, family: str) -> None:
    policy = policy_of(family)
    prompt = make(kind, policy, noise=0.3)
    engine = NativeEngine(policy)
    assert engine.supports(prompt)
    engine.sync(prompt)
    groups = engine.generate(QUERIES, 3, SAMPLING, seed=5).groups
    got = scores(policy, prompt, QUERIES, [g.completions for g in groups], SAMPLING.temperature)
    sampled = [torch.tensor(c.sampling_logprobs) for g in groups for c in g.completions]
    for ours, row in zip(got.logprobs, sampled, strict=True):
        torch.testing.assert_close(ours[: len(row)], row, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_an_engine_draws_under_the_prompt_it_was_synced_with(kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy, noise=0.3)
    engine = NativeEngine(policy)
    engine.sync(prompt)
    drawn = engine.generate(QUERIES, 2, SAMPLING, seed=5)
    move(prompt, policy, 3.0)
    assert engine.generate(QUERIES, 2, SAMPLING, seed=5) == drawn
    engine.sync(prompt)
    assert engine.generate(QUERIES, 2, SAMPLING, seed=5) != drawn


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    """Beside longer rows, and alone: padded to another width, or not at all."""
    policy = policy_of("gemma3", torch.float64)
    prompt = make(kind, policy, noise=0.3)
    whole = scores(policy, prompt, QUERIES, GROUPS)
    row = 0
    for asked, group in zip(QUERIES, GROUPS, strict=True):
        for one in group:
            alone = scores(policy, prompt, [asked], [[one]])
            beside = whole.logprobs[row][whole.mask[row]]
            torch.testing.assert_close(flat(alone), beside, rtol=0, atol=1e-10)
            row += 1


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_state_is_a_snapshot_that_restores(kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy, noise=0.3)
    state, expected = prompt.state_dict(), _logprobs(policy, prompt)
    move(prompt, policy, 1.0, seed=7)
    fresh = make(kind, policy, seed=3)
    fresh.load_state_dict(state)
    assert torch.equal(_logprobs(policy, fresh), expected)
    assert all(not tensor.requires_grad for tensor in state.values())
    with pytest.raises(ValueError, match=r"expected .*, given nothing"):
        fresh.load_state_dict({})
    wrong = {name: torch.zeros(1) for name in state}
    with pytest.raises(ValueError, match="expected"):
        fresh.load_state_dict(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_stays_behind(kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy, noise=0.3)
    expected = _logprobs(policy, prompt)
    copied = prompt.copy()
    move(prompt, policy, 1.0, seed=7)
    assert torch.equal(_logprobs(policy, copied), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_artifact_is_the_prompt(kind: str, family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    prompt = make(kind, policy, noise=0.3)
    save_artifact(tmp_path, policy, prompt, name="n", recipe={}, metrics={})
    loaded = load_artifact(tmp_path, policy)
    assert type(loaded) is type(prompt) and loaded.init_text == prompt.init_text
    assert torch.equal(_logprobs(policy, loaded), _logprobs(policy, prompt))
    info = read_artifact_info(tmp_path)
    length = policy.prefix_length(prompt) - len(policy.head_ids)
    assert (info.representation, info.num_virtual_tokens) == (prompt.kind, length)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_an_artifact_with_a_value_that_is_not_finite_is_refused(kind: str, tmp_path: Path) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy)
    with torch.no_grad():
        prompt.parameters()[0].fill_(math.nan)
    save_artifact(tmp_path, policy, prompt, name="n", recipe={}, metrics={})
    with pytest.raises(InputError, match="not finite"):
        load_artifact(tmp_path, policy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_prompt_lies_inside_its_trust_region(kind: str) -> None:
    policy = policy_of("llama")
    prompt = make(kind, policy)
    before = _bits(prompt)
    prompt.constrain()
    for name, tensor in _bits(prompt).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=0)
    assert all(math.isfinite(value) for value in prompt.metrics().values())


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_scale_is_a_size(kind: str) -> None:
    policy = policy_of("llama")
    scale = make(kind, policy).scale(policy)
    assert math.isfinite(scale) and scale > 0


class Sampled:
    """A source of completions under the policy's prompt, with random rewards."""

    temperature = 1.0
    epoch = 0.0

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def collect(self, step: int, seed: int) -> RolloutBatch:
        torch.manual_seed(seed)
        return sampled_batch(self.policy, seed=step)

    def prefetch(self, step: int, seed: int) -> AbstractContextManager[dict[str, float]]:
        return nullcontext({})

    @property
    def others(self) -> Mapping[str, Stateful]:
        return {}

    def close(self) -> None:
        """Nothing runs."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each step's draws follow from its number."""


def _run(kind: str, folder: Path, first: int, steps: int) -> tuple[Policy, dict[str, float]]:
    """GRPO steps with a KL to the initial prompt, after the checkpoint of step `first`."""
    policy = tiny_policy("qwen3")
    policy.prompt = make(kind, policy)
    learner = GradientStep(
        StepParts(
            policy=policy,
            algorithm=GRPO(GRPOSettings(group_size=4, kl_coef=0.1), max_tokens=10),
            source=Sampled(policy),
            rewards=RewardRunner([], needs_score=False),
            settings=TrainingSettings(steps=steps, token_budget=64),
            probe=queries(1)[0],
            reference=policy.prompt.copy(),
        )
    )
    state = RunState(learner)
    if first:
        state.restore(load_checkpoint(folder, first), {})
    for step in range(first, steps):
        metrics = learner.step(step, seed=step).metrics
        state.progress.step = step + 1
        save_checkpoint(folder, state.checkpoint({}), keep=9)
    return policy, metrics


@pytest.mark.parametrize("kind", TRAINABLE)
def test_resumed_training_is_uninterrupted_training(kind: str, tmp_path: Path) -> None:
    whole, metrics = _run(kind, tmp_path, 0, 3)
    resumed, again = _run(kind, tmp_path, 2, 3)
    expected, got = _bits(whole.prompt), _bits(resumed.prompt)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert again == metrics
    assert metrics["kl"] > 0
    fresh = _bits(make(kind, whole))
    assert any(not torch.equal(fresh[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_a_recipe_builds_it(kind: str, tmp_path: Path) -> None:
    """What a recipe says of a prompt is what its resolved form says, and a run can start."""
    recipe = tiny_recipe(tmp_path).model_copy(update={"prompt": settings_of(kind)})
    again = Recipe.model_validate(recipe.plain())
    assert again == recipe
    trainer = build_single_run(again, tmp_path, tmp_path / "run")
    assert trainer.parts.policy.prompt.kind == KINDS[kind]["type"]
