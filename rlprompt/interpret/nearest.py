"""The tokens nearest to a soft prompt, and whether their text does what the prompt does.

A good soft prompt may lie nearest to any text at all, even one that says the opposite (Khashabi et
al., 2022, arXiv 2112.08348, "Prompt Waywardness"). So the text is never shown without what the base
does under it.

Letters: m vectors, d model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.search.projection import project
from rlprompt.search.vocabulary import Vocabulary

WAYWARD_BELOW = 0.5
"""A text that recovers less of the behaviour than this does not explain the prompt."""


class Nearest(NamedTuple):
    """The nearest text, and its tokens."""

    text: str | None
    """None where the nearest tokens make no text that comes back as the same tokens."""
    tokens: tuple[str, ...]
    """[m] the token nearest to each vector."""
    rows: list[dict[str, Any]]
    """Of each vector: token, distance (1 - cosine), norm relative to the median embedding."""
    gap: float
    """Mean distance: 0 for a soft prompt that is a text."""


@torch.no_grad()
def nearest(policy: Policy, prompt: Prompt) -> Nearest | None:
    """The nearest tokens of a prompt's vectors, by cosine.

    Args:
        policy: the policy over its base.
        prompt: the prompt.

    Returns:
        None of a prompt that is no soft prompt: keys, values and adapters have no nearest token.
    """
    if not isinstance(prompt, SoftPrompt):
        return None
    vocabulary = Vocabulary(policy, ascii_only=False)
    norms = prompt.embeddings.detach().norm(dim=1) / policy.embedding_norm()
    try:
        found = project(prompt, policy, vocabulary)
    except InputError:
        return None
    tokens = tuple(policy.decode([token]) for token in found.nearest_ids)
    rows = [
        {"position": place, "token": token, "distance": float(distance), "norm": float(norm)}
        for place, (token, distance, norm) in enumerate(
            zip(tokens, found.distances, norms, strict=True)
        )
    ]
    return Nearest(found.text, tokens, rows, found.gap)


def verdict(kl_share: dict[str, float] | None) -> str:
    """What may be said of the nearest text.

    Args:
        kl_share: the share of the behaviour that it recovers, with its interval; None = unknown.
    """
    if kl_share is None:
        return "unknown"
    if kl_share["high"] < WAYWARD_BELOW:
        return "wayward"
    return "explains" if kl_share["low"] >= WAYWARD_BELOW else "unclear"
