"""Gradients by one-hot tokens against finite differences; shared forwards against plain ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.surrogate import Evidence, Forwards, shared_start
from tests.fixtures.runs import queries, tiny_policy

TEXT = "the rain and the sun"
TEMPERATURE = 0.7


def evidence(policy: Policy, count: int = 3, copies: int = 2) -> Evidence:
    """Completions drawn under a text, with weights drawn at random."""
    engine = NativeEngine(policy)
    engine.sync(TextPrompt(TEXT))
    sampling = SamplingSettings(max_tokens=6, temperature=TEMPERATURE)
    groups = engine.generate(queries(count), copies, sampling, 3).groups
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(count * copies, generator=draw, dtype=torch.float64)
    means = [
        sum(c.sampling_logprobs) / len(c.sampling_logprobs) for g in groups for c in g.completions
    ]
    return Evidence(groups, weights, torch.tensor(means, dtype=torch.float64))


def plain_logprobs(policy: Policy, prompt: SoftPrompt | TextPrompt, known: Evidence) -> Tensor:
    """[B] of a policy's own forward, completion by completion."""
    prefix = policy.prefix(prompt)
    means = []
    for group in known.groups:
        for completion in group.completions:
            tree = policy.tree([group.query], [[completion]], prefix, prompt)
            means.append(policy.logprobs(tree, prefix, TEMPERATURE).logprobs.mean())
    return torch.stack(means).double()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_is_that_of_finite_differences(family: str) -> None:
    """Along the line from the token that stands there to another, in float64."""
    policy = tiny_policy(family, torch.float64)
    known, ids = evidence(policy), policy.slot_ids(TEXT)
    forwards = Forwards(policy, TEMPERATURE)
    found = forwards.gradient(ids, known, lambda places, _: known.weights[places])
    assert found.one_hot.dtype == torch.float64
    for place, token in ((0, 40), (1, 77), (len(ids) - 1, 290)):
        # Norms compute in float32 whatever the base has: wide steps, extrapolated to none.
        wide, narrow = (slope(policy, known, place, token, step) for step in (1e-2, 5e-3))
        wanted = (4.0 * narrow - wide) / 3.0
        got = float(found.one_hot[place, token] - found.one_hot[place, ids[place]])
        assert got == pytest.approx(wanted, rel=2e-3, abs=1e-4)


def slope(policy: Policy, known: Evidence, place: int, token: int, step: float) -> float:
    """Central difference of the weighted mean of log-probabilities, on the way to another token."""
    ids = policy.slot_ids(TEXT)
    way = policy.embed([token])[0] - policy.embed([ids[place]])[0]
    values = []
    for sign in (1.0, -1.0):
        moved = policy.embed(ids).clone()
        moved[place] += sign * step * way
        with torch.no_grad():
            logprobs = plain_logprobs(policy, SoftPrompt(moved), known)
        values.append(float((known.weights * logprobs).mean()))
    return (values[0] - values[1]) / (2.0 * step)


def test_in_bfloat16_the_gradient_points_where_that_of_float32_does() -> None:
    found = []
    known = evidence(tiny_policy())
    for dtype in (torch.float32, torch.bfloat16):
        policy = tiny_policy(dtype=dtype)
        forwards = Forwards(policy, TEMPERATURE)
        ids = policy.slot_ids(TEXT)
        found.append(forwards.gradient(ids, known, lambda places, _: known.weights[places]))
    exact, rounded = (each.one_hot.flatten() for each in found)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.97
    assert torch.allclose(found[0].logprobs, found[1].logprobs, atol=0.15)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("short", [64, 0])
def test_texts_that_share_a_start_are_scored_as_each_alone(
    family: str, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Substitutions at every place, a longer and shorter ones; in one forward, or one per text."""
    monkeypatch.setattr("rlprompt.search.surrogate._SHORT", short)
    policy = tiny_policy(family)
    known, ids = evidence(policy), policy.slot_ids(TEXT)
    texts = [[*ids[:place], 90, *ids[place + 1 :]] for place in range(len(ids))]
    texts += [ids, [*ids, 91], ids[:-1], ids[1:], [92, *ids]]
    forwards = Forwards(policy, TEMPERATURE)
    found = forwards.logprobs(texts, known, ids)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            alone = plain_logprobs(policy, SoftPrompt(policy.embed(text)), known)
        assert torch.allclose(row, alone, atol=1e-4)
    assert forwards.forwards == len(texts) * 6 and forwards.backwards == 0


def test_the_gradients_own_logprobs_and_weights_are_those_of_the_text() -> None:
    policy = tiny_policy()
    known, ids = evidence(policy), policy.slot_ids(TEXT)
    seen: list[int] = []

    def weigh(places: Tensor, logprobs: Tensor) -> Tensor:
        seen.extend(places.tolist())
        return 2.0 * logprobs

    forwards = Forwards(policy, TEMPERATURE)
    found = forwards.gradient(ids, known, weigh)
    with torch.no_grad():
        alone = plain_logprobs(policy, TextPrompt(TEXT), known)
    assert torch.allclose(found.logprobs, alone, atol=1e-5)
    # Drawn under this very text: the engine's own numbers.
    assert torch.allclose(found.logprobs, known.sampling_logprobs, atol=1e-4)
    assert torch.equal(found.weights, 2.0 * found.logprobs)
    assert sorted(seen) == list(range(6))
    assert (forwards.forwards, forwards.backwards) == (6, 6)
    assert policy.base.model.get_input_embeddings().weight.grad is None


def test_fluency_is_the_mean_logprob_of_the_text_behind_the_head() -> None:
    policy = tiny_policy()
    ids = policy.slot_ids(TEXT)
    rows = [ids, [*ids[:2], 90, *ids[3:]], ids[:1]]
    forwards = Forwards(policy, TEMPERATURE)
    found = forwards.fluency(rows)
    head = list(policy.head_ids)
    for value, row in zip(found.tolist(), rows, strict=True):
        each = next_logprobs_slowly(policy, [*head, *row])
        wanted = sum(float(each[len(head) + i - 1, t]) for i, t in enumerate(row)) / len(row)
        assert value == pytest.approx(wanted, abs=1e-4)


def next_logprobs_slowly(policy: Policy, tokens: Sequence[int]) -> Tensor:
    """[n, V] after each token, from one forward per place."""
    rows = []
    for count in range(1, len(tokens) + 1):
        scores = Forwards(policy, 1.0)
        rows.append(scores.next_logprobs([*tokens[len(policy.head_ids) : count], 0])[-1])
    return torch.stack(rows)


def test_what_the_base_would_write_next_is_a_distribution_that_knows_what_stands_before() -> None:
    policy = tiny_policy()
    ids = policy.slot_ids(TEXT)
    found = Forwards(policy, 1.0).next_logprobs(ids)
    assert found.shape == (len(ids), policy.vocab_size)
    assert bool((found.exp().sum(1) <= 1.0 + 1e-5).all()) and bool((found.exp().sum(1) > 0.5).all())
    other = Forwards(policy, 1.0).next_logprobs([*ids[:2], 90, *ids[3:]])
    assert torch.allclose(found[:3], other[:3], atol=1e-5)
    assert not torch.allclose(found[3], other[3], atol=1e-2)


def test_a_text_for_which_there_is_no_room_is_refused_in_words() -> None:
    policy = tiny_policy()
    known, ids = evidence(policy), policy.slot_ids(TEXT)
    with pytest.raises(InputError, match=r"a text of 600 tokens .* lower search\.grow"):
        Forwards(policy, 1.0).logprobs([[40] * 600], known, ids)


def test_some_of_the_evidence_keeps_its_order_and_its_queries() -> None:
    known = evidence(tiny_policy())
    part = known.only([1, 4, 5], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert [group.query.index for group in part.groups] == [0, 2]
    assert part.groups[0].completions == known.groups[0].completions[1:]
    assert part.groups[1].completions == known.groups[2].completions
    assert torch.equal(part.sampling_logprobs, known.sampling_logprobs[[1, 4, 5]])


def test_what_two_rows_begin_with() -> None:
    assert [shared_start([1, 2, 3], other) for other in ([1, 2, 3], [1, 9], [9], [], [1, 2])] == [
        3,
        1,
        0,
        0,
        2,
    ]
