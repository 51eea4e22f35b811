"""What can be known of a base before its weights are read: its tokens, and how many it takes."""

from __future__ import annotations

from dataclasses import dataclass

from rlprompt.model.base import ModelSettings, longest_sequence
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.files.folder import check_folder, locate
from rlprompt.model.load import read_config, read_tokenizer


@dataclass(frozen=True)
class Outline:
    """A base without weights."""

    id: str
    """As `FrozenBase.id`."""
    slot: ChatSlot
    """Turns conversations into tokens."""
    max_positions: int
    """The longest sequence that it computes exactly."""


def read_outline(settings: ModelSettings) -> Outline:
    """Read configuration and tokenizer of a base; its weights stay on disk.

    Args:
        settings: settings of the base, with a template's text in place of its path.

    Raises:
        InputError: see `rlprompt.model.base.load_base` and `ChatSlot.from_tokenizer`.
    """
    source = locate(settings.path, settings.revision)
    check_folder(source.folder, settings.trust_remote_code)
    config = read_config(source.folder, settings.trust_remote_code)
    tokenizer = read_tokenizer(source.folder, settings.trust_remote_code)
    slot = ChatSlot.from_tokenizer(tokenizer, settings.template)
    return Outline(source.id, slot, longest_sequence(config))
