"""Conversations with one base under several prompts, side by side.

Every prompt keeps a history of its own: the base goes on from what the base said, the learned
prompt from what it said. All prompts of a turn meet the same random draws.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlprompt.artifacts.format import ArtifactInfo, load_artifact, read_artifact_info
from rlprompt.engines.make import make_engine, require_support
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import named_classes
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.serving.loaded import (
    artifact_folder,
    base_of_artifact,
    parsed_section,
    recipe_section,
)
from rlprompt.types import Message, Query


@dataclass(frozen=True)
class ChatOptions:
    """What may differ from how the artifact was trained; None = as in its recipe."""

    compare: bool = False
    """Answer under the base and the hand-written prompt too."""
    model: str | None = None
    """Base to load."""
    force: bool = False
    """Load the artifact on another base."""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int = 0
    trust_remote_code: bool = False
    """Never taken from the artifact: it may come from a stranger."""
    prompt_classes: Sequence[str] = ()
    """Paths of classes of the user's own; never taken from the artifact either."""


@dataclass(frozen=True)
class Answer:
    """What one prompt made the base say."""

    text: str
    terminated: bool
    """False when it was cut at the token limit."""


class Chat:
    """A conversation per prompt, on one policy."""

    def __init__(
        self,
        policy: Policy,
        prompts: Mapping[str, Prompt],
        sampling: SamplingSettings,
        seed: int = 0,
    ) -> None:
        """Prefill every prompt once.

        Args:
            policy: a policy over the base; its own prompt is not used.
            prompts: the prompts, by the name under which their answers are shown.
            sampling: how answers are drawn.
            seed: the seed of the first turn; every further turn counts one up.
        """
        self.sampling = sampling
        self._seed = seed
        self._engines = {name: make_engine(policy) for name in prompts}
        for name, prompt in prompts.items():
            require_support(self._engines[name], (prompt,))
            self._engines[name].sync(prompt)
        self._histories: dict[str, tuple[Message, ...]] = {}
        self.reset()

    @property
    def names(self) -> list[str]:
        """The names of the prompts, in the order of their answers."""
        return list(self._engines)

    def reset(self) -> None:
        """Forget the conversations; the next answers are those of a new chat."""
        self._histories = dict.fromkeys(self._engines, ())
        self._turn = 0

    def ask(
        self, text: str, progress: Callable[[str, int, int], None] | None = None
    ) -> dict[str, Answer]:
        """Answer under every prompt.

        Args:
            text: the user's turn.
            progress: what is called with (name of the prompt, tokens so far, most tokens).

        Raises:
            InputError: a conversation has become longer than the base's positions; the histories
                are then as before.
        """
        # A terminal may hand over bytes that are no UTF-8 as half surrogate pairs.
        content = text.encode("utf-8", "replace").decode()
        answers: dict[str, Answer] = {}
        histories: dict[str, tuple[Message, ...]] = {}
        for name, engine in self._engines.items():
            asked = (*self._histories[name], {"role": "user", "content": content})
            told = None if progress is None else _bound(progress, name)
            seed = self._seed + self._turn
            drawn = engine.generate([Query(messages=asked)], 1, self.sampling, seed, told)
            completion = drawn.groups[0].completions[0]
            answers[name] = Answer(completion.text.strip(), completion.terminated)
            said = {"role": "assistant", "content": answers[name].text}
            histories[name] = (*asked, said)
        self._histories = histories
        self._turn += 1
        return answers


def _bound(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, limit: progress(name, done, limit)


def open_chat(artifact: Path, options: ChatOptions) -> Chat:
    """A chat with an artifact on its base.

    The base runs on the device that suits this machine, whatever the recipe says.

    Args:
        artifact: folder of an artifact, or of a run.
        options: what differs from how it was trained.

    Raises:
        InputError: artifact or base cannot be loaded, or do not belong together.
    """
    artifact = artifact_folder(artifact)
    info = read_artifact_info(artifact)
    sampling = _sampling(info, artifact, options)
    policy = open_policy(base_of_artifact(info, artifact, options.model, options.trust_remote_code))
    learned = load_artifact(
        artifact, policy, force=options.force, own=named_classes(options.prompt_classes)
    )
    prompts: dict[str, Prompt] = {}
    if options.compare:
        prompts["base"] = NonePrompt()
        text = recipe_section(info, "evaluation").get("handwritten")
        if isinstance(text, str) and text.strip():
            prompts["hand-written"] = TextPrompt(text)
    prompts["learned"] = learned
    return Chat(policy, prompts, sampling, options.seed)


def printable(text: str) -> str:
    """The text without what could command a terminal; line ends stay, tabs become spaces.

    Control, formatting (bidirectional overrides) and surrogate characters are left out.
    """
    lines = text.replace("\r\n", "\n").expandtabs(4).split("\n")
    unsafe = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return "\n".join(
        "".join(char for char in line if unicodedata.category(char) not in unsafe) for line in lines
    )


def _sampling(info: ArtifactInfo, artifact: Path, options: ChatOptions) -> SamplingSettings:
    values = recipe_section(info, "sampling")
    for key in ("max_tokens", "temperature"):
        if getattr(options, key) is not None:
            values = {**values, key: getattr(options, key)}
    sampling = parsed_section(SamplingSettings, values, "sampling", artifact)
    # Short answers are asked for: a lower bound from training must not contradict.
    return sampling.model_copy(update={"min_tokens": min(sampling.min_tokens, sampling.max_tokens)})
