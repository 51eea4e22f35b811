"""The representations that stand alone: where a new one is registered.

`rlprompt.prompts.make.PROMPTS` is these and the sequence, whose parts are those of them that fill
positions of the slot.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt, SlotPrompt
from rlprompt.prompts.prefix import PrefixPrompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt

SINGLE: Mapping[str, type[Prompt]] = {
    "soft": SoftPrompt,
    "prefix": PrefixPrompt,
    "text": TextPrompt,
    "adapter": AdapterPrompt,
}
"""What `prompt.type` says -> the class."""

PARTS: Mapping[str, type[SlotPrompt]] = {
    name: each for name, each in SINGLE.items() if issubclass(each, SlotPrompt)
}
"""Those that can be part of a sequence."""
