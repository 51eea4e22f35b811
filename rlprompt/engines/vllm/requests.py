"""What is sent to vLLM for completions, and what is read of its answers: token ids on both ways.

Every sampling setting is written into a request: what is left out, a server takes from the model's
`generation_config.json`. Text is never tokenised there, and stop tokens are ours alone.

Letters: n positions, d model width.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlprompt.engines.sampling import SamplingSettings

_LEAST_TEMPERATURE = 0.01
"""vLLM raises lower ones to this (`_MAX_TEMP` in its module `sampling_params`)."""
_LARGEST_TEMPERATURE = 2.0
"""Its servers refuse higher ones."""


class Drawn(NamedTuple):
    """One completion as a server gives it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Conversation:
    """What stands before a completion: token ids, or input embeddings where the prompt has some."""

    token_ids: tuple[int, ...] | None = None
    embeddings: Tensor | None = None
    """[n, d] in the base's dtype."""

    @property
    def num_tokens(self) -> int:
        """n, its positions."""
        if self.embeddings is not None:
            return int(self.embeddings.shape[0])
        return len(self.token_ids or ())

    def fields(self) -> dict[str, Any]:
        """The keys of a request that hold it."""
        if self.embeddings is None:
            return {"prompt": list(self.token_ids or ())}
        return {"prompt_embeds": encoded(self.embeddings)}


def encoded(embeddings: Tensor) -> str:
    """Input embeddings as vLLM reads them: `torch.save` in base64.

    Args:
        embeddings: embeddings [n, d].
    """
    stored = io.BytesIO()
    torch.save(embeddings.detach().cpu().contiguous().clone(), stored)
    return base64.b64encode(stored.getvalue()).decode()


def drawing_fields(sampling: SamplingSettings, stop_ids: Collection[int]) -> dict[str, Any]:
    """The keys of a request that say how tokens are drawn, every one of them, and given as ids.

    Args:
        sampling: how tokens are drawn.
        stop_ids: every token that ends a completion.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def completion_request(
    model: str,
    conversation: Conversation,
    sampling: SamplingSettings,
    stop_ids: Collection[int],
    count: int,
    draw: str,
) -> dict[str, Any]:
    """The body of a request for completions of one conversation.

    Args:
        model: name of the base on the server, or of an adapter on it.
        conversation: what stands before the completions.
        sampling: how tokens are drawn.
        stop_ids: every token that ends a completion.
        count: number of completions; one where draws are greedy, since all would be the same.
        draw: what tells apart draws; the seed is made of it, and vLLM gives the completions of a
            request this seed and those after it.
    """
    return {
        "model": model,
        **conversation.fields(),
        "n": count,
        "seed": int.from_bytes(hashlib.sha256(draw.encode()).digest()[:4], "big") >> 1,
        **drawing_fields(sampling, stop_ids),
        "logprobs": 0,
        "stream": False,
    }


def read_completions(answer: Any, count: int, max_tokens: int, vocab_size: int) -> list[Drawn]:
    """The completions in an answer.

    Args:
        answer: JSON value that a server gave.
        count: number that was asked for.
        max_tokens: the longest that may come.
        vocab_size: number of tokens that the base has.

    Raises:
        ValueError: it is no such answer; what is wrong, as the end of a sentence.
    """
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != count:
        given = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"it holds {given} completions, and {count} were asked for")
    if not all(isinstance(each, Mapping) for each in choices):
        raise ValueError("one of its completions is no object")
    ordered = sorted(choices, key=lambda each: _index(each, count))
    return [_drawn(each, max_tokens, vocab_size) for each in ordered]


def _index(choice: Mapping[str, Any], count: int) -> int:
    index = choice.get("index")
    if not isinstance(index, int) or not 0 <= index < count:
        raise ValueError("one of its completions has no index")
    return index


def _drawn(choice: Mapping[str, Any], max_tokens: int, vocab_size: int) -> Drawn:
    ids = choice.get("token_ids")
    if not isinstance(ids, list) or not ids:
        raise ValueError("a completion has no token_ids, which vLLM 0.21 and newer give")
    if not all(type(each) is int and 0 <= each < vocab_size for each in ids):
        raise ValueError(f"a completion holds tokens beyond the {vocab_size} of the recipe's base")
    if len(ids) > max_tokens:
        raise ValueError(f"a completion has {len(ids)} tokens, and max_tokens is {max_tokens}")
    scores = choice.get("logprobs")
    found = scores.get("token_logprobs") if isinstance(scores, Mapping) else None
    if not isinstance(found, list) or len(found) != len(ids):
        raise ValueError("a completion has no log-probability for each of its tokens")
    if not all(type(each) in (int, float) and math.isfinite(each) for each in found):
        raise ValueError("a log-probability of a completion is no finite number")
    return Drawn(tuple(ids), tuple(float(each) for each in found))


def truncates(sampling: SamplingSettings) -> bool:
    """Whether some tokens cannot be drawn, so that a server's log-probabilities leave them out.

    Args:
        sampling: how tokens are drawn.
    """
    is_cut = sampling.top_k is not None or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return is_cut or sampling.min_tokens > 0


def sampling_objection(sampling: SamplingSettings) -> str:
    """What vLLM would draw in another way than the native engine, as a sentence; empty = nothing.

    Args:
        sampling: how tokens are to be drawn.
    """
    if 0.0 < sampling.temperature < _LEAST_TEMPERATURE:
        return (
            f"sampling.temperature is {sampling.temperature:g}, and vLLM draws with no less than "
            f"{_LEAST_TEMPERATURE:g}; set 0, or {_LEAST_TEMPERATURE:g} or more"
        )
    if sampling.temperature > _LARGEST_TEMPERATURE:
        return (
            f"sampling.temperature is {sampling.temperature:g}, and vLLM takes no more than "
            f"{_LARGEST_TEMPERATURE:g}; lower it"
        )
    if sampling.min_p > 0.0 and sampling.top_p < 1.0:
        return (
            "sampling.min_p and sampling.top_p are both set, and vLLM applies them in another "
            "order than engine.type: native; keep one"
        )
    return ""
