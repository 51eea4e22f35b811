"""A learned prompt as a model of Inspect: `inspect eval FILE.py --model=rlprompt/PATH`.

Inspect finds this module by the entry point `inspect_ai` of the package. PATH is the folder of an
artifact or of a run; `-M force=true`, `-M model=NAME` and `-M trust_remote_code=true` are those of
`rlprompt chat`. The artifact's own sampling holds where Inspect says nothing else.

The prompt stands in the system turn. System messages of a task follow behind it, as other text of a
deployment would; tools, and settings that cannot be applied, are refused.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from rlprompt.errors import InputError
from rlprompt.types import Message

_OWN = ("temperature", "top_p", "top_k", "max_tokens", "seed")
_REFUSED = ("stop_seqs", "presence_penalty", "logit_bias", "reasoning_effort")


@modelapi(name="rlprompt")
def rlprompt() -> type[ModelAPI]:
    """The class that Inspect makes a model of."""
    return PromptModel


@dataclass(frozen=True)
class _Asked:
    """A conversation, and the system messages that came with it."""

    system: str
    turns: Sequence[Message]


class PromptModel(ModelAPI):
    """A learned prompt on its base, which is loaded with the first question."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (Inspect's own signature)
        **model_args: Any,
    ) -> None:
        """Keep what was asked for.

        Args:
            model_name: path of an artifact or a run.
            base_url: address, which a model on this machine has none of.
            api_key: key, which it needs none of.
            config: settings of Inspect.
            model_args: `force`, `model` and `trust_remote_code` of `-M`.

        Raises:
            InputError: there is another argument.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        unknown = model_args.keys() - {"force", "model", "trust_remote_code"}
        if base_url is not None:
            raise InputError(f"base_url is {base_url}, and the prompt's base is here; remove it")
        if unknown:
            raise InputError(
                f"there is no model argument '{min(unknown)}'; known are force, model and "
                "trust_remote_code"
            )
        self._arguments = model_args
        self._loaded: Any = None
        self._lock = asyncio.Lock()
        self._met: Counter[str] = Counter()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer one conversation; Inspect's interface.

        A conversation that comes again, as in another epoch, is answered with other draws.

        Raises:
            InputError: something is asked for that cannot be done.
        """
        del tool_choice
        if tools:
            raise InputError(f"the task gives {len(tools)} tools, and {self.model_name} calls none")
        asked = _asked(input)
        sampling = _sampling(config)
        async with self._lock:  # one engine, one draw at a time
            key = json.dumps([asked.system, list(asked.turns)])
            seed = int(config.seed or 0) + self._met[key]
            self._met[key] += 1
            return await asyncio.to_thread(self._answer, asked, sampling, seed)

    def max_connections(self) -> int:
        """One: the engine is on this machine."""
        return 1

    def _answer(self, asked: _Asked, sampling: dict[str, Any], seed: int) -> ModelOutput:
        # Inspect imports this module with every command: what is heavy waits for a question.
        from rlprompt.data.situations import System
        from rlprompt.serving.loaded import LoadedPrompt
        from rlprompt.suites.composition import among

        if self._loaded is None:
            self._loaded = _loaded(self.model_name, **self._arguments)
        loaded: LoadedPrompt = self._loaded
        if asked.system.strip():
            prompt = among(loaded.prompt, System(after=asked.system))
            loaded = LoadedPrompt(loaded.policy, prompt, loaded.sampling, name=loaded.name)
        ((answer,),) = loaded.complete([list(asked.turns)], seed=seed, **sampling)
        reason = "stop" if answer.terminated else "max_tokens"
        message = ChatMessageAssistant(content=answer.text.strip(), source="generate")
        usage = ModelUsage(output_tokens=answer.num_tokens, total_tokens=answer.num_tokens)
        choice = ChatCompletionChoice(message=message, stop_reason=reason)
        return ModelOutput(model=self.model_name, choices=[choice], usage=usage)


def _loaded(
    path: str, *, force: bool = False, model: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The prompt of an artifact on its base."""
    from rlprompt.artifacts.format import read_artifact_info
    from rlprompt.policy import open_policy
    from rlprompt.serving.loaded import Model, artifact_folder, base_of_artifact

    folder = artifact_folder(path)
    base = base_of_artifact(read_artifact_info(folder), folder, model, trust_remote_code)
    return Model(open_policy(base)).load(folder, force=force)


def _asked(messages: Sequence[ChatMessage]) -> _Asked:
    """The turns of user and assistant, and the text of system messages."""
    system, turns = [], []
    for message in messages:
        if message.role == "tool":
            raise InputError("the conversation holds a tool's answer; leave tools out of the task")
        if message.role == "system":
            system.append(message.text)
        else:
            turns.append({"role": str(message.role), "content": message.text})
    return _Asked("\n\n".join(system), turns)


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    """What Inspect says of sampling, as fields of `SamplingSettings`."""
    for name in _REFUSED:
        if getattr(config, name, None):
            raise InputError(f"{name} is set, which a prompt on this base cannot apply; remove it")
    given = {name: getattr(config, name) for name in _OWN if name != "seed"}
    return {name: value for name, value in given.items() if value is not None}
