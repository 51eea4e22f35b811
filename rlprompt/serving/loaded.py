"""A model, and a system prompt on it, ready to answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from rlprompt.artifacts.format import (
    ArtifactInfo,
    load_artifact,
    read_artifact_info,
    save_artifact,
)
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.make import named_classes
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.serving.stream import streamed
from rlprompt.settings import Settings
from rlprompt.types import Completion, Message, Query

_Part = TypeVar("_Part", bound=Settings)

Conversation = str | Sequence[Message]
"""The user's text, or turns `{"role": ..., "content": ...}` of user and assistant, the user's last.
A system turn is refused: that is the prompt's place."""


class LoadedPrompt:
    """A system prompt on its frozen base, ready to answer."""

    def __init__(
        self,
        policy: Policy,
        prompt: Prompt,
        sampling: SamplingSettings | None = None,
        *,
        name: str = "prompt",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Join the parts; nothing is computed yet.

        Args:
            policy: the policy over the base; its own prompt is not used.
            prompt: what stands in the system turn.
            sampling: how answers are drawn where the caller does not say.
            name: what the prompt is called when it is saved.
            recipe: plain values of the recipe that it was learned with, for `save`.
        """
        self.policy = policy
        self.prompt = prompt
        self.sampling = sampling or SamplingSettings()
        self.name = name
        self.recipe = dict(recipe or {})
        self._engine: NativeEngine | None = None

    def __repr__(self) -> str:
        """What it is and where it stands."""
        return f"LoadedPrompt({self.prompt.kind}, {self.num_tokens} tokens, {self.policy.base.id})"

    @property
    def kind(self) -> str:
        """The representation: `soft`, `prefix`, `adapter`, `sequence`, `text`, or `none`."""
        return self.prompt.kind

    @property
    def text(self) -> str:
        """The text that the prompt is, or that it started from; empty without one."""
        return self.prompt.init_text

    @property
    def num_tokens(self) -> int:
        """Positions that the prompt takes in the system turn."""
        return self.policy.prefix_length(self.prompt) - len(self.policy.head_ids)

    def generate(self, messages: Conversation, *, seed: int = 0, **sampling: Any) -> str:
        """Answer one conversation.

        Args:
            messages: the user's text, or turns of user and assistant, the user's last.
            seed: seed of the draw; equal seeds give equal answers.
            sampling: fields of `SamplingSettings` in place of the prompt's own, such as
                `max_tokens=200` or `temperature=0`.

        Raises:
            InputError: the messages are no such turns, a field does not exist, or the conversation
                is longer than the base's positions.
        """
        return self.complete([messages], 1, seed=seed, **sampling)[0][0].text.strip()

    def generate_many(
        self, conversations: Sequence[Conversation], n: int = 1, *, seed: int = 0, **sampling: Any
    ) -> list[list[str]]:
        """Answer several conversations in one batch.

        Args:
            conversations: the conversations, at least one; each as for `generate`.
            n: answers of each.
            seed: seed of all draws.
            sampling: the fields in place of the prompt's own, as for `generate`.

        Returns:
            The n answers of each conversation.

        Raises:
            InputError: see `generate`.
        """
        groups = self.complete(conversations, n, seed=seed, **sampling)
        return [[completion.text.strip() for completion in group] for group in groups]

    def complete(
        self, conversations: Sequence[Conversation], n: int = 1, *, seed: int = 0, **sampling: Any
    ) -> list[tuple[Completion, ...]]:
        """As `generate_many`, with token ids and their log-probabilities.

        Returns:
            The n completions of each conversation.

        Raises:
            InputError: see `generate`.
        """
        queries = [_query(each, number) for number, each in enumerate(conversations)]
        if not queries:
            return []
        if n < 1:
            raise InputError(f"n is {n}; ask for at least one answer")
        groups = self._synced().generate(queries, n, self._sampling(sampling), seed).groups
        return [group.completions for group in groups]

    def stream(self, messages: Conversation, *, seed: int = 0, **sampling: Any) -> Iterator[str]:
        """Answer one conversation piece by piece, while it is drawn.

        The pieces joined are the answer of `generate`. An iterator that is closed before its end
        ends the draw.

        Args:
            messages: the user's text, or turns of user and assistant, the user's last.
            seed: seed of the draw.
            sampling: fields of `SamplingSettings`, as for `generate`.

        Raises:
            InputError: see `generate`.
        """
        engine, settings = self._synced(), self._sampling(sampling)
        return streamed(engine, self.policy.slot.decode, _query(messages, 0), settings, seed)

    def save(self, folder: str | Path) -> Path:
        """Write the prompt as an artifact: a folder with safetensors, JSON and a card.

        Args:
            folder: the folder, which is made if absent; files of an artifact in it are replaced.

        Returns:
            The folder.

        Raises:
            InputError: the representation has no artifact form, or the folder cannot be written.
        """
        path = Path(folder)
        try:
            save_artifact(
                path, self.policy, self.prompt, name=self.name, recipe=self.recipe, metrics={}
            )
        except OSError as error:
            raise InputError(
                f"'{path}' cannot be written ({error.strerror}); name a folder that can"
            ) from error
        return path

    def _synced(self) -> NativeEngine:
        """The engine under this prompt, which is prefilled once."""
        if self._engine is None:
            engine = NativeEngine(self.policy)
            engine.sync(self.prompt)
            self._engine = engine
        return self._engine

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingSettings:
        values = {**self.sampling.model_dump(), **changes}
        if "min_tokens" not in changes:  # a bound from training must not contradict
            values["min_tokens"] = min(values["min_tokens"], values["max_tokens"])
        return checked_sampling(values)


class Model:
    """A frozen chat model: prompts stand on it, and runs may share it."""

    def __init__(self, policy: Policy) -> None:
        """Keep the policy.

        Args:
            policy: the policy over the base, under no prompt.
        """
        self.policy = policy

    def __repr__(self) -> str:
        """What it is and where."""
        base = self.policy.base
        return f"Model({base.id}, {str(base.dtype).removeprefix('torch.')}, {base.device})"

    @property
    def id(self) -> str:
        """The embedded name, `org/name[@revision]`, or the absolute path of the folder."""
        return self.policy.base.id

    def prompt(self, text: str | None = None) -> LoadedPrompt:
        """A hand-written system prompt on this model.

        Args:
            text: the system message; None = no system message at all.

        Raises:
            InputError: the text is empty or cannot be encoded.
        """
        if text is not None and not text.strip():
            raise InputError("the system prompt is blank; write a text, or None for none")
        prompt = NonePrompt() if text is None else TextPrompt(text)
        return LoadedPrompt(self.policy.sibling(), prompt)

    def load(
        self,
        artifact: str | Path,
        *,
        force: bool = False,
        prompt_classes: Sequence[type[Prompt] | str] = (),
    ) -> LoadedPrompt:
        """A learned prompt on this model.

        Args:
            artifact: the folder of an artifact, or of a run.
            force: whether to load a prompt of another base or chat template all the same; a warning
                is logged.
            prompt_classes: classes of your own that the prompt is of, or their paths as
                `path/file.py:object`; an artifact alone imports nothing.

        Raises:
            InputError: the artifact is damaged, belongs to another base or template, or holds a
                prompt of a class that is neither built in nor named.
        """
        folder = artifact_folder(artifact)
        info = read_artifact_info(folder)
        policy = self.policy.sibling()
        return LoadedPrompt(
            policy,
            load_artifact(folder, policy, force=force, own=named_classes(prompt_classes)),
            checked_sampling(info.recipe.get("sampling") or {}),
            name=info.name,
            recipe=info.recipe,
        )


def artifact_folder(path: str | Path) -> Path:
    """The artifact at a path: the folder itself, or the `artifact` in a run's folder.

    The run may be a population's, or one that still goes on.
    """
    folder = Path(path)
    folder = folder.parent if folder.name == "prompt.json" else folder
    inside = folder / "artifact"
    return inside if not (folder / "prompt.json").is_file() and inside.is_dir() else folder


def recipe_section(info: ArtifactInfo, name: str) -> dict[str, Any]:
    """A section of the recipe that an artifact carries; empty where it has none."""
    section = info.recipe.get(name)
    return section if isinstance(section, dict) else {}


def parsed_section(
    kind: type[_Part], values: Mapping[str, Any], section: str, artifact: Path
) -> _Part:
    """A section of an artifact's recipe as settings.

    Raises:
        InputError: this version of rlprompt has other settings.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (section, *first["loc"]))
        raise InputError(
            f"the recipe in '{artifact / 'prompt.json'}' cannot be used ({where}: {first['msg']}); "
            "install the version of rlprompt that wrote it"
        ) from error


def base_of_artifact(
    info: ArtifactInfo, artifact: Path, model: str | None, trust_remote_code: bool
) -> ModelSettings:
    """What to load for an artifact: its own base, on the device that suits this machine.

    Args:
        info: content of its prompt.json.
        artifact: its folder, for error messages.
        model: another base to load; None = its own.
        trust_remote_code: whether Python code of the model may run. Never taken from the artifact,
            which may come from a stranger.

    Raises:
        InputError: the base was a model in memory, is behind an endpoint, or comes with Python
            code.
    """
    if info.endpoint is not None and model is None:
        # Never asked for an artifact alone, which may name any server and any variable as its key.
        raise InputError(
            f"'{artifact}' holds a text for {info.base}, whose weights are not here: send its text "
            "(init_text in prompt.json) as the system message there, evaluate it with `rlprompt "
            "eval --recipe`, or try it on a base of your own with --model and --force"
        )
    settings = parsed_section(ModelSettings, recipe_section(info, "model"), "model", artifact)
    changes: dict[str, Any] = {"device": "auto", "trust_remote_code": trust_remote_code}
    if model is not None:
        changes |= {"path": model, "revision": None}
    elif Path(info.base).is_absolute() and Path(info.base).is_dir():
        changes["path"] = info.base  # a relative path in the recipe was relative to another place
    elif settings.path.startswith("memory:"):
        raise InputError(
            f"the base of '{artifact}' was a model in memory ({info.base}); name it with --model, "
            "or in Python as model="
        )
    elif settings.trust_remote_code and not trust_remote_code:
        raise InputError(
            f"the base of '{artifact}', {settings.path}, comes with Python code of its own; read "
            "that code and pass --trust-remote-code, or name another base with --model"
        )
    return settings.model_copy(update=changes)


def checked_sampling(values: Mapping[str, Any]) -> SamplingSettings:
    """Sampling settings of plain values.

    Raises:
        InputError: a field does not exist or has a wrong value.
    """
    try:
        return SamplingSettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(SamplingSettings.model_fields)
            raise InputError(
                f"there is no sampling setting '{name}'; choose from {known}"
            ) from error
        raise InputError(
            f"sampling setting '{name}' is wrong: {first['msg']}; correct it"
        ) from error


def _query(conversation: Conversation, number: int) -> Query:
    """A conversation as a query; its turns are checked where they are rendered."""
    turns = (
        ({"role": "user", "content": conversation},)
        if isinstance(conversation, str)
        else tuple(dict(turn) for turn in conversation)
    )
    return Query(messages=turns, index=number)
