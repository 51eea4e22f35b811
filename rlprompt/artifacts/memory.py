"""A prompt of any kind as tensors and plain values: what its artifact holds, without a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from rlprompt.prompts.base import Prompt, SavedPrompt
from rlprompt.prompts.make import PROMPTS

_TENSORS = "prompt.safetensors"
_FILE = "file/"


@dataclass(frozen=True)
class PackedPrompt:
    """What an artifact would hold of a prompt."""

    tensors: Mapping[str, Tensor]
    """Those of `prompt.safetensors`; under `file/NAME` the bytes of another file, uint8."""
    plain: Mapping[str, Any]
    """JSON values: representation, text and details."""

    @classmethod
    def of(cls, prompt: Prompt, base: str) -> Self:
        """A prompt as it is now, which later changes of it leave alone.

        Args:
            prompt: prompt of a representation in `PROMPTS`.
            base: id of the base, for files that name it.
        """
        tensors = {name: tensor.clone() for name, tensor in prompt.artifact_tensors().items()}
        for name, content in prompt.artifact_files(base).items():
            if name != _TENSORS:
                tensors[_FILE + name] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        plain = {
            "representation": prompt.kind,
            "init_text": prompt.init_text,
            "details": prompt.artifact_details(),
        }
        return cls(tensors, plain)

    def unpack(self, own: Iterable[type[Prompt]] = ()) -> Prompt:
        """A prompt of its own with this content.

        Args:
            own: classes of the user's own that it may be of, beside the built-in ones.

        Raises:
            ValueError: there is no such representation.
        """
        kinds = {**PROMPTS, **{each.kind: each for each in own}}
        kind = str(self.plain.get("representation"))
        if kind not in kinds:
            raise ValueError(f"there is no representation {kind}")
        tensors = {n: t.clone() for n, t in self.tensors.items() if not n.startswith(_FILE)}
        text, details = self.plain["init_text"], self.plain["details"]
        return kinds[kind].restore(SavedPrompt(text, tensors, details, self._file, kinds))

    def _file(self, name: str) -> bytes:
        return self.tensors[_FILE + name].numpy().tobytes()
