"""Changes to the rewards of completions before advantages are made of them.

Letters: B completions.
"""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths: Tensor, max_tokens: int, margin: int) -> Tensor:
    """DAPO's soft overlong punishment, [B] in [-1, 0] (Yu et al., 2025, arXiv 2503.14476, eq. 13).

    0 up to max_tokens - margin tokens, then falling linearly to -1 at max_tokens.

    Args:
        lengths: [B], tokens.
        max_tokens: the sampling limit.
        margin: tokens over which the punishment grows, in [1, max_tokens].
    """
    return -((lengths - (max_tokens - margin)) / margin).clamp(0.0, 1.0)


def missing_eos_penalty(terminated: Tensor, penalty: float) -> Tensor:
    """-penalty for completions that the token limit cut, 0 for others, [B].

    Args:
        terminated: bool [B].
        penalty: the size of the penalty, >= 0, in units of the reward.
    """
    return -penalty * (~terminated).float()
