"""An engine that asks a model behind an OpenAI-compatible endpoint: text in, text out.

A text prompt is sent as the system message, none without one, and the turns of a conversation
follow as they are. Nothing of the model is here: completions have a text and a length as the server
counts it, no tokens and no log-probabilities. The seed of a request is made of the seed of the
draw, the place of its query and the number of its completion, the same under every prompt. Servers
do not promise to be deterministic; what was drawn once is in the run's journal and stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from rlprompt.endpoints.answers import Answer, Choice, Question
from rlprompt.endpoints.client import EndpointClient
from rlprompt.endpoints.settings import EndpointSettings
from rlprompt.engines.base import Engine, EngineSettings, Generation
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Completion, Group, Query

EXTENSIONS = ("top_k", "min_p", "min_tokens", "stop_token_ids")
"""Sampling settings that OpenAI's protocol does not have."""


class EndpointEngineSettings(EndpointSettings, EngineSettings):
    """A model behind an OpenAI-compatible endpoint, whose weights are not here."""

    type: Literal["endpoint"] = "endpoint"
    """Engine."""


@dataclass(frozen=True)
class RemoteModel:
    """A model behind an endpoint, as what prompts are learned for (`prompts.target.Target`)."""

    model: str
    """Its name on the server."""
    address: str
    """Where the server is, as the recipe has it."""

    @property
    def id(self) -> str:
        """Name and address."""
        return f"{self.model} at {self.address}"

    @property
    def identity(self) -> Mapping[str, str]:
        """Its name; a server may move."""
        return {"model behind the endpoint": self.model}

    @property
    def fingerprint(self) -> str | None:
        """None: its weights are elsewhere."""
        return None

    @property
    def template_hash(self) -> str | None:
        """None: its chat template is elsewhere."""
        return None

    @property
    def endpoint(self) -> Mapping[str, str] | None:
        """Address and name."""
        return {"base_url": self.address, "model": self.model}

    def verify(self) -> str | None:
        """None: nothing of it can be verified."""
        return None

    def positions(self, prompt: Prompt) -> int | None:
        """None: its tokenizer is elsewhere."""
        del prompt
        return None

    def machine(self) -> dict[str, Any]:
        """The endpoint."""
        return {"device": f"endpoint {self.address}", "dtype": None}

    def memory(self) -> dict[str, float | int]:
        """Nothing is held here."""
        return {}


class EndpointEngine(Engine):
    """Draws completions from a model behind an endpoint; supports texts, and no prompt at all."""

    Settings: ClassVar[type[EngineSettings]] = EndpointEngineSettings
    settings: EndpointEngineSettings

    def __init__(
        self, settings: EndpointEngineSettings, client: EndpointClient | None = None
    ) -> None:
        """Join the parts; nothing is sent yet.

        Args:
            settings: how the server is reached.
            client: client with the ledger of a run; None = one without budget and journal.

        Raises:
            InputError: see `EndpointClient`.
        """
        super().__init__(None, settings)
        self.client = client or EndpointClient(settings)
        self._prompt: Prompt | None = None

    @classmethod
    def make(cls, settings: EndpointEngineSettings, policy: Policy | None = None) -> Self:
        """The engine that a recipe describes; the policy is not used."""
        del policy
        return cls(settings)

    @property
    def model(self) -> RemoteModel:
        """What completions are drawn from."""
        return RemoteModel(self.settings.model, self.client.shown)

    def supports(self, prompt: Prompt) -> bool:
        """Whether it is a text, or none."""
        return isinstance(prompt, TextPrompt | NonePrompt)

    def sync(self, prompt: Prompt) -> None:
        """Take over a text; see `Engine.sync`."""
        if not self.supports(prompt):
            raise InputError(
                f"engine.type is endpoint, which cannot apply a prompt of the kind {prompt.kind}; "
                "choose another engine, or another prompt"
            )
        self._prompt = prompt

    def generate(
        self,
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
        first: int = 0,
        keep_products: bool = False,
    ) -> Generation:
        """Draw completions; see `Engine.generate`.

        Raises:
            InputError: no prompt was synced, a sampling setting cannot be sent, or the server gives
                no usable answer.
            BudgetSpentError: the next request may not fit into the budget.
        """
        del keep_products  # nothing is multiplied here
        if self._prompt is None:
            raise InputError("the engine has no prompt yet; call sync")
        (drawn,) = self._drawn([self._prompt], queries, num_completions, sampling, seed, first)
        if progress is not None:
            lengths = [each.num_tokens for group in drawn.groups for each in group.completions]
            progress(max(lengths), sampling.max_tokens)
        return drawn

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
    ) -> list[Generation]:
        """Draw under several prompts, all requests at the same time; see `Engine.generate_each`."""
        for prompt in prompts:
            self.sync(prompt)
        return self._drawn(prompts, queries, num_completions, sampling, seed, 0)

    def _drawn(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        count: int,
        sampling: SamplingSettings,
        seed: int,
        first: int,
    ) -> list[Generation]:
        check_sampling(self.settings, sampling)
        questions = [
            question
            for prompt in prompts
            for place, query in enumerate(queries)
            for question in self._questions(
                [*_system(prompt), *query.messages], count, sampling, f"{seed}/{first + place}"
            )
        ]
        choices = self._choices(self.client.ask(questions), sampling)
        return [
            Generation(
                tuple(Group(query, tuple(next(choices) for _ in range(count))) for query in queries)
            )
            for _ in prompts
        ]

    def _questions(
        self,
        messages: Sequence[Mapping[str, str]],
        count: int,
        sampling: SamplingSettings,
        draw: str,
    ) -> Iterator[Question]:
        """The requests that give so many completions of one conversation."""
        most = self.settings.choices_per_request
        for start in range(0, count, most):
            yield question_of(
                self.settings, messages, sampling, f"{draw}/{start}", min(most, count - start)
            )

    def _choices(
        self, answers: Sequence[Answer], sampling: SamplingSettings
    ) -> Iterator[Completion]:
        for answer in answers:
            for choice in answer.choices:
                yield self._completion(choice, sampling)

    def _completion(self, choice: Choice, sampling: SamplingSettings) -> Completion:
        if choice.tokens is None:
            wanted = "usage" if self.settings.choices_per_request == 1 else "logprobs"
            raise InputError(
                f"engine: {self.client.shown} gives no {wanted}, so the lengths of completions are "
                "not known; have the server give it"
                + ("" if wanted == "usage" else ", or set engine.choices_per_request: 1")
            )
        cut = choice.finish == "length"
        if not choice.finish:  # the server does not say
            cut = choice.tokens >= sampling.max_tokens
        return Completion((), (), choice.text, not cut, counted=choice.tokens)


def question_of(
    settings: EndpointSettings,
    messages: Sequence[Mapping[str, str]],
    sampling: SamplingSettings,
    draw: str,
    choices: int = 1,
) -> Question:
    """A request for completions of a conversation.

    Args:
        settings: what the server takes.
        messages: the turns, a system message first where there is one.
        sampling: how tokens are drawn.
        draw: what tells apart requests that are to be drawn anew; the seed is made of it.
        choices: the number of completions.
    """
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [{"role": each["role"], "content": each["content"]} for each in messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        settings.max_tokens_key: sampling.max_tokens,
    }
    if settings.send_seed:
        body["seed"] = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:4], "big") >> 1
    if choices > 1:
        body |= {"n": choices, "logprobs": True}
    if settings.sampling_extensions:
        # All of them, for a server may have defaults of its own.
        body |= {"top_k": -1 if sampling.top_k is None else sampling.top_k}
        body |= {"min_p": sampling.min_p, "min_tokens": sampling.min_tokens}
        if sampling.stop_token_ids:
            body["stop_token_ids"] = list(sampling.stop_token_ids)
    return Question({**body, **settings.extra_body}, draw, sampling.max_tokens, choices)


def check_sampling(settings: EndpointSettings, sampling: SamplingSettings) -> None:
    """Refuse sampling settings that the server does not take.

    Args:
        settings: what the server takes.
        sampling: how tokens are to be drawn.

    Raises:
        InputError: there is one.
    """
    name = unsent(settings, sampling)
    if name is not None:
        raise InputError(
            f"sampling.{name} is no part of OpenAI's protocol; remove it, or set "
            "engine.sampling_extensions: true for a server that takes it, such as vLLM"
        )


def unsent(settings: EndpointSettings, sampling: SamplingSettings) -> str | None:
    """The first sampling setting that would have no effect on the server; None = all have.

    Args:
        settings: what the server takes.
        sampling: how tokens are to be drawn.
    """
    if settings.sampling_extensions:
        return None
    defaults = SamplingSettings.model_fields
    names = (n for n in EXTENSIONS if getattr(sampling, n) != defaults[n].default)
    return next(names, None)


def _system(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "system", "content": prompt.init_text}] if prompt.init_text else []
