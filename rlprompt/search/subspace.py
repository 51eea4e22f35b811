"""A few directions in the space of a prompt's parameters, in which a strategy searches.

A soft prompt of ten tokens over SmolLM2 has 5,760 parameters, a prefix a hundred thousand. An
evolution strategy needs a number of trials that grows with the dimension, so it searches a subspace
(as random embeddings do: Wang et al., "Bayesian optimization in a billion dimensions via random
embeddings", JAIR 2016, arXiv 1301.1942; for prompts: Sun et al., "Black-box tuning for
language-model-as-a-service", 2022, arXiv 2201.03514).

A point x stands for the parameters `start + unit * sqrt(D / d) * x @ directions`. The factor makes
a coordinate's standard deviation that of an entry: x drawn with deviation s in every coordinate
moves the prompt's entries by s units in root mean square, whatever d and D are. The unit is
`Prompt.scale`, so one deviation serves all kinds of prompt.

Letters: d dimension of the subspace, D parameters of the prompt, m tokens, w width of an embedding,
V vocabulary, K principal directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlprompt.prompts.base import Prompt


def orthonormal(rows: Tensor) -> Tensor:
    """The rows, each without what lies in those before it, of length 1: [d, D] -> [d, D].

    The result is unique (the first entry of each row along itself is positive), so it is the same
    subspace and the same coordinates on every machine up to rounding.

    Raises:
        ValueError: a row lies in the span of those before it, or is nothing.
    """
    basis, upper = torch.linalg.qr(rows.double().T)
    along = upper.diagonal()
    largest = rows.double().norm(dim=1)
    if len(rows) > rows.shape[1] or bool((along.abs() <= 1e-9 * largest).any()):
        raise ValueError("the directions are not independent")
    signed: Tensor = (basis * along.sign()).T.contiguous()
    return signed


def random_directions(dim: int, num_parameters: int, seed: int) -> Tensor:
    """Orthonormal directions, uniform among all of them: float64 [d, D].

    Args:
        dim: number of directions, at most as many as parameters.
        num_parameters: length of each, D.
        seed: seed of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dim, num_parameters, generator=generator, dtype=torch.float64)
    return orthonormal(drawn)


def embedding_directions(
    dim: int, num_tokens: int, embeddings: Tensor, components: int, seed: int
) -> Tensor:
    """Orthonormal directions that move each token as vocabulary embeddings differ.

    Each token's part is drawn from the covariance of the vocabulary, cut to its leading principal
    directions: large where tokens differ much, nothing where no token goes.

    Args:
        dim: number of directions.
        num_tokens: number of embeddings of the prompt, m.
        embeddings: [V, w] embeddings of the vocabulary.
        components: number of principal directions that are kept, K, at most w.
        seed: seed of the draw.

    Returns:
        float64 [d, m * w].
    """
    table = embeddings.double()
    centred = table - table.mean(dim=0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(table))  # ascending
    leading = axes[:, -components:]  # [w, K]
    leading = leading * leading.sum(dim=0).sign()  # eigenvectors are unique up to their sign
    spread = leading * variances[-components:].clamp_min(0.0).sqrt()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dim, num_tokens, components, generator=generator, dtype=torch.float64)
    return orthonormal((drawn @ spread.T).flatten(1))


def flat_parameters(prompt: Prompt) -> Tensor:
    """All parameters of a prompt as one vector: float64 [D], a copy on the CPU."""
    return torch.cat([p.detach().cpu().double().flatten() for p in prompt.parameters()])


class Subspace:
    """The prompts that the points of a subspace stand for."""

    def __init__(self, start: Prompt, directions: Tensor, unit: float) -> None:
        """Search around a prompt.

        Args:
            start: prompt at the point 0, which is copied.
            directions: orthonormal directions [d, D].
            unit: size of a parameter's entry that means something to the base, `Prompt.scale`.
        """
        self._start = start.copy()
        self._origin = flat_parameters(start)
        self._directions = directions
        self._step = unit * math.sqrt(directions.shape[1] / directions.shape[0])

    @property
    def dim(self) -> int:
        """The number of directions, d."""
        return int(self._directions.shape[0])

    @torch.no_grad()
    def prompt_at(self, point: Tensor) -> Prompt:
        """A prompt of its own for a point [d], within the trust region; the start for 0."""
        prompt = self._start.copy()
        if not bool(point.any()):
            return prompt
        moved = self._origin + self._step * (point.double() @ self._directions)
        place = 0
        for parameter in prompt.parameters():
            part = moved[place : place + parameter.numel()]
            parameter.copy_(part.view_as(parameter))
            place += parameter.numel()
        prompt.constrain()
        return prompt
