"""Forwards of a frozen base under a prompt: the one door between rlprompt and transformers.

Letters: N packed tokens, P prefix tokens, d model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.kernels.lm_head import head_logits
from rlprompt.model.attention import ATTENTION_NAME, AttentionContext, CausalContext, register
from rlprompt.model.base import FrozenBase
from rlprompt.model.frozen import head_of, pack_linears
from rlprompt.types import PrefixKV

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 24
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest mean difference of log-probabilities between the model's own forward and ours."""


class PrefixForward:
    """A frozen base whose attention goes through contexts.

    Construction switches the model's attention to rlprompt's, packs its linear layers where that
    pays, and compares log-probabilities with the model's own forward; an architecture whose result
    differs is refused.
    """

    def __init__(self, base: FrozenBase) -> None:
        """Take over `base.model`.

        Raises:
            InputError: the architecture cannot be run exactly (see the class docstring).
        """
        self.base = base
        self._body = base.model.base_model
        output = base.model.get_output_embeddings()
        if output is None or getattr(output, "bias", None) is not None:
            raise InputError(
                f"the LM head of {base.id} is missing or has a bias, which rlprompt does not "
                "support; choose another base model"
            )
        fresh = base.model.config._attn_implementation != ATTENTION_NAME
        own = self._own_logits() if fresh else None
        if fresh:
            register()
            base.model.set_attn_implementation(ATTENTION_NAME)
            logger.info("%s: %d linear layers packed", base.id, pack_linears(base.model))
        config = base.model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        self.head = head_of(base.model.get_output_embeddings(), softcap)
        if own is not None:
            self._compare(own)

    def _probe(self) -> Tensor:
        return torch.arange(_PROBE_TOKENS, device=self.base.device) * 7 % self.base.vocab_size

    def _own_logits(self) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.base.model(input_ids=self._probe()[None], use_cache=False).logits
        return logits[0]

    def _compare(self, own: Tensor) -> None:
        probe = self._probe()
        with torch.no_grad():
            hidden = self.hidden(self.embed(probe), torch.arange(_PROBE_TOKENS), CausalContext())
            ours = head_logits(hidden, self.head)
        gap = (own.float().log_softmax(-1) - ours.log_softmax(-1)).abs().mean().item()
        if not gap <= _TOLERANCE[self.base.dtype]:
            raise InputError(
                f"{self.base.id} computes something that rlprompt's forward does not "
                f"(log-probabilities differ by {gap:.3g} on average); choose a base of a supported "
                "family (docs/models.md)"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the base computes in."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Where the base lives."""
        return self.base.device

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed layer by layer in the backward."""
        return bool(self.base.model.is_gradient_checkpointing)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        model = self.base.model
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        # transformers recomputes only in layers that are in training mode. The flag is set on the
        # layer alone: its submodules stay in evaluation mode, so no dropout wakes up.
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = on

    def embed(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Input embeddings [n, d] of tokens, scaled as the architecture scales them."""
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
        out: Tensor = self.base.model.get_input_embeddings()(ids)
        return out

    def hidden(self, embeddings: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Final hidden states of packed tokens.

        Args:
            embeddings: [N, d].
            positions: int64 [N], explicit; never derived from a mask by the model.
            context: what the tokens attend to.

        Returns:
            [N, d], after the final norm, in the base's dtype.
        """
        arguments: dict[str, Any] = {"attention_context": context, "use_cache": False}
        out = self._body(
            inputs_embeds=embeddings.to(self.dtype)[None],
            position_ids=positions.to(self.device)[None],
            **arguments,
        )
        states: Tensor = out.last_hidden_state[0]
        return states

    def prefill(self, embeddings: Tensor) -> PrefixKV:
        """Keys and values of a prompt, with gradients back to its embeddings.

        Args:
            embeddings: [P, d] of head and slot together.
        """
        context = CausalContext()
        self.hidden(embeddings, torch.arange(embeddings.shape[0]), context)
        return PrefixKV([k[0] for k in context.keys], [v[0] for v in context.values])
