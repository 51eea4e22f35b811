"""What vLLM is told of a prompt: token ids, input embeddings, or the name of a LoRA adapter.

A text is tokens of the template. A soft prompt is a row of embeddings in their place, which go with
every request, so that no state of the vLLM server belongs to it. An adapter is loaded by name
(`serving.vllm.adapters`), and a name is never used for two contents.

Letters: P prefix tokens, d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlprompt.engines.continuous import Ask
from rlprompt.engines.vllm.requests import drawing_fields, encoded
from rlprompt.errors import InputError
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Conditioner, EmbeddedPrompt, Prompt
from rlprompt.prompts.embedded import is_embedded, slot_embeddings
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.serving.vllm.adapters import LoadedAdapter
from rlprompt.types import PrefixKV


@dataclass(frozen=True, eq=False)
class VllmPrefix(PrefixKV):
    """A prefix whose keys and values vLLM computes; here is what it computes them of."""

    ids: tuple[int, ...] = ()
    """Tokens of head and slot; empty where there are rows."""
    rows: Tensor | None = None
    """Input embeddings [P, d] of head and slot."""
    lora: LoadedAdapter | None = None
    """The adapter that is on."""

    @property
    def num_tokens(self) -> int:
        """P, the number of positions of head and slot."""
        return len(self.ids) if self.rows is None else len(self.rows)


def make_prefix(prompt: Prompt, conditioner: Conditioner) -> VllmPrefix:
    """What vLLM is told of a prompt, its adapter apart.

    Args:
        prompt: prompt of any kind.
        conditioner: the base and its chat template.

    Raises:
        InputError: vLLM has no place for it.
    """
    head = tuple(conditioner.head_ids)
    if type(prompt) is NonePrompt:
        return VllmPrefix((), (), ids=tuple(conditioner.none_head_ids))
    if type(prompt) in (TextPrompt, AdapterPrompt):
        check_adapter(prompt)
        return VllmPrefix((), (), ids=(*head, *conditioner.slot_ids(prompt.init_text)))
    if not is_embedded(prompt):
        raise InputError(
            f"a {prompt.kind} prompt is neither tokens nor input embeddings nor a LoRA adapter, "
            "and vLLM takes nothing else (no request can bring keys and values); serve it with "
            "--engine native, or see `rlprompt export` for the programs that read it"
        )
    with torch.no_grad():
        if isinstance(prompt, EmbeddedPrompt):
            rows = prompt.input_embeddings(conditioner)
        else:
            rows = torch.cat([conditioner.embed(head), slot_embeddings(prompt, conditioner)])
    rows = rows.detach().cpu().contiguous()
    if not bool(torch.isfinite(rows).all()):
        raise InputError(
            f"the {prompt.kind} prompt holds numbers that are not finite, under which vLLM answers "
            "nothing; train it again, or take an earlier checkpoint"
        )
    return VllmPrefix((), (), rows=rows)


def check_adapter(prompt: Prompt) -> None:
    """Refuse adapters that are none of vLLM's.

    Args:
        prompt: prompt of any kind.

    Raises:
        InputError: its adapter is no LoRA.
    """
    if isinstance(prompt, AdapterPrompt) and prompt.adapter.peft_type != "LORA":
        raise InputError(
            f"vLLM loads LoRA adapters, and this prompt's is {prompt.adapter.peft_type}; serve it "
            "with --engine native, or write a merged checkpoint with `rlprompt export --to merged`"
        )


def completion_body(
    ask: Ask, model: str, stop_ids: Sequence[int], conditioner: Conditioner
) -> dict[str, Any]:
    """The body of `POST /v1/completions` that draws what is asked for.

    Every setting is there: for what is missing vLLM takes defaults from the model's
    generation_config.json. Which tokens end an answer is said here alone.

    Args:
        ask: the request, whose prefix is a `VllmPrefix`.
        model: what vLLM calls the base.
        stop_ids: tokens that end an answer, beside those of its sampling settings.
        conditioner: the base, whose embeddings stand for the conversation's tokens.
    """
    prefix, sampling = ask.prefix, ask.sampling
    assert isinstance(prefix, VllmPrefix)
    body: dict[str, Any] = {
        "model": model if prefix.lora is None else prefix.lora.name,
        "add_special_tokens": False,
        "n": ask.copies,
        **drawing_fields(sampling, {*stop_ids, *sampling.stop_token_ids}),
        "seed": ask.seed,
        "stream": True,
    }
    if ask.top_logprobs is not None:
        body |= {"logprobs": ask.top_logprobs, "return_tokens_as_token_ids": True}
    if prefix.rows is None:
        return {**body, "prompt": [*prefix.ids, *ask.query_ids]}
    with torch.no_grad():
        query = conditioner.embed(ask.query_ids).detach().cpu()
    return {**body, "prompt_embeds": encoded(torch.cat([prefix.rows, query]))}
