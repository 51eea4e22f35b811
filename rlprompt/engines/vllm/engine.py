"""The engine that draws on running vLLM servers, token ids in and token ids out.

The servers hold the recipe's frozen base for good: no weights are ever sent. What changes from step
to step is the prompt, and it travels with each request, as the input embeddings of the whole
conversation, or, where it is a LoRA adapter, once per step as a folder that the servers load.
Log-probabilities of the tokens come back and go into training, which corrects for them being
rounded in another way (`importance_cap`).

Before a run a probe is drawn on each server and compared with the forward here; see `probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch

from rlprompt.endpoints.json_client import Call, JsonClient, StatusError
from rlprompt.engines.base import Engine, Generation, require_prompts
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.vllm.adapters import ServedAdapters
from rlprompt.engines.vllm.probe import (
    COUNT,
    DRAWS,
    HOT,
    PROBE,
    Served,
    is_tempered,
    require_same,
    served_base,
)
from rlprompt.engines.vllm.requests import (
    Conversation,
    Drawn,
    completion_request,
    read_completions,
    sampling_objection,
    truncates,
)
from rlprompt.engines.vllm.settings import VllmSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.embedded import is_embedded, slot_embeddings
from rlprompt.prompts.layer_adapters import LoRA
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.types import Completion, Group, Query


class VllmEngine(Engine):
    """Draws on vLLM servers; supports texts, soft prompts, LoRA on a text, and no prompt at all."""

    Settings = VllmSettings
    settings: VllmSettings

    def __init__(self, policy: Policy, settings: VllmSettings) -> None:
        """Join the parts; nothing is asked yet.

        Args:
            policy: policy over the base that the servers have too.
            settings: how they are reached.

        Raises:
            InputError: see `JsonClient`.
        """
        super().__init__(policy, settings)
        self.client = JsonClient(settings.access)
        self._adapters = ServedAdapters(self.client, settings.adapter_folder)
        self._served: Served | None = None
        self._tempered: list[bool] = []
        """Of each server, whether its log-probabilities are those after the temperature."""
        self._rehearsed: set[str] = set()
        self._prompt: Prompt | None = None

    @classmethod
    def make(cls, settings: VllmSettings, policy: Policy) -> Self:
        """The engine, once the servers have shown that they have the base; see `Engine.make`.

        Raises:
            InputError: one does not answer within `start_timeout`, or has another base.
        """
        engine = cls(policy, settings)
        engine.connect()
        return engine

    def connect(self) -> None:
        """Ask every server what it serves, and compare what it draws with the base here.

        Raises:
            InputError: see `make`.
        """
        settings, nothing = self.settings, NonePrompt()
        self._served = served_base(self.client, settings.model, settings.start_timeout)
        self.rehearse(nothing)
        for server, shown in enumerate(self.client.shown):
            hot = self._probed(nothing, HOT, server)
            self._tempered.append(is_tempered(self.policy, nothing, hot, shown))

    def supports(self, prompt: Prompt) -> bool:
        """Whether it is input embeddings (a text, a soft prompt, those in sequence), or LoRA."""
        return not self._why_not(prompt)

    def objection(self, prompt: Prompt) -> str:
        """Why it is neither; see `Engine.objection`."""
        return self._why_not(prompt)

    def _why_not(self, prompt: Prompt) -> str:
        """Why a prompt is not supported, as the middle of a sentence; empty = it is."""
        if isinstance(prompt, AdapterPrompt):
            if type(prompt) is AdapterPrompt and isinstance(prompt.adapter, LoRA):
                return self._adapters.objection()
            return (
                "takes LoRA adapters only (prompt.method.type: lora), since vLLM has no layers for "
                "IA3 or for a kind of one's own"
            )
        if is_embedded(prompt):
            return ""
        where = "prompt.parts" if isinstance(prompt, SequencePrompt) else "prompt.type"
        return (
            f"cannot apply a prompt of the kind {prompt.kind} ({where}), since a request to vLLM "
            "holds tokens and input embeddings, and no keys and values of layers"
        )

    def rehearse(self, prompt: Prompt) -> None:
        """Draw a probe under the prompt on each server, and compare; see `Engine.rehearse`.

        Prompts that reach the servers in the same way are rehearsed once.
        """
        way = _way(prompt)
        if way in self._rehearsed:
            return
        for server, shown in enumerate(self.client.shown):
            drawn = self._probed(prompt, DRAWS, server)
            require_same(self.policy, prompt, drawn, shown, self.settings.largest_gap)
        self._rehearsed.add(way)

    def _probed(self, prompt: Prompt, sampling: SamplingSettings, server: int) -> list[Drawn]:
        """What one server draws for the probe."""
        conversation = self._conversations(prompt, [PROBE], sampling)[0]
        body = completion_request(
            self._model_name(prompt), conversation, sampling, self._stops(sampling), COUNT, "probe"
        )
        (answer,) = self._asked([Call("/completions", body, server)], None)
        return self._read(answer, COUNT, sampling, server)

    def sync(self, prompt: Prompt) -> None:
        """Take over the prompt; see `Engine.sync`. An adapter is loaded by the servers at once."""
        objection = self._why_not(prompt)
        if objection:
            raise InputError(
                f"engine.type is vllm, which {objection}; choose another engine, or another prompt"
            )
        self._model_name(prompt)
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

        Log-probabilities are those before truncation, as for every engine; where `sampling`
        truncates, vLLM's are not, and completions have none.

        Raises:
            InputError: no prompt was synced, a sampling setting would mean something else there, a
                conversation is too long for the servers, or one gives no usable answer.
        """
        del keep_products  # nothing is multiplied here
        if self._prompt is None:
            raise InputError("the engine has no prompt yet; call sync")
        (drawn,) = self._drawn(
            [self._prompt], queries, num_completions, sampling, seed, first, progress
        )
        return drawn

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        num_completions: int,
        sampling: SamplingSettings,
        seed: int,
    ) -> list[Generation]:
        """Draw under several prompts, all requests at the same time; see `Engine.generate_each`.

        Where one is an adapter, of which one at a time is loaded, they come one after the other.
        """
        require_prompts(prompts)
        if any(isinstance(prompt, AdapterPrompt) for prompt in prompts):
            return super().generate_each(prompts, queries, num_completions, sampling, seed)
        for prompt in prompts:
            self.sync(prompt)
        return self._drawn(prompts, queries, num_completions, sampling, seed, 0, None)

    def _drawn(
        self,
        prompts: Sequence[Prompt],
        queries: Sequence[Query],
        count: int,
        sampling: SamplingSettings,
        seed: int,
        first: int,
        progress: Callable[[int, int], None] | None,
    ) -> list[Generation]:
        self._check(sampling)
        sent = 1 if sampling.temperature == 0.0 else count  # greedy ones would all be the same
        stops, servers = self._stops(sampling), len(self.client.shown)
        calls = []
        for prompt in prompts:
            name = self._model_name(prompt)
            for place, each in enumerate(self._conversations(prompt, queries, sampling), first):
                draw = f"{seed}/{place}"
                body = completion_request(name, each, sampling, stops, sent, draw)
                calls.append(Call("/completions", body, place % servers, may_move=True))
        longest = 0

        def heard(place: int, answer: Any) -> None:
            nonlocal longest
            read = self._read(answer, sent, sampling, calls[place].server)
            longest = max(longest, *(len(each.token_ids) for each in read))
            if progress is not None:
                progress(longest, sampling.max_tokens)

        answers = self._asked(calls, heard, prompts[0])
        rows = (
            self._completions(self._read(answer, sent, sampling, call.server), count, sampling)
            for answer, call in zip(answers, calls, strict=True)
        )
        return [Generation(tuple(Group(query, next(rows)) for query in queries)) for _ in prompts]

    def _check(self, sampling: SamplingSettings) -> None:
        """Refuse what would mean something else on the servers."""
        objection = sampling_objection(sampling)
        if objection:
            raise InputError(objection)
        unknown = [i for i in sampling.stop_token_ids if not 0 <= i < self.policy.base.vocab_size]
        if unknown:
            raise InputError(
                f"sampling.stop_token_ids names tokens that {self.policy.base.id} does not have: "
                f"{unknown}; take ids of its tokenizer"
            )
        if sampling.temperature in (0.0, 1.0) or truncates(sampling):
            return
        for shown, tempered in zip(self.client.shown, self._tempered, strict=True):
            if not tempered:
                raise InputError(
                    f"engine: {shown} gives log-probabilities before the temperature, and "
                    f"sampling.temperature is {sampling.temperature:g}; start it with "
                    "--logprobs-mode processed_logprobs"
                )

    def _stops(self, sampling: SamplingSettings) -> frozenset[int]:
        return self.policy.stop_ids | set(sampling.stop_token_ids)

    def _model_name(self, prompt: Prompt) -> str:
        """The name that requests under a prompt carry: the base's, or that of an adapter."""
        assert self._served is not None  # `connect` comes first
        if isinstance(prompt, AdapterPrompt):
            return self._adapters.name_of(prompt, self.policy.base.id)
        return self._served.model

    @torch.no_grad()
    def _conversations(
        self, prompt: Prompt, queries: Sequence[Query], sampling: SamplingSettings
    ) -> list[Conversation]:
        """What stands before the completions of each query.

        Raises:
            InputError: one is longer than the servers' positions, the completion included.
        """
        policy = self.policy
        tails = [policy.query_ids(query, prompt) for query in queries]
        head = _token_ids(prompt, policy)
        if head is not None:
            made = [Conversation(token_ids=(*head, *tail)) for tail in tails]
        else:
            slot = slot_embeddings(prompt, policy)
            before = torch.cat([policy.embed(list(policy.head_ids)), slot])
            made = [
                Conversation(embeddings=torch.cat([before, policy.embed(tail)])) for tail in tails
            ]
        assert self._served is not None
        most = self._served.max_positions
        longest = max((each.num_tokens for each in made), default=0) + sampling.max_tokens
        if most is not None and longest > most:
            raise InputError(
                f"engine: a conversation needs {longest} positions with its completion, and the "
                f"servers have {most}; start them with --max-model-len {longest} or more, or lower "
                "sampling.max_tokens"
            )
        return made

    def _asked(
        self,
        calls: Sequence[Call],
        heard: Callable[[int, Any], None] | None,
        prompt: Prompt | None = None,
    ) -> list[Any]:
        """The answers, with the adapter loaded again where a server has lost it."""
        try:
            return self.client.ask(calls, heard)
        except StatusError as error:
            if error.status != 404 or not isinstance(prompt, AdapterPrompt):
                raise _refused(error) from error
        self._adapters.forget()
        name = self._model_name(prompt)
        again = [replace(each, body={**(each.body or {}), "model": name}) for each in calls]
        try:
            return self.client.ask(again, heard)
        except StatusError as error:
            raise _refused(error) from error

    def _read(
        self, answer: Any, count: int, sampling: SamplingSettings, server: int
    ) -> list[Drawn]:
        try:
            return read_completions(answer, count, sampling.max_tokens, self.policy.base.vocab_size)
        except ValueError as error:
            raise InputError(
                f"engine: the answer of {self.client.shown[server]} cannot be used: {error}; see "
                "that engine.urls lead to vLLM 0.21 or newer with the recipe's base"
            ) from error

    def _completions(
        self, drawn: Sequence[Drawn], count: int, sampling: SamplingSettings
    ) -> tuple[Completion, ...]:
        """As many as were wanted, of those that were sent for."""
        stops = self._stops(sampling)
        known = not truncates(sampling)
        made = [
            Completion(
                token_ids=each.token_ids,
                sampling_logprobs=each.logprobs if known else (),
                text=self.policy.slot.decode(each.token_ids),
                terminated=each.token_ids[-1] in stops,
            )
            for each in drawn
        ]
        return tuple(made if len(made) == count else made * count)


def _token_ids(prompt: Prompt, policy: Policy) -> list[int] | None:
    """Head and slot as tokens; None where they are no tokens."""
    if isinstance(prompt, AdapterPrompt) or type(prompt) is TextPrompt:
        return [*policy.head_ids, *policy.slot_ids(prompt.init_text)]
    return list(policy.none_head_ids) if type(prompt) is NonePrompt else None


def _way(prompt: Prompt) -> str:
    """How a prompt reaches the servers."""
    if isinstance(prompt, AdapterPrompt):
        return "adapter"
    return "tokens" if type(prompt) in (TextPrompt, NonePrompt) else "embeddings"


def _refused(error: StatusError) -> InputError:
    """What a refusal means to the user."""
    if "prompt-embeds" in error.said or "prompt_embeds" in error.said:
        return InputError(f"engine: {error}; start it with --enable-prompt-embeds")
    return InputError(f"engine: {error}; change what it objects to in engine or sampling")
