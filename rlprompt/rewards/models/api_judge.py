"""Reward: the verdict of a language model behind an OpenAI-compatible server.

The judge is asked for one of a few verdicts. With `logprobs` the value is the mean of the verdicts'
values under the judge's own probabilities of them as its first token (as in G-Eval, Liu et al.
2023, section 2): finer than the verdict that it happens to write, and without sampling noise.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from rlprompt.rewards.base import ReportedError
from rlprompt.rewards.models.http_client import HttpSettings, JsonClient, together
from rlprompt.rewards.models.judge_question import ask_text, check_verdicts
from rlprompt.rewards.models.options import SignatureOf
from rlprompt.rewards.models.score_cache import ScoreCache, content_key
from rlprompt.rewards.rules.text import message_text


class JudgeSettings(HttpSettings):
    """Options of `builtin:openai_judge`."""

    model: str
    """The model's name on the server."""
    rubric: str
    """What is judged and how; the system message."""
    verdicts: dict[str, float] = Field(default_factory=lambda: {"Yes": 1.0, "No": 0.0})
    """The words among which the judge chooses, and the value of each."""
    logprobs: bool = True
    """Ask for token probabilities; false reads the word that the judge writes, for servers that
    give none."""
    max_tokens: int = Field(default=4, ge=1)
    """Longest text that the judge may write."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further keys of each request, such as a server's own options."""
    cache_size: int = Field(default=10_000, ge=0)
    """Verdicts that are kept; equal questions are asked once."""

    @model_validator(mode="after")
    def _check_verdicts(self) -> JudgeSettings:
        check_verdicts(self.verdicts)
        return self


class OpenAIJudge:
    """Asks a judge for each completion; see `JudgeSettings` for its options.

    Logs `judge/coverage`, the judge's mean probability of all verdicts together: when it is low,
    the judge wants to say something else, and its values mean little.

    Raises:
        InputError: see `JsonClient`.
    """

    on_first_rank = True
    """`concurrency` is that of the run: several ranks would ask so often each."""
    __signature__ = SignatureOf(JudgeSettings)

    def __init__(self, **options: Any) -> None:
        self.settings = JudgeSettings(**options)
        self._client = JsonClient(self.settings)
        self._cache: ScoreCache[tuple[float, float]] = ScoreCache(self.settings.cache_size)

    def __reduce__(self) -> Any:
        return _remake, (self.settings.model_dump(),)

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float | None]:
        """The verdict's value per completion; None where the judge gave no verdict.

        Raises:
            ReportedError: the server gave no usable answer.
        """
        bodies = [
            self._body(message_text(prompt), message_text(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        keys = [content_key(body) for body in bodies]
        gate = asyncio.Semaphore(self.settings.concurrency)
        found = {key: self._cache.get(key) for key in keys}
        wanted = {key: body for key, body in zip(keys, bodies, strict=True) if found[key] is None}

        async def ask(key: bytes, body: Mapping[str, Any]) -> None:
            async with gate:
                found[key] = self._verdict(await self._client.post(body, "/chat/completions"))

        await together(ask(key, body) for key, body in wanted.items())
        verdicts = [found[key] or (math.nan, 0.0) for key in keys]
        for key, verdict in zip(keys, verdicts, strict=True):
            self._cache.put(key, verdict)
        if "log_metric" in kwargs and verdicts:
            kwargs["log_metric"]("judge/coverage", sum(c for _, c in verdicts) / len(verdicts))
        return [None if math.isnan(value) else value for value, _ in verdicts]

    def _body(self, query: str, completion: str) -> dict[str, Any]:
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [
                {"role": "system", "content": settings.rubric},
                {"role": "user", "content": ask_text(query, completion, list(settings.verdicts))},
            ],
            "temperature": 0,
            "max_tokens": settings.max_tokens,
        }
        if settings.logprobs:
            body |= {"logprobs": True, "top_logprobs": 20}
        return body | settings.extra_body

    def _verdict(self, answer: Any) -> tuple[float, float]:
        """Value (NaN = no verdict) and coverage of one answer."""
        try:
            choice = answer["choices"][0]
            if not self.settings.logprobs:
                return self._written(str(choice["message"]["content"] or ""))
            top = choice["logprobs"]["content"][0]["top_logprobs"]
            pairs = [(str(each["token"]), math.exp(min(0.0, each["logprob"]))) for each in top]
        except (KeyError, IndexError, TypeError) as error:
            raise ReportedError(
                f"got {self._client.quoted(answer)} from {self._client.shown}, which holds no "
                f"{'token probabilities' if self.settings.logprobs else 'answer'}",
                "set logprobs: false if the server gives none, or check the url and the model",
                "values",
            ) from error
        weights = dict.fromkeys(self.settings.verdicts, 0.0)
        for token, probability in pairs:
            verdict = self._starts(token)
            if verdict is not None:
                weights[verdict] += probability
        total = sum(weights.values())
        if total == 0.0:
            return math.nan, 0.0
        values = self.settings.verdicts
        return sum(values[word] * weight for word, weight in weights.items()) / total, total

    def _starts(self, token: str) -> str | None:
        """The one verdict that a token says or begins, if there is just one."""
        said = token.strip().casefold()
        whole = [word for word in self.settings.verdicts if word.strip().casefold() == said]
        begun = [
            word for word in self.settings.verdicts if word.strip().casefold().startswith(said)
        ]
        matches = whole or begun
        return matches[0] if said and len(matches) == 1 else None

    def _written(self, text: str) -> tuple[float, float]:
        first = re.match(r"[\W_]*([\w.+-]+)", text)
        for word, value in self.settings.verdicts.items():
            if first is not None and first[1].rstrip(".").casefold() == word.strip().casefold():
                return value, 1.0
        return math.nan, 0.0


def _remake(options: dict[str, Any]) -> OpenAIJudge:
    return OpenAIJudge(**options)
