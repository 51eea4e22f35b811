"""What a prompt does inside the base: who attends to it, and how far it moves the states.

Letters: L layers, H heads, T tokens of a query and its answer, P prefix positions, d model width,
Q queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlprompt.model.forward.attention import CausalContext, LayerCall
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.types import Group, PrefixKV, Query

States = NDArray[np.float64]
"""[Q, L, d] the last token before the answer, behind every layer."""


class Attention(NamedTuple):
    """Where the tokens of answers look, as shares of their attention."""

    to_slot: NDArray[np.float64]
    """[L, H] to the prompt's positions."""
    to_head: NDArray[np.float64]
    """[L, H] to the template's tokens before them, where attention rests that is not needed."""
    by_position: NDArray[np.float64]
    """[m] to each of the prompt's positions, mean over layers and heads."""


class AttentionProbe:
    """A causal context that notes how the last tokens divide their attention."""

    products = None

    def __init__(self, prefix: PrefixKV, num_last: int) -> None:
        """Start with nothing noted.

        Args:
            prefix: keys and values that the tokens stand behind.
            num_last: number of last tokens that are looked at.
        """
        self._inner = CausalContext(prefix)
        self._prefix = prefix
        self._last = num_last
        self.shares: list[Tensor] = []
        """Of each layer [H, P], mean over the tokens that are looked at."""

    def attend(self, call: LayerCall) -> Tensor:
        """What the layer asks for; its weights are computed beside it, in float32."""
        key = torch.cat([self._prefix.keys[call.layer].float(), call.key[0].float()], dim=1)
        query = call.query[0].float()[:, -self._last :]  # [H, last, D]
        key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
        scores = query @ key.transpose(1, 2) * call.scaling
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        total = key.shape[1]
        mine = torch.arange(total - self._last, total)[:, None]
        theirs = torch.arange(total)[None]
        hidden = theirs > mine
        if call.window is not None:
            hidden = hidden | (mine - theirs >= call.window)
        weights = scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(dim=-1)
        self.shares.append(weights.mean(dim=1)[:, : self._prefix.num_tokens].cpu())
        return self._inner.attend(call)


@torch.no_grad()
def attention(policy: Policy, prompt: Prompt, groups: Sequence[Group]) -> Attention:
    """Attention of answers to the prompt, mean over tokens and queries.

    Args:
        policy: the policy over the base.
        prompt: the prompt.
        groups: queries with answers under it; the first answer of each is looked at.
    """
    prefix, head = policy.prefix(prompt), len(policy.head_ids)
    shares = []
    for group in groups:
        answer = list(group.completions[0].token_ids)
        ids = [*policy.query_ids(group.query, prompt), *answer[:-1]]
        probe = AttentionProbe(prefix, len(answer))
        positions = torch.arange(prefix.num_tokens, prefix.num_tokens + len(ids))
        with policy.forward.adapted(prefix.adapter):
            policy.forward.hidden(policy.embed(ids), positions, probe)
        shares.append(torch.stack(probe.shares))
    mean = torch.stack(shares).double().mean(dim=0).numpy()  # [L, H, P]
    slot = mean[:, :, head:]
    return Attention(slot.sum(2), mean[:, :, :head].sum(2), slot.mean((0, 1)))


def layers_of(policy: Policy) -> nn.ModuleList | None:
    """The base's decoder layers; None where its family keeps them under another name.

    Args:
        policy: the policy over the base.
    """
    layers = getattr(policy.forward.body, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else None


@contextlib.contextmanager
def _noted(layers: nn.ModuleList, rows: list[Tensor]) -> Iterator[None]:
    """A block in which every layer's output of the last token is kept."""

    def note(module: nn.Module, given: Any, out: Any) -> None:
        del module, given
        states = out[0] if isinstance(out, tuple) else out
        rows.append(states.reshape(-1, states.shape[-1])[-1].detach().double().cpu())

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def states(policy: Policy, prompt: Prompt, queries: Sequence[Query]) -> States | None:
    """States of the last token before the answer, behind every layer; None without layers.

    Args:
        policy: the policy over the base.
        prompt: the prompt.
        queries: the queries.
    """
    layers = layers_of(policy)
    if layers is None:
        return None
    prefix = policy.prefix(prompt)
    rows = []
    for query in queries:
        ids = policy.fitting_query_ids(query, prefix, prompt)
        positions = torch.arange(prefix.num_tokens, prefix.num_tokens + len(ids))
        kept: list[Tensor] = []
        with _noted(layers, kept), policy.forward.adapted(prefix.adapter):
            policy.forward.hidden(policy.embed(ids), positions, CausalContext(prefix))
        rows.append(torch.stack(kept))
    found: States = torch.stack(rows).numpy()
    return found


def effect_sizes(moved: States, base: States) -> NDArray[np.float64]:
    """[L] how far apart two sets of states lie, in standard deviations (Cohen's d).

    Along the direction of the mean difference, which is found on the other queries for each query,
    so that chance alone gives values around 0 in however many dimensions.

    Args:
        moved: states under the prompt.
        base: states of the same queries without it.
    """
    difference = moved - base  # [Q, L, d]
    count = len(difference)
    others = (difference.sum(0, keepdims=True) - difference) / (count - 1)
    direction = others / np.maximum(np.linalg.norm(others, axis=2, keepdims=True), 1e-12)
    one, other = (moved * direction).sum(2), (base * direction).sum(2)  # [Q, L]
    spread = np.sqrt((one.var(0, ddof=1) + other.var(0, ddof=1)) / 2)
    sizes: NDArray[np.float64] = (one - other).mean(0) / np.maximum(spread, 1e-12)
    return sizes


def same_direction(one: States, other: States, base: States) -> NDArray[np.float64]:
    """[L] cosine of the mean shifts of two prompts away from no prompt.

    Args:
        one: states under one prompt.
        other: states of the same queries under the other.
        base: states of the same queries without a prompt.
    """
    a, b = (one - base).mean(0), (other - base).mean(0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines: NDArray[np.float64] = (a * b).sum(1) / np.maximum(norms, 1e-12)
    return cosines


def relative_shift(moved: States, base: States) -> NDArray[np.float64]:
    """[L] length of the mean shift over the mean length of the states without the prompt.

    Args:
        moved: states under the prompt.
        base: states of the same queries without it.
    """
    shift = np.linalg.norm((moved - base).mean(0), axis=1)
    shares: NDArray[np.float64] = shift / np.linalg.norm(base, axis=2).mean(0)
    return shares
