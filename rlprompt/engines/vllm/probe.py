"""What is asked of vLLM servers before a run: what they serve, and whether it is the recipe's base.

A few tokens are drawn on each server, and their log-probabilities there are compared with those of
the training forward here. Nothing a server says of itself is trusted beyond its names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlprompt.endpoints.json_client import Call, JsonClient, StatusError
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.vllm.requests import Drawn
from rlprompt.errors import InputError, choices
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.types import Completion, Query

logger = logging.getLogger(__name__)

PROBE = Query(({"role": "user", "content": "What is the capital of France, and why?"},))
"""What is asked."""
DRAWS = SamplingSettings(temperature=1.0, max_tokens=16)
"""How tokens are drawn that are compared: log-probabilities before and after temperature are one.
"""
COUNT = 4
"""Completions of it."""
HOT = SamplingSettings(temperature=2.0, max_tokens=8)
"""A draw that tells log-probabilities before the temperature from those after it."""
_PAUSE = 2.0
_CLOSE = 0.5
"""Nats by which log-probabilities of hot draws may differ on average."""


@dataclass(frozen=True)
class Served:
    """What all servers serve."""

    model: str
    """The base's name."""
    max_positions: int | None
    """Most positions of a conversation with its completion; None = they do not say."""


def served_base(client: JsonClient, model: str | None, wait: float) -> Served:
    """What the servers serve, as soon as they answer.

    Args:
        client: client of the servers.
        model: name of the base there; None = the only one.
        wait: seconds to wait for servers that do not answer yet.

    Raises:
        InputError: one does not answer, or does not serve the base.
    """
    found = [_served_by(client, server, model, wait) for server in range(len(client.shown))]
    names = {each.model for each in found}
    if len(names) > 1:
        raise InputError(
            f"engine.urls lead to servers of {', '.join(sorted(names))}; start them with one "
            "--served-model-name and the same base"
        )
    lengths = [each.max_positions for each in found if each.max_positions is not None]
    return Served(found[0].model, min(lengths, default=None))


def _served_by(client: JsonClient, server: int, model: str | None, wait: float) -> Served:
    shown = client.shown[server]
    answer = _models(client, server, wait)
    cards = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(each, Mapping) for each in cards):
        raise InputError(
            f"engine: {shown} gives no list of models; check engine.urls, which mostly end in /v1"
        )
    bases = {str(card.get("id")): card for card in cards if not card.get("parent")}
    if model is None and len(bases) != 1:
        raise InputError(
            f"engine: {shown} serves {', '.join(sorted(bases)) or 'no base'}; name the "
            "recipe's as engine.model"
        )
    name = next(iter(bases)) if model is None else model
    if name not in bases:
        raise InputError(
            f"engine.model is '{name}', and {shown} serves no such base; {choices(name, bases)}"
        )
    most = bases[name].get("max_model_len")
    return Served(name, most if isinstance(most, int) else None)


def _models(client: JsonClient, server: int, wait: float) -> Any:
    """The answer of a server that may have to load its base first."""
    end = time.monotonic() + wait
    told = False
    while True:
        try:
            return client.ask([Call("/models", server=server)], retries=0)[0]
        except StatusError as error:
            raise InputError(
                f"engine: {error}; check engine.urls, which mostly end in /v1"
            ) from error
        except InputError as error:
            if time.monotonic() + _PAUSE > end or "api_key" in str(error):
                raise
            if not told:
                logger.info("waiting up to %.0f s for %s: %s", wait, client.shown[server], error)
            told = True
        time.sleep(_PAUSE)


@torch.no_grad()
def own_logprobs(
    policy: Policy, prompt: Prompt, drawn: Sequence[Drawn], temperature: float
) -> torch.Tensor:
    """Log-probabilities of the probe's completions here, all their tokens behind each other.

    Args:
        policy: policy over the base.
        prompt: prompt that they were drawn under.
        drawn: the completions.
        temperature: what their distribution is tempered with.
    """
    completions = [Completion(each.token_ids, each.logprobs, "", True) for each in drawn]
    with policy.whole_ends():
        prefix = policy.prefix(prompt)
        tree = policy.tree([PROBE], [completions], prefix, prompt)
        scores = policy.logprobs(tree, prefix, temperature)
    return scores.logprobs[scores.mask].double().cpu()


def require_same(
    policy: Policy, prompt: Prompt, drawn: Sequence[Drawn], shown: str, largest: float
) -> None:
    """Refuse a server whose log-probabilities are not those of the base here.

    Args:
        policy: policy over the base.
        prompt: prompt that the probe was drawn under.
        drawn: what the server drew, by `DRAWS`.
        shown: the server's address.
        largest: the largest mean difference, in nats.

    Raises:
        InputError: they differ by more.
    """
    there = torch.tensor([value for each in drawn for value in each.logprobs]).double()
    gap = (own_logprobs(policy, prompt, drawn, DRAWS.temperature) - there).abs()
    mean, most = float(gap.mean()), float(gap.max())
    if not mean <= largest:
        under = "without a prompt" if prompt.kind == "none" else f"under a {prompt.kind} prompt"
        raise InputError(
            f"engine: the tokens that {shown} draws {under} have other log-probabilities there "
            f"than by {policy.base.id} here ({mean:.3g} nats apart on average, {most:.3g} at most, "
            f"and engine.largest_gap is {largest:g}); serve the recipe's base, with the same "
            "weights and a like precision"
        )
    logger.info(
        "%s: log-probabilities of %d tokens of a %s prompt are %.2g nats from those here on "
        "average, %.2g at most",
        shown,
        len(gap),
        prompt.kind,
        mean,
        most,
    )


def is_tempered(policy: Policy, prompt: Prompt, drawn: Sequence[Drawn], shown: str) -> bool:
    """Whether a server's log-probabilities are those after the temperature.

    Args:
        policy: policy over the base.
        prompt: prompt that the probe was drawn under.
        drawn: what the server drew, by `HOT`.
        shown: the server's address.

    Raises:
        InputError: they are neither those after nor those before it.
    """
    there = torch.tensor([value for each in drawn for value in each.logprobs]).double()
    gaps = {
        tempered: float((own_logprobs(policy, prompt, drawn, heat) - there).abs().mean())
        for tempered, heat in ((True, HOT.temperature), (False, 1.0))
    }
    if min(gaps.values()) > _CLOSE:
        raise InputError(
            f"engine: {shown} gives something else than log-probabilities; start it with "
            "--logprobs-mode processed_logprobs"
        )
    return gaps[True] <= gaps[False]
