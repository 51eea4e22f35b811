"""A soft prompt: trainable embeddings in the system slot.

Lester et al., 2021 (arXiv 2104.08691) put trainable embeddings before the whole input. Here they
stand inside the system turn, between the template's own tokens.

Letters: m virtual tokens, d model width.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import (
    Conditioner,
    EmbeddedPrompt,
    Loader,
    SavedPrompt,
    SlotPrompt,
    check_state,
    load_nothing,
)
from rlprompt.prompts.settings import StartSettings, fresh_start
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import PrefixKV

logger = logging.getLogger(__name__)

DRAWN_TOKENS = 16
"""m of a prompt that starts from random tokens, where nobody says."""


class SoftSettings(StartSettings):
    """A soft prompt: m trainable embeddings in the system slot."""

    type: Literal["soft"] = "soft"
    """Representation."""
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """m, the number of trainable embeddings; null = as many as `init_text` or the artifact has, and
    16 where `init_text` is null. With fewer the text loses its end, with more it is repeated, and a
    soft artifact of another length is resampled along its tokens; each is said in a warning."""
    max_norm_ratio: float | None = Field(default=1.5, gt=0.0)
    """Trust region: after each update a token longer than this multiple of the median vocabulary
    embedding is scaled back to it; null = no limit."""

    @model_validator(mode="before")
    @classmethod
    def _drawn_tokens_have_a_number(cls, values: Any) -> Any:
        is_drawn = isinstance(values, dict) and values.get("init_text", "") is None
        if is_drawn and values.get("from_artifact") is None:
            return {"num_virtual_tokens": DRAWN_TOKENS, **values}
        return values


class SoftPrompt(EmbeddedPrompt, SlotPrompt):
    """Embeddings [m, d] in float32 (float64 of a float64 base)."""

    kind: ClassVar[str] = "soft"
    Settings = SoftSettings

    def __init__(
        self, embeddings: Tensor, init_text: str = "", max_norm: float | None = None
    ) -> None:
        """Start from embeddings [m, d], which are copied.

        Args:
            embeddings: the start.
            init_text: where they come from, for the record.
            max_norm: the norm of the longest token that `constrain` leaves alone. Tokens that start
                longer may stay as long as they are.
        """
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        self.embeddings = nn.Parameter(embeddings.detach().to(wide, copy=True))
        self.init_text = init_text
        self._start = self.embeddings.detach().clone()
        self._max_norm = (
            None if max_norm is None else self._start.norm(dim=1, keepdim=True).clamp_min(max_norm)
        )

    @property
    def num_virtual_tokens(self) -> int:
        """The number of trainable embeddings, m."""
        return int(self.embeddings.shape[0])

    @classmethod
    def create(
        cls,
        settings: SoftSettings,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """A fresh prompt; see `Prompt.create`.

        With `init_text` and m = its token count, the fresh prompt is exactly that text; see
        `fresh_start` for another m. Without a text, m embeddings of random vocabulary tokens are
        drawn by `seed`. From a soft prompt of another length, see `resample`.

        Raises:
            InputError: the text has no tokens, or the artifact's prompt cannot be turned into
                embeddings.
        """
        del before  # embeddings mean the same wherever they stand
        warm = None if settings.from_artifact is None else load(settings.from_artifact)
        ratio = settings.max_norm_ratio
        max_norm = None if ratio is None else ratio * conditioner.embedding_norm()
        length = settings.num_virtual_tokens
        if isinstance(warm, SoftPrompt):
            own = warm.embeddings.detach()
            if length is not None and length != len(own):
                logger.warning(
                    "the artifact to start from has %d embeddings and num_virtual_tokens is %d: "
                    "they are resampled, which is another prompt; leave num_virtual_tokens out to "
                    "start from the artifact's",
                    len(own),
                    length,
                )
            return cls(resample(own, length or len(own)), warm.init_text, max_norm)
        if warm is not None and not isinstance(warm, TextPrompt):
            raise InputError(
                f"prompt.from_artifact holds a {warm.kind} prompt, which cannot be turned back "
                "into embeddings; start a soft prompt from a soft or text artifact, or set "
                f"prompt.type: {warm.kind}"
            )
        text = settings.init_text if warm is None else warm.init_text
        fresh = fresh_start(text, length, conditioner, seed)
        return cls(conditioner.embed(fresh.token_ids), fresh.text, max_norm)

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact."""
        return cls(saved.tensors["embeddings"], saved.init_text)

    def input_embeddings(self, conditioner: Conditioner) -> Tensor:
        """Those of the head, and the prompt's own."""
        head = conditioner.embed(list(conditioner.head_ids))
        return torch.cat([head, self._slot(head)])

    def extend(self, conditioner: Conditioner, before: PrefixKV) -> PrefixKV:
        """The embeddings after a prefix."""
        return conditioner.prefill(self._slot(conditioner.embed([])), before)

    def _slot(self, like: Tensor) -> Tensor:
        return self.embeddings.to(device=like.device, dtype=like.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """The embeddings."""
        return [self.embeddings]

    def scale(self, conditioner: Conditioner) -> float:
        """Root mean square of vocabulary embeddings."""
        return conditioner.embedding_rms()

    @torch.no_grad()
    def constrain(self) -> None:
        """Scale tokens that have grown past the trust region back to its border."""
        if self._max_norm is None:
            return
        norms = self.embeddings.norm(dim=1, keepdim=True)
        limit = self._max_norm.to(norms.device)
        self.embeddings.mul_((limit / norms.clamp_min(1e-12)).clamp_max(1.0))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Mean token norm, and mean distance of tokens from their start relative to its norm."""
        start = self._start.to(self.embeddings.device)
        drift = (self.embeddings - start).norm(dim=1) / start.norm(dim=1).clamp_min(1e-12)
        norm = self.embeddings.norm(dim=1).mean()
        return {"norm": float(norm), "drift_from_init": float(drift.mean())}

    def state_dict(self) -> dict[str, Tensor]:
        """`embeddings`, an [m, d] copy on the CPU."""
        return {"embeddings": self.embeddings.detach().cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over `embeddings`; see the base class."""
        check_state(state, self.state_dict())
        with torch.no_grad():
            self.embeddings.copy_(state["embeddings"])

    def check(self, conditioner: Conditioner) -> None:
        """The embeddings must be as wide as the base's."""
        width = conditioner.hidden_size
        if self.embeddings.dim() != 2 or self.embeddings.shape[1] != width:
            raise ValueError(
                f"embeddings of shape {tuple(self.embeddings.shape)}, the base needs width {width}"
            )
        if not self.num_virtual_tokens:
            raise ValueError("no position")


def resample(embeddings: Tensor, length: int) -> Tensor:
    """Embeddings [n, d] read off at m places spread evenly from the first token to the last.

    Between two tokens the direction is that of their linear mixture and the length the mixture of
    their lengths: a mixture alone would be shorter than both. The own length changes no bit; one
    place lies in the middle.

    Returns:
        [m, d].
    """
    count = embeddings.shape[0]
    if length == count:
        return embeddings.clone()
    last = count - 1
    place = torch.linspace(0, last, length) if length > 1 else torch.tensor([last / 2])
    place = place.to(embeddings)
    low = place.floor().long().clamp_max(last)
    high = (low + 1).clamp_max(last)
    share = (place - low)[:, None]
    mixed = torch.lerp(embeddings[low], embeddings[high], share)
    norms = embeddings.norm(dim=1, keepdim=True)
    wanted = torch.lerp(norms[low], norms[high], share)
    out: Tensor = mixed * (wanted / mixed.norm(dim=1, keepdim=True).clamp_min(1e-12))
    return out
