"""An adapter prompt: LoRA or IA3 on the base, on top of a text system prompt.

Only the adapter's weights train. It is on for every token of the conversation (head, text, query,
completion) and off for base, reference and hand-written prompts.

The artifact holds PEFT's own files in `adapter/`, which `PeftModel.from_pretrained` loads on the
same base; with the text in the system turn, that model is this prompt.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import save
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import (
    Conditioner,
    Loader,
    Prompt,
    PromptSettings,
    SavedPrompt,
    check_state,
    load_nothing,
)
from rlprompt.prompts.layer_adapters import (
    IA3,
    METHODS,
    IA3Settings,
    LayerAdapter,
    LoRA,
    LoRASettings,
)
from rlprompt.prompts.settings import DEFAULT_TEXT
from rlprompt.prompts.text import TextPrompt
from rlprompt.reading import json_text
from rlprompt.reading.tensors import parse_tensors
from rlprompt.types import PrefixKV

_PEFT_NAME = "base_model.model."
"""What PEFT writes before the base's own names."""
_WEIGHTS = "adapter/adapter_model.safetensors"
_CONFIG = "adapter/adapter_config.json"


class AdapterSettings(PromptSettings):
    """A LoRA or IA3 adapter on the base, on top of a text system prompt."""

    type: Literal["adapter"] = "adapter"
    """Representation."""
    text: str | None = DEFAULT_TEXT
    """The system message, which stays as it is; null = that of the artifact."""
    method: Annotated[LoRASettings | IA3Settings, Field(discriminator="type")] = LoRASettings()
    """What is trained; an adapter artifact continues with its own."""
    from_artifact: str | None = None
    """Artifact of an adapter to continue from, or of a text to start from, relative to the recipe's
    folder."""

    @model_validator(mode="before")
    @classmethod
    def _artifact_replaces_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("from_artifact") is not None:
            return {"text": None, **values}
        return values

    @model_validator(mode="after")
    def _text_is_known(self) -> AdapterSettings:
        if self.from_artifact is not None and self.text is not None:
            raise ValueError("from_artifact and text are both given; keep one")
        if self.from_artifact is None and not (self.text or "").strip():
            raise ValueError("text is blank; write a system message")
        return self

    @property
    def adapts_layers(self) -> bool:
        """True."""
        return True


class AdapterPrompt(Prompt):
    """A text in the slot, and an adapter that is on with it."""

    kind: ClassVar[str] = "adapter"
    Settings = AdapterSettings

    def __init__(self, text: str, adapter: LayerAdapter) -> None:
        """Take over an adapter, whose weights become parameters in float32 (float64 stays)."""
        self.init_text = text
        for name, weight in adapter.weights.items():
            wide = torch.promote_types(weight.dtype, torch.float32)
            adapter.weights[name] = nn.Parameter(weight.detach().to(wide, copy=True))
        self.adapter = adapter

    @classmethod
    def create(
        cls,
        settings: AdapterSettings,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """A fresh prompt: exactly its text, or the adapter that it continues; see `Prompt.create`.

        Raises:
            InputError: a target is not there, or the artifact holds neither an adapter nor a text.
        """
        del before  # no part of a sequence
        warm = None if settings.from_artifact is None else load(settings.from_artifact)
        if isinstance(warm, cls):
            if settings.method != LoRASettings():
                raise InputError(
                    "prompt.method has no effect while prompt.from_artifact is an adapter, which "
                    "continues as it is; remove method"
                )
            return warm
        if warm is not None and not isinstance(warm, TextPrompt):
            raise InputError(
                f"prompt.from_artifact holds a {warm.kind} prompt, and an adapter stands on a "
                "text; name an adapter or text artifact"
            )
        text = settings.text if warm is None else warm.init_text
        assert text is not None  # settings refuse neither
        ids = conditioner.slot_ids(text)
        if not ids:
            raise InputError("prompt.text has no tokens; write a system message")
        shapes = conditioner.linear_shapes
        adapter: LayerAdapter
        if isinstance(settings.method, LoRASettings):
            adapter = LoRA.create(settings.method, shapes, seed)
        else:
            adapter = IA3.create(settings.method, shapes, seed)
        wide = torch.promote_types(conditioner.embed(ids[:1]).dtype, torch.float32)
        adapter.weights = {name: weight.to(wide) for name, weight in adapter.weights.items()}
        return cls(text, adapter)

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact."""
        config = dict(json_text.loads(saved.file(_CONFIG)))
        stored = parse_tensors(saved.file(_WEIGHTS))
        weights = {name.removeprefix(_PEFT_NAME): weight for name, weight in stored.items()}
        method = METHODS.get(str(config["peft_type"]))
        if method is None:
            raise ValueError(f"{config['peft_type']} is not one of {', '.join(METHODS)}")
        return cls(saved.init_text, method(weights, config))

    def prefix(self, conditioner: Conditioner) -> PrefixKV:
        """Head and text, prefilled with the adapter on."""
        ids = [*conditioner.head_ids, *conditioner.slot_ids(self.init_text)]
        return conditioner.prefill(conditioner.embed(ids), adapter=self.adapter)

    def parameters(self) -> list[nn.Parameter]:
        """The adapter's weights."""
        return [
            weight for weight in self.adapter.weights.values() if isinstance(weight, nn.Parameter)
        ]

    def gated_parameters(self) -> list[nn.Parameter]:
        """LoRA's A, while its B is zero."""
        gated = self.adapter.gated()
        return [
            p
            for name, p in zip(self.adapter.weights, self.parameters(), strict=True)
            if name in gated
        ]

    def scale(self, conditioner: Conditioner) -> float:
        """See `LayerAdapter.scale`."""
        return self.adapter.scale(conditioner.hidden_size)

    def metrics(self) -> dict[str, float]:
        """Root mean square of what the adapter adds to weights or factors."""
        return {"drift_from_init": self.adapter.change_rms()}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights under PEFT's names, copies on the CPU."""
        return {name: w.detach().cpu().clone() for name, w in self.adapter.weights.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the weights; see the base class."""
        check_state(state, self.state_dict())
        with torch.no_grad():
            for name, weight in self.adapter.weights.items():
                weight.copy_(state[name])

    def check(self, conditioner: Conditioner) -> None:
        """Every layer must be there, with the shapes that the weights need."""
        shapes = conditioner.linear_shapes
        missing = [name for name in self.adapter.layers if name not in shapes]
        if missing:
            raise ValueError(f"weights for {missing[0]}, which the base does not have")
        for name, needed in self.adapter.needed(shapes).items():
            given = tuple(self.adapter.weights[name].shape)
            if given != needed:
                raise ValueError(f"{name} of shape {given}, the base needs {needed}")

    def artifact_tensors(self) -> dict[str, Tensor]:
        """Nothing: the weights are in PEFT's file."""
        return {}

    def artifact_files(self, base: str) -> dict[str, bytes]:
        """Beside the empty tensor file, PEFT's two."""
        weights = {f"{_PEFT_NAME}{k}": v.contiguous() for k, v in self.state_dict().items()}
        config = json.dumps(self.adapter.peft_config(base), indent=2, sort_keys=True)
        return {
            **super().artifact_files(base),
            _CONFIG: (config + "\n").encode(),
            _WEIGHTS: save(weights, {"format": "pt"}),
        }
