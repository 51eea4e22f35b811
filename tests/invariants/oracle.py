"""What the invariants compare with: a second copy of the model, run by transformers alone.

The oracle sees one sequence at a time, without padding, prefix, packing or cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.types import Completion, Query
from tests.fixtures.tiny import tiny_base, tiny_model

TEXT = "the rain and the sun"
"""A system text, so that a tiny sequence is longer than the tiny models' sliding window."""


@cache
def policy_of(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    """A tiny policy without a prompt of its own; shared, so leave its settings as they were."""
    base = tiny_base(family, dtype)
    _keep_double(base.model)
    return Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


@cache
def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights as `policy_of` under transformers' own attention.

    In float64 that is SDPA where the family has it: the eager softmax rounds to float32.
    """
    model = tiny_model(family, dtype)
    _keep_double(model)
    has_sdpa = dtype == torch.float64 and family != "gemma2"
    model.set_attn_implementation("sdpa" if has_sdpa else "eager")
    model.requires_grad_(False)
    return model


def _keep_double(model: PreTrainedModel) -> None:
    """Let the norms of a float64 model compute in float64; those of transformers use float32.

    Otherwise gradients are float32 sums in disguise, and no order of summation equals another.
    """
    if model.dtype != torch.float64:
        return
    for name, module in model.named_modules():
        if name.endswith("norm"):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            scale = module.weight + (1.0 if "Gemma" in type(module).__name__ else 0.0)
            module.forward = partial(_rms_norm, scale=scale.detach(), eps=eps)


def _rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale


def query(text: str) -> Query:
    """A query of one user turn."""
    return Query(({"role": "user", "content": text},))


QUERIES = (query("is she in here?"), query("rain"), query("the men went in, and then the hand"))


def completion(token_ids: Sequence[int]) -> Completion:
    """A completion of given tokens; what the forward does not read is left empty."""
    return Completion(tuple(token_ids), (0.0,) * len(token_ids), "", False)


def completions(*lengths: int, seed: int = 0) -> list[Completion]:
    """Random completions of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(3, 300, (n,), generator=generator).tolist() for n in lengths]
    return [completion(tokens) for tokens in draws]


def soft_prompt(policy: Policy, text: str = TEXT, noise: float = 0.0) -> SoftPrompt:
    """A soft prompt from a text, in the precision of the base, moved off the text by `noise`."""
    settings = SoftSettings(num_virtual_tokens=None, init_text=text)
    prompt = SoftPrompt.create(settings, policy, seed=0)
    start = prompt.embeddings.detach().to(torch.promote_types(policy.base.dtype, torch.float32))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.dtype)
    prompt.embeddings = nn.Parameter(start + noise * start.std() * drawn)
    return prompt


def scores(
    policy: Policy,
    prompt: Prompt,
    queries: Sequence[Query],
    groups: Sequence[Sequence[Completion]],
    temperature: float = 1.0,
) -> TokenScores:
    """The policy's own forward of whole groups, without gradient."""
    with torch.no_grad():
        prefix = policy.prefix(prompt)
        tree = policy.tree(queries, groups, prefix, prompt)
        return policy.logprobs(tree, prefix, temperature)


def flat(scored: TokenScores) -> Tensor:
    """The log-probabilities of all completion tokens, rows behind each other."""
    return scored.logprobs[scored.mask]


def own_logprobs(
    model: PreTrainedModel, context: Sequence[int], tokens: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities [T] of `tokens` after `context` in a forward of transformers."""
    ids = torch.tensor([[*context, *tokens]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return _of_tokens(logits, tokens, temperature)


def embedded_logprobs(
    model: PreTrainedModel, embeddings: Tensor, tokens: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities [T] of the last tokens of [N, d] embeddings, differentiable in these."""
    logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
    return _of_tokens(logits, tokens, temperature)


def _of_tokens(logits: Tensor, tokens: Sequence[int], temperature: float) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    predicted = logits[-len(tokens) - 1 : -1].log_softmax(-1)
    return predicted.gather(1, torch.tensor(tokens)[:, None])[:, 0]


def context_ids(policy: Policy, text: str | None, asked: Query) -> list[int]:
    """All tokens before the completion, under a system text or (None) without a system message."""
    if text is None:
        return [*policy.none_head_ids, *policy.none_tail_ids(asked.messages)]
    return [*policy.head_ids, *policy.slot_ids(text), *policy.tail_ids(asked.messages)]
