"""Reward: the verdict of a causal language model, read off its probabilities.

The judge is the frozen base of the run under another prompt, or another model. The rubric is a
system message, so it is a shared prefix like every prompt here: its keys and values are computed
once. The verdict words are scored as completions of the question, so one forward gives
all their probabilities, nothing is sampled, and no second copy of the base is held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.policy import Policy
from rlprompt.prompts.text import TextPrompt
from rlprompt.rewards.models.classifier import resolve_model
from rlprompt.rewards.models.judge_question import ask_text, check_verdicts
from rlprompt.rewards.models.options import SignatureOf
from rlprompt.rewards.models.preference import scored_once
from rlprompt.rewards.models.score_cache import ScoreCache
from rlprompt.rewards.rules.text import message_texts
from rlprompt.settings import Settings
from rlprompt.types import Completion, PrefixKV, Query


class JudgeSettings(Settings):
    """Options of `builtin:judge`."""

    rubric: str = Field(min_length=1)
    """What is judged and how; the system message."""
    verdicts: dict[str, float] = Field(default_factory=lambda: {"Yes": 1.0, "No": 0.0})
    """The words among which the judge chooses, and the value of each."""
    model: ModelSettings | None = None
    """The judge; null = the run's own base, of which no second copy is loaded."""
    batch_queries: PositiveInt = 16
    """Questions per forward pass."""
    cache_size: int = Field(default=10_000, ge=0)
    """Verdicts that are kept; equal questions are asked once."""

    @model_validator(mode="after")
    def _check(self) -> JudgeSettings:
        check_verdicts(self.verdicts)
        return self


class _Form(NamedTuple):
    """One way to write a verdict."""

    word: str
    """The verdict, a key of `JudgeSettings.verdicts`."""
    completion: Completion
    """Its tokens."""


class JudgeReward:
    """The mean of the verdicts' values under the judge's probabilities of them.

    As in G-Eval (Liu et al. 2023, section 2), with probabilities in place of samples. Logs
    `judge/coverage`, the mean probability of all verdicts together: when it is low, the judge wants
    to say something else, and its values mean little.

    Raises:
        InputError: the judge cannot be loaded.
    """

    __signature__ = SignatureOf(JudgeSettings)

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.settings = JudgeSettings(**options)
        self._cache: ScoreCache[list[float]] = ScoreCache(self.settings.cache_size)
        self._prompt = TextPrompt(self.settings.rubric)
        self._policy: Policy | None = None
        self._prefix: PrefixKV | None = None
        if self.settings.model is not None:
            base = load_base(self.settings.model)
            slot = ChatSlot.from_tokenizer(base.tokenizer, self.settings.model.template)
            self._policy = Policy(base, slot)

    @staticmethod
    def resolve_paths(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
        """Options with paths relative to the recipe's folder made absolute."""
        model = options.get("model")
        if not isinstance(model, Mapping):
            return dict(options)
        return {**options, "model": resolve_model(model, base_dir)}

    def __reduce__(self) -> Any:
        return _remake, (self._options,)

    @property
    def needs_base(self) -> bool:
        """Whether it can only judge with the base of a run."""
        return self.settings.model is None

    def bind_policy(self, policy: Policy) -> None:
        """Judge with this policy's base, under the rubric; ignored by one with its own model."""
        if self.settings.model is None:
            self._policy, self._prefix = policy, None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any
    ) -> list[float]:
        """One value per completion.

        Raises:
            InputError: no model is named and nothing lent its base.
        """
        verdicts = list(self.settings.verdicts)
        questions = [
            ask_text(query, completion, verdicts)
            for query, completion in zip(
                message_texts(prompts), message_texts(completions), strict=True
            )
        ]
        table, _ = scored_once(self._cache, questions, self._ask)
        if table and "log_metric" in kwargs:
            kwargs["log_metric"]("judge/coverage", sum(row[1] for row in table) / len(table))
        return [row[0] for row in table]

    @torch.no_grad()
    def _ask(self, questions: Sequence[str]) -> tuple[Tensor, float]:
        """[n, 2] value and coverage of each question."""
        policy = self._judge()
        if self._prefix is None:
            self._prefix = policy.prefix(self._prompt)
        forms = self._forms(policy)
        weights = torch.tensor([self.settings.verdicts[form.word] for form in forms])
        rows = []
        for start in range(0, len(questions), self.settings.batch_queries):
            part = questions[start : start + self.settings.batch_queries]
            probabilities = self._probabilities(policy, self._prefix, part, forms)  # [n, F]
            coverage = probabilities.sum(dim=1)
            rows.append(torch.stack([probabilities @ weights / coverage, coverage], dim=1))
        return torch.cat(rows), 0.0

    def _probabilities(
        self,
        policy: Policy,
        prefix: PrefixKV,
        questions: Sequence[str],
        forms: Sequence[_Form],
    ) -> Tensor:
        queries = [Query(({"role": "user", "content": text},)) for text in questions]
        written = [[form.completion for form in forms]] * len(queries)
        tree = policy.tree(queries, written, prefix, self._prompt)
        scores = policy.logprobs(tree, prefix)
        total = scores.logprobs.double().sum(dim=1)  # [n * F], 0 in the padding
        return total.exp().view(len(queries), len(forms)).float().cpu()

    def _forms(self, policy: Policy) -> list[_Form]:
        """Each verdict as tokens, with and without a space before it."""
        tokenizer = policy.base.tokenizer
        forms: dict[tuple[int, ...], str] = {}
        for word in self.settings.verdicts:
            for text in (word.strip(), f" {word.strip()}"):
                ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
                forms.setdefault(ids, word)
        return [
            _Form(word, Completion(ids, (0.0,) * len(ids), word, True))
            for ids, word in forms.items()
        ]

    def _judge(self) -> Policy:
        if self._policy is None:
            raise InputError(
                "the judge has no model: outside a training run there is no base to lend; set the "
                "option model, such as {path: smollm2-135m}"
            )
        return self._policy


def _remake(options: dict[str, Any]) -> JudgeReward:
    return JudgeReward(**options)
