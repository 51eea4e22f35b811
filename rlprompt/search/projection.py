"""A soft prompt as text: the nearest token to each of its vectors, and how far that is.

Few soft prompts lie near tokens: the distance says how much is lost (Khashabi et al., 2022, arXiv
2112.08348, find that a good soft prompt may lie near any text at all). So the text is a place to
begin a search, and no explanation of the vectors.

Letters: m vectors, V vocabulary, d model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.search.vocabulary import Vocabulary

Metric = Literal["cosine", "l2"]
"""Distance of a vector from an embedding: 1 - cosine, or the Euclidean distance relative to the
vector's length."""
_ROUNDS = 8
"""A text is cut into tokens and put together so often before it is given up."""


@dataclass(frozen=True)
class Projection:
    """The text nearest to a soft prompt."""

    text: str
    token_ids: tuple[int, ...]
    """Its slot tokens; others than the nearest where these are no text that comes back."""
    nearest_ids: tuple[int, ...]
    """The nearest token of each of the m vectors."""
    distances: Tensor
    """[m] distance of each vector from its nearest token; see `Metric`."""

    @property
    def gap(self) -> float:
        """Mean distance: 0 for a soft prompt that is a text."""
        return float(self.distances.mean())

    @property
    def is_exact(self) -> bool:
        """Whether the text has just the nearest tokens."""
        return self.token_ids == self.nearest_ids


class Nearest(NamedTuple):
    """The nearest token of each vector."""

    token_ids: Tensor
    """int64 [m]."""
    distances: Tensor
    """[m]; see `Metric`."""


def nearest_tokens(vectors: Tensor, embeddings: Tensor, allowed: Tensor, metric: Metric) -> Nearest:
    """The nearest allowed token of each vector.

    Args:
        vectors: [m, d].
        embeddings: [V, d].
        allowed: bool [V].
        metric: what is near.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    rows, table = vectors.to(wide), embeddings.to(wide)
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    if metric == "cosine":
        norms = table.norm(dim=1).clamp_min(1e-12)
        distances = 1.0 - (rows @ table.T) / lengths / norms
    else:
        distances = torch.cdist(rows, table, compute_mode="donot_use_mm_for_euclid_dist") / lengths
    best = distances.masked_fill(~allowed, torch.inf).min(dim=1)
    return Nearest(best.indices, best.values.clamp_min(0.0))


@torch.no_grad()
def project(
    prompt: SoftPrompt, policy: Policy, vocabulary: Vocabulary, metric: Metric = "cosine"
) -> Projection:
    """The text nearest to a soft prompt.

    Where the tokenizer would cut the text of the nearest tokens in another way, the text stays and
    its own tokens are taken, until they are the tokens of their text.

    Args:
        prompt: the soft prompt.
        policy: the policy over its base.
        vocabulary: the tokens to choose from.
        metric: what is near.

    Raises:
        InputError: the nearest tokens make no text.
    """
    for among in (vocabulary.named, vocabulary.allowed):
        found = _projected(prompt, policy, vocabulary, among, metric)
        if found is not None:
            return found
    raise InputError(
        "the tokens nearest to the soft prompt make no text that the tokenizer reads as the same "
        "tokens; start the search from a text, or set search.projection to the other metric"
    )


def _projected(
    prompt: SoftPrompt, policy: Policy, vocabulary: Vocabulary, among: Tensor, metric: Metric
) -> Projection | None:
    """The nearest text of some tokens; None where they make none."""
    embeddings = policy.embed(range(policy.vocab_size))
    vectors = prompt.embeddings.detach().to(embeddings.device)
    nearest = nearest_tokens(vectors, embeddings, among.to(embeddings.device), metric)
    token_ids = nearest_ids = [int(token) for token in nearest.token_ids]
    for _ in range(_ROUNDS):
        text = vocabulary.text_of(token_ids)
        if text is not None:
            distances = nearest.distances.cpu()
            return Projection(text, tuple(token_ids), tuple(nearest_ids), distances)
        token_ids = policy.slot_ids(policy.decode(token_ids))
    return None
