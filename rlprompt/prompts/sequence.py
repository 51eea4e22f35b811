"""Prompts in sequence: several fill the slot one after the other, one of them is trained.

A safety prompt that is finished, then a persona that is learned under it: the frozen parts keep
their bits, and every part sees those before it. No separator stands between parts, so two texts in
sequence are their tokens joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlprompt.errors import InputError
from rlprompt.prompts.base import (
    Conditioner,
    Loader,
    PromptSettings,
    SavedPrompt,
    SlotPrompt,
    check_state,
    load_nothing,
    whole_number,
)
from rlprompt.prompts.single import PARTS
from rlprompt.settings import OneOf
from rlprompt.types import PrefixKV

MOST_PARTS = 16
"""Prompts that a sequence may join."""

PartSettings = Annotated[
    PromptSettings, OneOf({name: each.Settings for name, each in PARTS.items()})
]


class SequenceSettings(PromptSettings):
    """Prompts one after the other in the system slot, one of them trained."""

    type: Literal["sequence"] = "sequence"
    """Representation."""
    parts: tuple[PartSettings, ...] = Field(default=(), max_length=MOST_PARTS)
    """The prompts in order, without anything between them, each written as a `prompt` of type soft,
    prefix or text; a frozen one usually comes from an artifact or is a text."""
    train: int | None = Field(default=None, ge=0)
    """Which part is trained, counted from 0; null = the last one, or the artifact's."""
    from_artifact: str | None = None
    """Artifact of a sequence to continue from in place of `parts`, relative to the recipe's
    folder."""

    @model_validator(mode="after")
    def _parts_fit(self) -> SequenceSettings:
        if self.from_artifact is not None:
            if self.parts:
                raise ValueError("from_artifact and parts are both given; keep one")
            return self
        if len(self.parts) < 2:
            raise ValueError("parts must be a list of at least 2; give two, or use the part alone")
        trained = len(self.parts) - 1 if self.train is None else self.train
        if trained >= len(self.parts):
            raise ValueError(f"train is {trained}, the parts are 0 to {len(self.parts) - 1}")
        if not self.parts[trained].trains:
            raise ValueError(
                f"part {trained} is to be trained and is a {self.parts[trained].type}, which has "
                "nothing to train; set its type to soft, or train another"
            )
        for part in self.parts[trained + 1 :]:
            if part.keeps_place:
                raise ValueError(
                    f"part {trained} is trained and a {part.type} follows it, whose keys were made "
                    f"behind the untrained part; put the {part.type} first"
                )
        return self


class SequencePrompt(SlotPrompt):
    """The parts, of which all but one are frozen."""

    kind: ClassVar[str] = "sequence"
    Settings = SequenceSettings

    def __init__(self, parts: Sequence[SlotPrompt], train: int) -> None:
        """Join prompts and freeze all but one.

        Args:
            parts: the parts in their order; their parameters are used, not copied.
            train: the index of the part that is trained.

        Raises:
            InputError: there is no such part, or nothing to train in it.
        """
        if not 0 <= train < len(parts):
            raise InputError(f"prompt.train is {train}, the parts are 0 to {len(parts) - 1}")
        self.parts = list(parts)
        self.train = train
        self.init_text = " | ".join(part.init_text for part in parts)
        if not parts[train].parameters():
            raise InputError(
                f"prompt.train is {train}, which is a {parts[train].kind} and has nothing to "
                "train; train another part"
            )
        for place, part in enumerate(parts):
            for parameter in part.parameters():
                parameter.requires_grad_(place == train)

    @classmethod
    def create(
        cls,
        settings: SequenceSettings,
        conditioner: Conditioner,
        seed: int,
        load: Loader = load_nothing,
        before: PrefixKV | None = None,
    ) -> Self:
        """The parts, each made behind those before it, or an artifact's; see `Prompt.create`.

        Raises:
            InputError: a part cannot be made, or the artifact holds no sequence.
        """
        if settings.from_artifact is not None:
            warm = load(settings.from_artifact)
            if not isinstance(warm, SequencePrompt):
                raise InputError(
                    f"prompt.from_artifact holds a {warm.kind} prompt, not a sequence; name it as "
                    "one of prompt.parts"
                )
            return cls(warm.parts, warm.train if settings.train is None else settings.train)
        behind = conditioner.head_prefix() if before is None else before
        parts: list[SlotPrompt] = []
        for each in settings.parts:
            kind: type[SlotPrompt] = each.user_class or PARTS[each.type]
            part = kind.create(each, conditioner, seed, load, behind)
            with torch.no_grad():
                behind = part.extend(conditioner, behind)
            parts.append(part)
        return cls(parts, len(parts) - 1 if settings.train is None else settings.train)

    @classmethod
    def restore(cls, saved: SavedPrompt) -> Self:
        """The prompt of an artifact."""
        parts: list[SlotPrompt] = []
        if len(saved.details["parts"]) > MOST_PARTS:
            raise ValueError(f"it has more than {MOST_PARTS} parts")
        for place, described in enumerate(saved.details["parts"]):
            kind = saved.kinds[described["kind"]]
            if not issubclass(kind, SlotPrompt):
                raise ValueError(
                    f"part {place} is a {kind.kind}, which cannot be part of a sequence"
                )
            if not isinstance(described["init_text"], str):
                raise TypeError(f"the init_text of part {place} is no text")
            tensors = _of_part(saved.tensors, place)
            part = replace(
                saved,
                init_text=described["init_text"],
                tensors=tensors,
                details=described["details"],
            )
            parts.append(kind.restore(part))
        return cls(parts, whole_number(saved.details, "train"))

    @property
    def trained(self) -> SlotPrompt:
        """The part that is trained."""
        return self.parts[self.train]

    def extend(self, conditioner: Conditioner, before: PrefixKV) -> PrefixKV:
        """Every part after the ones before it."""
        for part in self.parts:
            before = part.extend(conditioner, before)
        return before

    def parameters(self) -> list[nn.Parameter]:
        """Those of the trained part."""
        return self.trained.parameters()

    def gated_parameters(self) -> list[nn.Parameter]:
        """Those of the trained part."""
        return self.trained.gated_parameters()

    def scale(self, conditioner: Conditioner) -> float:
        """That of the trained part."""
        return self.trained.scale(conditioner)

    def constrain(self) -> None:
        """Keep the trained part in its trust region."""
        self.trained.constrain()

    def metrics(self) -> dict[str, float]:
        """Those of the trained part."""
        return self.trained.metrics()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of every part, under `0/name`, `1/name`."""
        return {
            f"{place}/{name}": tensor
            for place, part in enumerate(self.parts)
            for name, tensor in part.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the tensors of every part; see the base class."""
        check_state(state, self.state_dict())
        for place, part in enumerate(self.parts):
            part.load_state_dict(_of_part(state, place))

    def check(self, conditioner: Conditioner) -> None:
        """Every part must fit the base."""
        for part in self.parts:
            part.check(conditioner)

    def artifact_tensors(self) -> dict[str, Tensor]:
        """Those of every part, under `0/name`, `1/name`."""
        return {
            f"{place}/{name}": tensor
            for place, part in enumerate(self.parts)
            for name, tensor in part.artifact_tensors().items()
        }

    def artifact_details(self) -> dict[str, Any]:
        """What every part is, and which one was trained."""
        described = [
            {"kind": p.kind, "init_text": p.init_text, "details": p.artifact_details()}
            for p in self.parts
        ]
        return {"parts": described, "train": self.train}


def _of_part(tensors: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    start = f"{place}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
