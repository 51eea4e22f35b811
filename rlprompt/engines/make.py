"""Every engine: the settings that a recipe may hold, and what makes the engine of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from rlprompt.engines.base import Engine, EngineSettings
from rlprompt.engines.endpoint import EndpointEngine
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.vllm.engine import VllmEngine
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.settings import OneOf

ENGINES: Mapping[str, type[Engine]] = {
    "native": NativeEngine,
    "endpoint": EndpointEngine,
    "vllm": VllmEngine,
}
"""The built-in engines: what `engine.type` says -> the class."""

DEFAULT = "native"
"""The engine of a recipe that names none."""

AnyEngineSettings = Annotated[
    EngineSettings,
    OneOf({name: each.Settings for name, each in ENGINES.items()}, default=DEFAULT),
]


def make_engine(policy: Policy, settings: EngineSettings | None = None) -> Engine:
    """The engine that a recipe describes.

    Args:
        policy: the policy over the base that completions are drawn from.
        settings: settings of any engine; None = the default engine with its own.

    Raises:
        InputError: see `Engine.make`.
    """
    settings = settings or ENGINES[DEFAULT].Settings(type=DEFAULT)
    kind: type[Engine] = settings.user_class or ENGINES[settings.type]
    return kind.make(settings, policy)


def require_support(engine: Engine, prompts: Iterable[Prompt]) -> None:
    """Refuse prompts that an engine cannot apply.

    Args:
        engine: the engine of a run.
        prompts: the prompts that it will be asked to draw under.

    Raises:
        InputError: the engine does not support one, or see `Engine.rehearse`.
    """
    for prompt in prompts:
        if not engine.supports(prompt):
            raise InputError(
                f"engine.type is {engine.settings.type}, which {engine.objection(prompt)}; choose "
                "another engine, or another prompt"
            )
        engine.rehearse(prompt)
