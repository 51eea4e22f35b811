"""How many parameters a prompt trains on a base that is not here."""

from __future__ import annotations

from rlprompt.planning.tables import Linears, Shape
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.base import PromptSettings
from rlprompt.prompts.layer_adapters import LoRASettings
from rlprompt.prompts.prefix import PrefixSettings
from rlprompt.prompts.sequence import SequenceSettings

_CHARACTERS_PER_TOKEN = 4
"""Of a text in English, where no tokenizer is at hand."""
_UNKNOWN_TOKENS = 32
"""Of a prompt that comes from an artifact."""


def prompt_tokens(prompt: PromptSettings) -> int:
    """Positions that a prompt takes, m; a guess where only a tokenizer knows.

    Args:
        prompt: its settings.
    """
    if isinstance(prompt, SequenceSettings):
        return sum(prompt_tokens(part) for part in prompt.parts) or _UNKNOWN_TOKENS
    text = getattr(prompt, "init_text", None) or getattr(prompt, "text", None)
    guess = _UNKNOWN_TOKENS if text is None else -(-len(text) // _CHARACTERS_PER_TOKEN)
    return int(getattr(prompt, "num_virtual_tokens", None) or guess)


def trained_parameters(prompt: PromptSettings, shape: Shape) -> int:
    """Parameters that a prompt trains.

    A class of the user's own counts as a soft prompt: an embedding per position.

    Args:
        prompt: its settings.
        shape: shape of the base.
    """
    tokens = prompt_tokens(prompt)
    if isinstance(prompt, SequenceSettings):
        if not prompt.parts:
            return tokens * shape.width
        place = len(prompt.parts) - 1 if prompt.train is None else prompt.train
        return trained_parameters(prompt.parts[place], shape)
    if isinstance(prompt, PrefixSettings):
        kept = shape.kv_heads * shape.head_dim
        each = tokens * kept if prompt.rank is None else prompt.rank * (tokens + kept)
        return 2 * shape.layers * each
    if isinstance(prompt, AdapterSettings):
        return sum(
            _of_adapter(prompt, name, linear)
            for name, linear in adapted_linears(prompt, shape).items()
        )
    return tokens * shape.width


def adapted_linears(prompt: AdapterSettings, shape: Shape) -> dict[str, Linears]:
    """The linear layers that an adapter is on, by name.

    Args:
        prompt: its settings.
        shape: shape of the base.
    """
    targets = prompt.method.target_modules
    lasts = None if targets is None else {target.rpartition(".")[2] for target in targets}
    return {name: each for name, each in shape.linears.items() if lasts is None or name in lasts}


def _of_adapter(prompt: AdapterSettings, name: str, linear: Linears) -> int:
    if isinstance(prompt.method, LoRASettings):
        return linear.number * prompt.method.rank * (linear.inputs + linear.outputs)
    scales_input = any(
        target.rpartition(".")[2] == name for target in prompt.method.feedforward_modules
    )
    return linear.number * (linear.inputs if scales_input else linear.outputs)
