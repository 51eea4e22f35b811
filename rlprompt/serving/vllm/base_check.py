"""Whether a vLLM server computes what our base computes: it is asked, and the numbers compared.

A name proves nothing: a folder may hold other weights, and a server be started again with another
model. So the likeliest next tokens of a few conversations are compared, once told to vLLM as token
ids and once as embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rlprompt.engines.continuous import Ask, ContinuousDecoder, Token
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.vllm.requests import encoded
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.text import NonePrompt
from rlprompt.serving.vllm.client import UpstreamModel, VllmClient, VllmError
from rlprompt.types import Query

logger = logging.getLogger(__name__)

_QUESTION = "What is the sun, and what is the rain?"
_TOKENS, _TOP = 6, 5
_MOST_NATS = 0.3
"""Mean distance of log-probabilities above which it is another model. Kernels in bfloat16 differ by
0.01 to 0.1, another model by more than 1."""
_MARK = "token_id:"


class Probe(NamedTuple):
    """A beginning, and how our base goes on."""

    ids: tuple[int, ...]
    """Tokens of the beginning."""
    likeliest: int
    """Token that is likeliest behind it."""
    logprob: float
    """The natural-log probability of that token."""


class Checked(NamedTuple):
    """What a vLLM server was found to be."""

    model: UpstreamModel
    takes_embeddings: bool
    """Whether it was started with --enable-prompt-embeds."""


def make_probes(policy: Policy) -> list[Probe]:
    """Beginnings of an answer of the base without a prompt.

    Args:
        policy: policy over the base.
    """
    none = NonePrompt()
    query = policy.query_ids(Query(messages=({"role": "user", "content": _QUESTION},)), none)
    ids = [*policy.none_head_ids, *query]
    sampling = SamplingSettings(temperature=0.0, max_tokens=_TOKENS)
    decoder = ContinuousDecoder(policy)
    prefix = none.prefix(policy)
    decoder.join([Ask(prefix, tuple(query), sampling, top_logprobs=1)])
    drawn: list[Token] = []
    while decoder.num_rows:
        drawn += decoder.step()
    return [
        Probe((*ids, *(each.token_id for each in drawn[:place])), *token.top[0])
        for place, token in enumerate(drawn)
    ]


async def check_base(
    client: VllmClient,
    base: str,
    probes: Sequence[Probe],
    embed: Callable[[Sequence[int]], Tensor] | None,
) -> Checked:
    """Compare a server with our base.

    Args:
        client: the server.
        base: id of our base.
        probes: what our base says.
        embed: function from token ids to our base's input embeddings; None = only ids are told.

    Raises:
        InputError: it serves another model, or reads embeddings in another way.
        VllmError: it cannot be asked.
    """
    model = await client.model()
    wanted = f"'{model.root}' at the vLLM server"
    advice = f"start vLLM with the model of --model ({base})"
    try:
        gap = [await _gap(client, model.name, probe, {"prompt": [*probe.ids]}) for probe in probes]
    except VllmError as error:
        if error.answered in (400, 404, 422):
            raise InputError(f"{wanted} takes no token ids of {base}; {advice}") from error
        raise
    distance = sum(gap) / len(gap)
    if distance > _MOST_NATS:
        raise InputError(
            f"{wanted} is not {base}: log-probabilities of the same tokens differ by "
            f"{_shown(distance)}; {advice}"
        )
    logger.info("vLLM serves %s; log-probabilities differ by %.4f", model.root, distance)
    if embed is None:
        return Checked(model, takes_embeddings=False)
    last = probes[-1]
    rows = encoded(embed(last.ids).detach().cpu())
    try:
        apart = await _gap(client, model.name, last, {"prompt_embeds": rows})
    except VllmError as error:
        if error.answered != 400:
            raise
        return Checked(model, takes_embeddings=False)
    if apart > _MOST_NATS:
        raise InputError(
            f"{wanted} reads input embeddings in another way than {base} (log-probabilities differ "
            f"by {_shown(apart)}), so no learned prompt would be what it was; use --engine native"
        )
    return Checked(model, takes_embeddings=True)


async def _gap(client: VllmClient, model: str, probe: Probe, prompt: dict[str, Any]) -> float:
    """Distance of the log-probability of a probe's token; infinite where others are likelier.

    Raises:
        VllmError: it cannot be asked, or is too old.
    """
    told = await client.complete(
        {
            **prompt,
            "model": model,
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "logprobs": _TOP,
            "return_tokens_as_token_ids": True,
            "return_token_ids": True,
        }
    )
    try:
        (choice,) = told["choices"]
        top = choice["logprobs"]["top_logprobs"][0]
        if not choice["token_ids"]:
            raise ValueError("no token ids")
        found = top.get(f"{_MARK}{probe.likeliest}")
        return float("inf") if found is None else abs(float(found) - probe.logprob)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise VllmError(
            502, "the vLLM server tells no token ids; use vLLM 0.21 or newer", answered=200
        ) from error


def _shown(distance: float) -> str:
    return "more than can be compared" if distance == float("inf") else f"{distance:.2f} nats"
