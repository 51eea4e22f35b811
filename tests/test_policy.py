"""The policy: its view of base and slot, its scores, and the shared prefix's account."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.forward.prefix_forward import PrefixForward
from rlprompt.policy import Policy, SharedPrefix
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import PrefixKV
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.tiny import IM_END_ID, TOKENIZER_SIZE, tiny_base
from tests.invariants.oracle import (
    QUERIES,
    TEXT,
    completions,
    model_of,
    policy_of,
    query,
    scores,
    soft_prompt,
)


def test_a_policy_shows_the_slot_and_the_base() -> None:
    policy = policy_of("llama")
    assert list(policy.head_ids) == policy.slot.head_ids
    assert policy.vocab_size == TOKENIZER_SIZE  # the embedding's unused rows have no name
    assert policy.stop_ids == {IM_END_ID}
    rows = policy.embed(range(TOKENIZER_SIZE)).norm(dim=1)
    assert policy.embedding_norm() == pytest.approx(rows.median().item())
    rms = policy.embed(range(TOKENIZER_SIZE)).square().mean().sqrt().item()
    assert policy.embedding_rms() == pytest.approx(rms)


def test_the_own_prompt_is_the_default() -> None:
    base = tiny_base("llama")
    policy = Policy(base, ChatSlot.from_tokenizer(base.tokenizer))
    with pytest.raises(ValueError, match="no prompt"):
        policy.prefix()
    policy.prompt = soft_prompt(policy)
    own, other = policy.prefix(), policy.prefix(TextPrompt("rain"))
    assert own.num_tokens != other.num_tokens
    assert policy.parameters() == policy.prompt.parameters()
    assert policy.query_ids(QUERIES[0]) == policy.tail_ids(QUERIES[0].messages)
    none = policy.query_ids(QUERIES[0], NonePrompt())
    assert none == policy.none_tail_ids(QUERIES[0].messages)


def test_entropy_is_that_of_the_tempered_distribution() -> None:
    policy = policy_of("llama", torch.float64)
    group = completions(3, 6)
    prompt = TextPrompt(TEXT)
    got = scores(policy, prompt, QUERIES[:1], [group], temperature=0.5)
    ids = [*policy.head_ids, *policy.slot_ids(TEXT), *policy.tail_ids(QUERIES[0].messages)]
    for row, answer in enumerate(group):
        with torch.no_grad():
            sequence = torch.tensor([[*ids, *answer.token_ids]])
            logits = model_of("llama", torch.float64)(input_ids=sequence).logits[0]
        logprobs = (logits[len(ids) - 1 : -1] / 0.5).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        torch.testing.assert_close(got.entropy[row, : len(entropy)], entropy)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_the_entropy_wants_a_gradient_only_when_asked(entropy_grad: bool) -> None:
    policy = policy_of("llama")
    shared = SharedPrefix(policy.prefix(soft_prompt(policy)))
    tree = policy.tree(QUERIES[:1], [completions(3)], shared.leaves, TextPrompt(TEXT))
    got = policy.logprobs(tree, shared.leaves, entropy_grad=entropy_grad)
    assert got.logprobs.requires_grad
    assert got.entropy.requires_grad == entropy_grad


def test_leaves_are_float32_copies_for_a_bfloat16_base() -> None:
    policy = policy_of("llama", torch.bfloat16)
    made = policy.prefix(soft_prompt(policy))
    shared = SharedPrefix(made)
    for leaf, tensor in zip(shared.leaves.keys, made.keys, strict=True):
        assert leaf.dtype == torch.float32
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert torch.equal(leaf, tensor.float())
        assert leaf.data_ptr() != tensor.data_ptr()


def test_a_float32_prefix_is_copied_too() -> None:
    policy = policy_of("llama")
    made = policy.prefix(soft_prompt(policy))
    shared = SharedPrefix(made)
    assert shared.leaves.keys[0].data_ptr() != made.keys[0].data_ptr()


def test_a_prefix_that_no_micro_batch_used_has_no_gradient() -> None:
    policy = policy_of("llama")
    prompt = soft_prompt(policy)
    SharedPrefix(policy.prefix(prompt)).backward()
    assert prompt.embeddings.grad is None


def test_a_conversation_longer_than_the_base_is_refused_with_its_index() -> None:
    policy = policy_of("llama")
    long = query("rain " * 500)
    prefix = policy.prefix(TextPrompt(TEXT))
    with pytest.raises(InputError, match=r"query 0 needs .* positions .* has 512"):
        policy.tree([long], [completions(1)], prefix, TextPrompt(TEXT))


def test_the_longest_conversation_that_fits_is_taken() -> None:
    policy = policy_of("llama")
    prefix = policy.prefix(TextPrompt(TEXT))
    used = prefix.num_tokens + len(policy.tail_ids(QUERIES[0].messages))
    prompt = TextPrompt(TEXT)
    tree = policy.tree(QUERIES[:1], [completions(512 - used)], prefix, prompt)
    assert int(tree.positions.max()) == 510  # the last token predicts nothing
    with pytest.raises(InputError, match="513 positions"):
        policy.tree(QUERIES[:1], [completions(513 - used)], prefix, prompt)
    policy.tree(QUERIES[:1], [[]], prefix, prompt, room=512 - used)
    with pytest.raises(InputError, match="513 positions"):
        policy.tree(QUERIES[:1], [[]], prefix, prompt, room=513 - used)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_prefixes_of_several_prompts_are_those_of_each(dtype: torch.dtype) -> None:
    policy = policy_of("llama", dtype)
    prompts = [
        *(make(name, policy, noise=0.3, seed=i) for i, name in enumerate(KINDS)),
        NonePrompt(),
        TextPrompt("a"),
    ]
    made = policy.prefixes(prompts)
    assert len(made) == len(prompts)
    for ours, prompt in zip(made, prompts, strict=True):
        theirs = policy.prefix(prompt)
        assert ours.num_tokens == theirs.num_tokens
        assert ours.adapter is theirs.adapter
        pairs = zip([*ours.keys, *ours.values], [*theirs.keys, *theirs.values], strict=True)
        for one, other in pairs:
            assert not one.requires_grad
            assert one.dtype == other.dtype
            near = 1e-9 if dtype == torch.float64 else 0.0 if policy.forward.cpp else 0.1
            torch.testing.assert_close(one, other.detach(), rtol=0.0, atol=near)


def test_prompts_are_prefilled_in_packs_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of("llama", torch.float64)
    texts = [TextPrompt(text) for text in ("a", TEXT, "b", "c", f"{TEXT} {TEXT}", TEXT)]
    lengths = [policy.prefix_length(each) for each in texts]
    packs: list[list[int]] = []
    together = PrefixForward.prefill_each

    def counted(self: PrefixForward, embeddings: Sequence[Tensor]) -> list[PrefixKV]:
        packs.append([len(each) for each in embeddings])
        return together(self, embeddings)

    monkeypatch.setattr(PrefixForward, "prefill_each", counted)
    monkeypatch.setattr("rlprompt.policy.PREFILLED_AT_ONCE", 3 * lengths[0])
    made = policy.prefixes(texts)
    assert [each.num_tokens for each in made] == lengths
    assert packs == [[lengths[0]] * 3]  # the others would each be alone
    assert policy.prefixes([]) == []
