"""Where GEPA's proposals come from: texts written beforehand, or a writer that reads feedback."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Protocol

from rlprompt.engines.base import Engine
from rlprompt.errors import InputError, shorten
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import Trial
from rlprompt.search.gepa_loop import Example
from rlprompt.search.writer import Writer, WriterSettings
from rlprompt.types import Completion, Query

logger = logging.getLogger(__name__)


class Proposer(Protocol):
    """What gives new texts."""

    @property
    def origin(self) -> str:
        """A word on how they are made, for `Candidate.origin`."""
        ...

    def __call__(self, parent: str, examples: Sequence[Example], number: int) -> str | None:
        """See `gepa_loop.Propose`."""
        ...


class Given:
    """Texts written beforehand, in their order."""

    origin = "given"

    def __init__(self, texts: Sequence[str]) -> None:
        """Propose `texts`."""
        self._texts = texts

    def __call__(self, parent: str, examples: Sequence[Example], number: int) -> str | None:
        """See `gepa_loop.Propose`."""
        return self._texts[number]


class Reflecting:
    """Asks a writer as GEPA asks its reflection model, and reads its answer as GEPA does."""

    origin = "reflection"

    def __init__(
        self,
        writer: Writer,
        settings: WriterSettings,
        template: str | None,
        seed: int,
        engine: Engine | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            writer: model that reflects.
            settings: settings of the writer, which say how its tokens are drawn.
            template: text of the request with GEPA's placeholders; None = GEPA's own.
            seed: seed of everything that is written.
            engine: engine that must be able to apply what is written; None = any text will do.
        """
        self._writer = writer
        self._settings = settings
        self._template = template
        self._seed = seed
        self._engine = engine

    def __call__(self, parent: str, examples: Sequence[Example], number: int) -> str | None:
        """See `gepa_loop.Propose`.

        Raises:
            InputError: the writer cannot be asked.
        """
        from gepa.strategies.instruction_proposal import InstructionProposalSignature

        request = InstructionProposalSignature.prompt_renderer(
            {
                "current_instruction_doc": parent,
                "dataset_with_feedback": [dict(example) for example in examples],
                "prompt_template": self._template,
            }
        )
        query = Query(({"role": "user", "content": str(request)},))
        seed = (self._seed * 1_000_003 + number * 7919 + 2) % 2**63
        try:
            (answer,) = self._writer.write([query], self._settings.sampling, seed)
        except InputError as error:
            raise InputError(f"GEPA's proposal {number} could not be written: {error}") from error
        found = InstructionProposalSignature.output_extractor(answer.strip())
        return self._usable(str(found["new_instruction"]).strip(), number)

    def _usable(self, text: str, number: int) -> str | None:
        """The text, where a prompt can be made of it; None is said in the log."""
        try:
            prompt = TextPrompt(text)
            if self._engine is not None:
                self._engine.sync(prompt)
        except InputError as error:
            logger.warning(
                "GEPA's proposal %d (%s) is not tried: %s", number, shorten(repr(text)), error
            )
            return None
        return text


def examples_of(trial: Trial) -> list[Example]:
    """A text's completions as GEPA shows them: query by query, with rewards and notes in words."""
    examples: list[Example] = []
    count = trial.rewards.shape[1]
    for place, group in enumerate(trial.groups):
        for draw, completion in enumerate(group.completions):
            row = place * count + draw
            examples.append(
                {
                    "Inputs": _conversation(group.query),
                    "Generated Outputs": completion.text,
                    "Feedback": _feedback(trial, row, completion),
                }
            )
    return examples


def _conversation(query: Query) -> str:
    if len(query.messages) == 1:
        return query.text
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in query.messages)


def _feedback(trial: Trial, row: int, completion: Completion) -> str:
    """Total, every reward by its name, and what rewards had to say."""
    said = [_number("Reward", float(trial.rewards.reshape(-1)[row]))]
    if len(trial.values) > 1:
        said += [_number(name, float(v.reshape(-1)[row])) for name, v in trial.values.items()]
    if not completion.terminated:
        said.append("The answer was too long and was cut off.")
    for name, column in trial.notes.items():
        note = column[row]
        if note is not None and str(note).strip():
            said.append(f"{name}: {str(note).strip()}")
    return "\n".join(said)


def _number(name: str, value: float) -> str:
    return f"{name}: could not be said" if math.isnan(value) else f"{name}: {value:.3g}"
