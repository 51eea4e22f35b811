"""A prefix prompt: trainable keys and values of every layer at the slot's positions.

Li and Liang, 2021 (arXiv 2101.00190) put trained keys and values before the whole input, made by a
network that is thrown away later. Here they stand in the system turn, behind the head's own keys
and values (which stay frozen: they hold the attention sink), and start as those of a text.

What trains is the offset from the start in units of the start's own size, so that one learning rate
suits layers whose keys differ by orders of magnitude: `kv = start + scale * offset`. The rotary
embedding of the slot's positions is in the keys, so they act at these positions only.

Letters: m virtual tokens, r rank, L layers, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import (
    Conditioner,
    Loader,
    SavedPrompt,
    SlotPrompt,
    check_state,
    load_nothing,
    whole_number,
)
from rlprompt.prompts.settings import Start, StartSettings, fresh_start
from rlprompt.types import PrefixKV


class PrefixSettings(StartSettings):
    """A prefix prompt: trainable keys and values of every layer in the system slot."""

    type: Literal["prefix"] = "prefix"
    """Representation."""
    rank: int | None = Field(default=None, ge=1, le=4096)
    """Train a product of matrices of this rank, [m, r] and [r, H_kv * D] per layer, in place of
    every key and value; null = every one."""
    max_offset: float | None = Field(default=1.0, gt=0.0)
    """Trust region: after each update, the offset of a token's keys (or values) in a layer is
    scaled back to this root mean square, in units of the start's; null = no limit."""

    @property
    def keeps_place(self) -> bool:
        """True: keys have their positions in them, and were made behind certain tokens."""
        return True


class PrefixPrompt(SlotPrompt):
    """Keys and values [L, 2, H_kv, m, D] (keys at index 0) in float32, or float64 of such a base.

    Full rank trains `offset` [L, 2, H_kv, m, D]. Low rank trains `left` [L, 2, m, r] and `right`
    [L, 2, r, H_kv * D], whose product is the offset; `right` starts at zero.
    """

    kind: ClassVar[str] = "prefix"
    Settings = PrefixSettings

    def __init__(
        self,
        start: Tensor,
        position: int,
        init_text: str = "",
        *,
        rank: int | None = None,
        max_offset: float | None = None,
        seed: int = 0,
    ) -> None:
        """Start from keys and values.

        Args:
            start: [L, 2, H_kv, m, D], copied.
            position: the number of tokens before the slot; the keys' rotary embedding has it.
            init_text: where they come from, for the record.
            rank: the rank of the offset, see the class; None = full.
            max_offset: the limit of `PrefixSettings.max_offset`; None = none.
            seed: the seed of `left`.
        """
        wide = torch.promote_types(start.dtype, torch.float32)
        self.start = start.detach().to(wide, copy=True)
        self.size = self.start.square().mean((3, 4), keepdim=True).sqrt().clamp_min(1e-6)
        """[L, 2, H_kv, 1, 1], the root mean square that offsets are measured in."""
        self.position = position
        self.init_text = init_text
        self._max_offset = max_offset
        self._weights: dict[str, nn.Parameter] = {}
        layers, _, heads, tokens, dim = start.shape
        if rank is None:
            self._weights["offset"] = nn.Parameter(torch.zeros_like(self.start))
            return
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(layers, 2, tokens, rank, generator=generator).to(self.start)
        # Of this size, an update of `right` by one unit moves the offset by about one unit.
        self._weights["left"] = nn.Parameter(drawn / rank**0.5)
        self._weights["right"] = nn.Parameter(self.start.new_zeros(layers, 2, rank, heads * dim))

    @classmethod
    def create(
        cls,
        settings: PrefixSettings,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """A fresh prompt: exactly the text, soft prompt or prefix that it starts from.

        Without any, it starts from the keys and values of m random tokens. See `Prompt.create`.

        Raises:
            InputError: the text has no tokens, or the artifact's prompt has no keys and values of
                its own, or another length or place than is asked for.
        """
        warm = None if settings.from_artifact is None else load(settings.from_artifact)
        before = conditioner.head_prefix() if before is None else before
        text = None if warm is None else warm.init_text
        if isinstance(warm, PrefixPrompt):
            warm.require_position(before)
            start = warm.keys_values().detach()
        elif warm is not None and not isinstance(warm, SlotPrompt):
            raise InputError(
                f"prompt.from_artifact holds an artifact of type {warm.kind}, which is more than "
                "keys and values; start a prefix from a prefix, soft, text or sequence artifact"
            )
        elif warm is not None:
            start = _behind(warm, conditioner, before)
        else:
            asked = settings.num_virtual_tokens
            fresh = fresh_start(settings.init_text, asked, conditioner, seed)
            text, start = fresh.text, _behind(fresh, conditioner, before)
        length = settings.num_virtual_tokens
        if length is not None and start.shape[3] != length:
            raise InputError(
                f"prompt.num_virtual_tokens is {length}, prompt.from_artifact has "
                f"{start.shape[3]} positions and keys cannot be moved to others; leave "
                "num_virtual_tokens out"
            )
        return cls(
            start,
            before.num_tokens,
            text or "",
            rank=settings.rank,
            max_offset=settings.max_offset,
            seed=seed,
        )

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact."""
        tensor = saved.tensors["keys_values"]
        if tensor.dim() != 5:
            raise ValueError(f"keys_values of shape {tuple(tensor.shape)}, which must have 5 axes")
        return cls(tensor, whole_number(saved.details, "position"), saved.init_text)

    @property
    def num_virtual_tokens(self) -> int:
        """m, the number of trained positions."""
        return int(self.start.shape[3])

    def offset(self) -> Tensor:
        """[L, 2, H_kv, m, D], in units of `size`."""
        if "offset" in self._weights:
            return self._weights["offset"]
        layers, _, heads, tokens, dim = self.start.shape
        product = self._weights["left"] @ self._weights["right"]
        return product.view(layers, 2, tokens, heads, dim).transpose(2, 3)

    def keys_values(self) -> Tensor:
        """[L, 2, H_kv, m, D], differentiable."""
        offset = self.offset()
        return self.start.to(offset.device) + self.size.to(offset.device) * offset

    def require_position(self, before: PrefixKV) -> None:
        """Refuse another place.

        Raises:
            InputError: the tokens before the prompt are not as many as when it was made.
        """
        if before.num_tokens != self.position:
            raise InputError(
                f"the keys of this prefix prompt belong to positions from {self.position} on, and "
                f"it stands at {before.num_tokens}; put it where it was made, or use a soft prompt"
            )

    def extend(self, conditioner: Conditioner, before: PrefixKV) -> PrefixKV:
        """The keys and values behind those of a prefix, whose dtype is widened to theirs."""
        del conditioner
        self.require_position(before)
        own = self.keys_values().to(before.keys[0].device)
        pairs = zip(before.keys, before.values, own, strict=True)
        joined = [
            (torch.cat([key.to(own.dtype), k], 1), torch.cat([value.to(own.dtype), v], 1))
            for key, value, (k, v) in pairs
        ]
        return PrefixKV([key for key, _ in joined], [value for _, value in joined])

    def parameters(self) -> list[nn.Parameter]:
        """`offset`, or `left` and `right`."""
        return list(self._weights.values())

    def gated_parameters(self) -> list[nn.Parameter]:
        """`left`, while `right` is zero."""
        return [self._weights["left"]] if "left" in self._weights else []

    def scale(self, conditioner: Conditioner) -> float:
        """0.3 of `size`.

        All layers move at once: with SmolLM2 and a relative rate of 0.05, one AdamW update by the
        whole size moved completions by ten times the KL that it takes for a soft prompt
        (docs/log.md), and KL grows with the square of the rate.
        """
        del conditioner
        return 0.3

    @torch.no_grad()
    def constrain(self) -> None:
        """Scale offsets that have grown past the trust region back to its border."""
        if self._max_offset is None:
            return
        rms = self.offset().square().mean((2, 4)).sqrt()  # [L, 2, m]
        factor = (self._max_offset / rms.clamp_min(1e-12)).clamp_max(1.0)
        if "left" in self._weights:
            self._weights["left"].mul_(factor[..., None])
        else:
            self._weights["offset"].mul_(factor[:, :, None, :, None])

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Root mean square of the offset, and its largest for one token of one layer."""
        squares = self.offset().square().mean((2, 4))
        return {
            "drift_from_init": float(squares.mean().sqrt()),
            "drift_from_init_max": float(squares.max().sqrt()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Start, its size, and what trains: copies on the CPU."""
        own = {"start": self.start, "size": self.size, **self._weights}
        return {name: tensor.detach().cpu().clone() for name, tensor in own.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over tensors; see the base class."""
        check_state(state, self.state_dict())
        self.start, self.size = state["start"].clone(), state["size"].clone()
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(state[name])

    def artifact_tensors(self) -> dict[str, Tensor]:
        """`keys_values`, [L, 2, H_kv, m, D]."""
        return {"keys_values": self.keys_values().detach().cpu().contiguous()}

    def artifact_details(self) -> dict[str, Any]:
        """The position of the slot's first token."""
        return {"position": self.position}

    def check(self, conditioner: Conditioner) -> None:
        """Layers, heads and head dim must be the base's, and the place its slot's."""
        layers, heads, dim = conditioner.kv_shape
        needed = (layers, 2, heads, self.num_virtual_tokens, dim)
        if tuple(self.start.shape) != needed:
            raise ValueError(
                f"keys and values of shape {tuple(self.start.shape)}, the base needs {needed}"
            )
        if not self.num_virtual_tokens:
            raise ValueError("no position")


def _behind(begun: SlotPrompt | Start, conditioner: Conditioner, before: PrefixKV) -> Tensor:
    """Keys and values [L, 2, H_kv, m, D] of a prompt, or of tokens, that stand behind a prefix."""
    with torch.no_grad():
        if isinstance(begun, Start):
            whole = conditioner.prefill(conditioner.embed(begun.token_ids), before)
        else:
            whole = begun.extend(conditioner, before)
        first = before.num_tokens
        pairs = zip(whole.keys, whole.values, strict=True)
        layers = [torch.stack([key[:, first:], value[:, first:]]) for key, value in pairs]
    if len({layer.shape for layer in layers}) > 1:
        raise InputError(
            "the layers of this base have keys of different shapes, which a prefix prompt does not "
            "support; set prompt.type: soft"
        )
    return torch.stack(layers)
