"""A learned prompt as a model of lm-eval.

lm-eval (0.4.13) knows no plug-ins for models, so the command is run with ours registered:

    python -m rlprompt.suites.lm_eval_model --model rlprompt --model_args artifact=PATH --tasks NAME

Everything else is the command `lm_eval`. In Python, `import rlprompt.suites.lm_eval_model`
registers the model for `lm_eval.simple_evaluate(model="rlprompt", model_args="artifact=PATH")`.

The prompt stands in the system turn. What lm-eval calls the context is the user's turn, or, with
`--apply_chat_template`, the turns that it gives; system text of a task follows behind the prompt,
as other text of a deployment would. Continuations are scored as the beginning of an answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.data.situations import System
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.errors import InputError
from rlprompt.policy import open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.reading import json_text
from rlprompt.serving.loaded import Model, artifact_folder, base_of_artifact, checked_sampling
from rlprompt.suites.bench import TOKEN_BUDGET
from rlprompt.suites.composition import among
from rlprompt.suites.likelihood import GivenAnswer, likelihoods, rolling_likelihoods
from rlprompt.types import Message, Query

CHAT = "rlprompt:chat:"
"""What a context begins with that holds turns, as JSON."""
_MOST_TOKENS = 256
"""Longest answer where task and model say nothing, as elsewhere in lm-eval."""
_DEFAULT_DEVICE = "cuda:0"
"""What the command says where its user says nothing; the base's own choice is made then."""
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@register_model("rlprompt")
class PromptLM(LM):
    """A learned prompt on its base."""

    def __init__(
        self,
        artifact: str | None = None,
        *,
        model: str | None = None,
        base_only: bool = False,
        force: bool = False,
        trust_remote_code: bool = False,
        max_gen_toks: int = _MOST_TOKENS,
        seed: int = 0,
        batch_size: int | str | None = None,
        **others: Any,
    ) -> None:
        """Load prompt and base.

        Args:
            artifact: path of an artifact or a run.
            model: another base to load; None = its own.
            base_only: whether the base is asked without the prompt, to compare with.
            force: whether to load the prompt on another base or template all the same.
            trust_remote_code: whether Python code of the base may run.
            max_gen_toks: longest answer where the task says nothing.
            seed: seed of answers that are drawn at random.
            batch_size: answers drawn at once; None or `auto` = as many as the engine takes.
            others: arguments of lm-eval that are known, and those that are not.

        Raises:
            InputError: the artifact cannot be loaded, or there is another argument.
        """
        super().__init__()
        device = others.pop("device", None)
        others.pop("max_batch_size", None)
        if others:
            raise InputError(
                f"there is no model argument '{min(others)}'; known are artifact, model, force, "
                "base_only, trust_remote_code, max_gen_toks and seed"
            )
        if not isinstance(artifact, str):
            raise InputError("no artifact is named; write --model_args artifact=PATH")
        folder = artifact_folder(artifact)
        base = base_of_artifact(read_artifact_info(folder), folder, model, trust_remote_code)
        if device not in (None, _DEFAULT_DEVICE):
            base = base.model_copy(update={"device": str(device)})
        self._loaded = Model(open_policy(base)).load(folder, force=force)
        self._prompt: Prompt = NonePrompt() if base_only else self._loaded.prompt
        self._name = f"{artifact}{', base only' if base_only else ''}"
        self._seed = int(seed)
        self._most = int(max_gen_toks)
        settings = NativeSettings()
        if batch_size not in (None, "auto"):
            settings = NativeSettings(max_rows=_rows(batch_size))
        self._engine = NativeEngine(self._loaded.policy, settings)

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are known by: the prompt, its base and template."""
        return "|".join([self._name, *self._loaded.policy.identity.values()])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name: the base's own template writes the turns, with the prompt in its place."""
        del chat_template
        return "rlprompt"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Turns as one text, which only this model reads."""
        del add_generation_prompt  # the last turn tells
        return CHAT + json.dumps(chat_history, ensure_ascii=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding gives.

        Raises:
            InputError: a request cannot be asked under a prompt.
        """
        del disable_tqdm
        asked = [asked_of(context) for context, _ in (request.args for request in requests)]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for system in dict.fromkeys(each.system for each in asked):
            places = [i for i, each in enumerate(asked) if each.system == system]
            answers = [
                GivenAnswer(asked[i].turns, str(requests[i].args[1]), asked[i].begun)
                for i in places
            ]
            scores = likelihoods(self._loaded.policy, self._under(system), answers, TOKEN_BUDGET)
            for place, score in zip(places, scores, strict=True):
                found[place] = (score.logprob, score.is_greedy)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; see `rolling_likelihoods`.

        Raises:
            InputError: a text cannot be encoded.
        """
        del disable_tqdm
        texts = [str(request.args[0]) for request in requests]
        prompt = self._prompt
        found = rolling_likelihoods(self._loaded.policy, prompt, texts, TOKEN_BUDGET)
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request, up to the first of its stop texts.

        Raises:
            InputError: a request cannot be asked under a prompt, or has a setting that cannot be
                applied.
        """
        del disable_tqdm
        batches: dict[tuple[Any, ...], list[int]] = {}
        asked = [asked_of(str(request.args[0])) for request in requests]
        stops: list[list[str]] = []
        for place, (request, each) in enumerate(zip(requests, asked, strict=True)):
            if each.begun:
                raise InputError(
                    "a task begins the answer for the model (gen_prefix), which a prompt on this "
                    "base cannot go on from; remove it from the task"
                )
            sampling, until = self._drawn_as(request.args[1])
            stops.append(until)
            batches.setdefault((each.system, *sorted(sampling.items())), []).append(place)
        texts = [""] * len(requests)
        for (system, *items), places in batches.items():
            self._engine.sync(self._under(system))
            queries = [Query(asked[i].turns, index=i, place=f"request {i}") for i in places]
            drawn = self._engine.generate(queries, 1, checked_sampling(dict(items)), self._seed)
            for place, group in zip(places, drawn.groups, strict=True):
                texts[place] = cut(group.completions[0].text, stops[place])
                request = requests[place]
                self.cache_hook.add_partial("generate_until", request.args, texts[place])
        return texts

    def _under(self, system: str) -> Prompt:
        """The prompt, with a task's system text behind it."""
        prompt = self._prompt
        return among(prompt, System(after=system)) if system.strip() else prompt

    def _drawn_as(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """A request's settings as fields of `SamplingSettings`, and its stop texts."""
        values = dict(normalize_gen_kwargs(dict(given), self._most))
        until = [str(stop) for stop in values.pop("until", None) or [] if stop]
        samples = bool(values.pop("do_sample", False))
        sampling: dict[str, Any] = {"max_tokens": int(values.pop("max_gen_toks"))}
        for name in _SAMPLING:
            value = values.pop(name, None)
            if value is not None and (samples or name == "temperature"):
                sampling[name] = value
        if values:
            raise InputError(
                f"generation_kwargs of a task name '{min(values)}', which a prompt on this base "
                "cannot apply; remove it (known: until, do_sample, max_gen_toks, "
                f"{', '.join(_SAMPLING)})"
            )
        sampling.setdefault("temperature", 1.0 if samples else 0.0)
        return sampling, until


@dataclass(frozen=True)
class Asked:
    """What a context asks."""

    system: str
    """The task's system text, empty without one."""
    turns: tuple[Message, ...]
    """Turns of user and assistant, the user's last."""
    begun: str
    """What the answer begins with."""


def asked_of(context: str) -> Asked:
    """A context of lm-eval as a conversation.

    Args:
        context: the user's text, or turns as `PromptLM.apply_chat_template` writes them.
    """
    if not context.startswith(CHAT):
        return Asked("", ({"role": "user", "content": context},), "")
    turns = [
        {"role": str(turn["role"]), "content": str(turn["content"])}
        for turn in json_text.loads(context.removeprefix(CHAT))
    ]
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    turns = [turn for turn in turns if turn["role"] != "system"]
    begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
    return Asked(system, tuple(turns), begun)


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of some stop texts.

    Args:
        text: text.
        until: stop texts, none of them empty.
    """
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _rows(batch_size: int | str | None) -> int:
    """lm-eval's batch size as rows of the engine."""
    try:
        return max(1, int(str(batch_size)))
    except ValueError as error:
        raise InputError(f"batch_size is '{batch_size}'; give a whole number, or auto") from error


def main() -> None:
    """The command `lm_eval`, with the model registered; a user's mistake is one sentence."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except InputError as error:
        sys.stderr.write(f"Error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
