"""What is exported: a prompt on its base, and what it is made of.

Letters: m virtual tokens, d model width, P prefix tokens, H_kv key/value heads, D head dim.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.embedded import is_embedded, slot_embeddings
from rlprompt.types import PrefixKV


@dataclass(frozen=True)
class Source:
    """A prompt that is to be exported."""

    policy: Policy
    """A policy over its base."""
    prompt: Prompt
    """The prompt."""
    name: str
    """What it is called."""
    prompt_hash: str
    """See `rlprompt.artifacts.identity.prompt_hash`."""

    @property
    def is_embedded(self) -> bool:
        """Whether the prompt is input embeddings, and nothing else."""
        return is_embedded(self.prompt)

    def embeddings(self) -> Tensor:
        """The slot's input embeddings [m, d], in the base's dtype.

        Raises:
            ValueError: the prompt is more than that.
        """
        with torch.no_grad():
            return slot_embeddings(self.prompt, self.policy)

    def head_embeddings(self) -> Tensor:
        """The input embeddings [h, d] of what stands before the slot."""
        with torch.no_grad():
            return self.policy.embed(list(self.policy.head_ids))

    def prefix(self) -> PrefixKV:
        """Keys and values [H_kv, P, D] of head and slot, by layer."""
        with torch.no_grad():
            return self.policy.prefix(self.prompt)

    def base_path(self) -> tuple[str, str | None]:
        """What `from_pretrained` takes for the base, and its revision on the hub.

        Of a model that was made in memory it is its id, which nothing loads.
        """
        base = self.policy.base
        name, _, revision = base.id.partition("@")
        own = str(base.tokenizer.name_or_path or "")
        if Path(base.id).is_dir():
            return base.id, None
        if "/" in name and not Path(name).is_absolute():
            return name, revision or None
        return (own if Path(own).is_dir() else base.id), None

    def tokenizer(self, template: str) -> PreTrainedTokenizerBase:
        """A copy of the base's tokenizer with another chat template.

        Args:
            template: Jinja source.
        """
        made: PreTrainedTokenizerBase = copy.deepcopy(self.policy.base.tokenizer)
        made.chat_template = template
        return made


def require_one_shape(prefix: PrefixKV) -> None:
    """Refuse keys of different shapes in different layers.

    Args:
        prefix: keys and values by layer.

    Raises:
        InputError: they have.
    """
    if len({tensor.shape for tensor in (*prefix.keys, *prefix.values)}) > 1:
        raise InputError(
            "the layers of this base have keys of different shapes, for which PEFT's prefix tuning "
            "has no file; use --to kv"
        )
