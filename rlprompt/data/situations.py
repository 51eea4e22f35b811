"""Situations that a prompt is put into: what they do to a conversation, and to what is around it.

A situation is a pure function: of a conversation and a seed it makes another conversation
(`Situation.asked`), and it may ask for other system text around the prompt, other sampling, coarser
weights or further turns. Which frame or which typing errors a query meets depends on the seed and
on its own text alone, not on the queries beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlprompt.data.frames import PROMPT, QUERY, filled, frames, rows
from rlprompt.settings import ChosenSettings, Name, OneOf
from rlprompt.types import Message, Surroundings

if TYPE_CHECKING:  # engines stand on the data
    from rlprompt.engines.sampling import SamplingSettings

Conversation = Sequence[Message]
FrameList = Literal[
    "override",
    "injection",
    "role_play",
    "german",
    "french",
    "spanish",
    "jailbreak",
    "application",
]
"""Shipped lists whose entries hold `{query}`."""
PLAIN = "plain"
"""What the situation is called in which nothing is changed, which is always there."""


class Situation(ChosenSettings):
    """What the settings of every situation have."""

    name: Name | None = None
    """What the situation is called in results; by default its type."""

    @property
    def label(self) -> str:
        """Its name in results."""
        return self.name or self.type

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The conversation that is asked in place of another.

        Args:
            messages: turns of user and assistant, the user's last.
            seed: seed of what is drawn.
        """
        del seed
        return messages

    @property
    def places(self) -> Sequence[Surroundings]:
        """All that may stand beside the prompt in the system turn; empty = nothing does."""
        return ()

    def around(self, messages: Conversation, seed: int) -> Surroundings | None:
        """What stands beside the prompt in the system turn; None = nothing.

        Args:
            messages: turns of user and assistant, the user's last.
            seed: seed of what is drawn.
        """
        del messages, seed
        return None

    def sampled(self, sampling: SamplingSettings) -> SamplingSettings:
        """How answers are drawn.

        Args:
            sampling: settings of the plain situation.
        """
        return sampling


class System(Situation):
    """Other system text before or after the prompt, as a deployment puts it there."""

    type: Literal["system"] = "system"
    """Situation."""
    before: str = ""
    """Text before the prompt in the system turn; the base has it alone."""
    after: str = ""
    """Text behind the prompt in the system turn."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if not (self.before.strip() or self.after.strip()):
            raise ValueError("before and after are both blank; write a text in one of them")
        return self

    @property
    def places(self) -> Sequence[Surroundings]:
        """The two texts, without space at their ends."""
        return (Surroundings(self.before.strip(), self.after.strip()),)

    def around(self, messages: Conversation, seed: int) -> Surroundings:
        """The two texts."""
        del messages, seed
        return self.places[0]


class SystemFrame(Situation):
    """The prompt as a part of a sentence of instruction, such as "Please ..." or "You should ...".

    A soft prompt that also works inside of sentences has to mean something where words stand, so
    that the model can tell what it says. Training only: a prompt is used without a frame.
    """

    type: Literal["system_frame"] = "system_frame"
    """Situation."""
    texts: list[str] | None = Field(default=None, min_length=1)
    """Frames that each hold `{prompt}` once, in the place of the list that ships; the run's seed,
    step and query say which of them is taken."""

    @field_validator("texts")
    @classmethod
    def _hold_the_prompt(cls, value: list[str] | None) -> list[str] | None:
        for place, text in enumerate(value or ()):
            if text.count(PROMPT) != 1:
                raise ValueError(
                    f"texts[{place}] holds {{prompt}} {text.count(PROMPT)} times; write it in once"
                )
            if not text.replace(PROMPT, "").strip():
                raise ValueError(
                    f"texts[{place}] has nothing beside {{prompt}}; write words around it"
                )
        return value

    @property
    def places(self) -> Sequence[Surroundings]:
        """The two sides of each frame, without space at their ends."""
        known = frames()["instruction"] if self.texts is None else self.texts
        sides = [frame.split(PROMPT) for frame in known]
        return [Surroundings(a.strip(), b.strip(), is_frame=True) for a, b in sides]

    def around(self, messages: Conversation, seed: int) -> Surroundings:
        """The two sides of one of the frames."""
        return _draws(seed, messages[-1]["content"]).choice(self.places)


class Frame(Situation):
    """The user's last turn inside a sentence or two."""

    type: Literal["frame"] = "frame"
    """Situation."""
    frames: FrameList | None = None
    """A list that ships; the seed and the query say which of its frames is taken."""
    texts: list[str] | None = Field(default=None, min_length=1)
    """Frames of your own that hold `{query}`, in the place of a list."""

    @model_validator(mode="after")
    def _hold_the_query(self) -> Self:
        if (self.frames is None) == (self.texts is None):
            raise ValueError("exactly one of frames and texts must be given; name a list or write")
        for place, text in enumerate(self.texts or ()):
            if QUERY not in text:
                raise ValueError(f"texts[{place}] does not hold {{query}}; write it in")
        return self

    @property
    def label(self) -> str:
        """Its name, or that of its list."""
        return self.name or self.frames or self.type

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The last turn in one of the frames."""
        known = self.texts if self.frames is None else frames()[self.frames]
        assert known is not None  # the validator sees to it
        text = messages[-1]["content"]
        return _with_last(messages, filled(_draws(seed, text).choice(list(known)), text))


class Paraphrase(Situation):
    """The question in other words, by rules: an opening or ending, and common words exchanged.

    The rules keep the meaning and are few; it is no test of every wording.
    """

    type: Literal["paraphrase"] = "paraphrase"
    """Situation."""

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The last turn, said in another way."""
        text = messages[-1]["content"]
        frame = _draws(seed, text).choice(list(frames()["paraphrase"]))
        return _with_last(messages, filled(frame, _reworded(text)))


class Misspelt(Situation):
    """Typing errors: letters exchanged, left out, doubled, or hit beside the key."""

    type: Literal["misspelt"] = "misspelt"
    """Situation."""
    share: float = Field(default=0.25, gt=0.0, le=1.0)
    """Share of the words of four letters or more that get an error."""

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The last turn with errors; at least one where a word is long enough."""
        text = messages[-1]["content"]
        draws = _draws(seed, text)
        words = text.split(" ")
        long = [place for place, word in enumerate(words) if sum(map(str.isalpha, word)) >= 4]
        count = min(len(long), max(1, round(self.share * len(long))))
        for place in sorted(draws.sample(long, count)):
            words[place] = _mistyped(words[place], draws)
        return _with_last(messages, " ".join(words))


class LongContext(Situation):
    """Much other text in the user's turn before the question."""

    type: Literal["long_context"] = "long_context"
    """Situation."""
    words: int = Field(default=400, ge=10, le=1_000_000)
    """Words of other text, from neutral passages that ship with the package."""

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The last turn behind passages in an order of its own."""
        text = messages[-1]["content"]
        draws = _draws(seed, text)
        passages = [str(row["text"]).split() for row in rows("neutral")]
        filler: list[str] = []
        while len(filler) < self.words:
            draws.shuffle(passages)
            filler += [word for passage in passages for word in passage]
        before = " ".join(filler[: self.words])
        return _with_last(messages, f"These are my notes.\n\n{before}\n\nMy question is: {text}")


class Earlier(Situation):
    """The question after an earlier exchange about something else."""

    type: Literal["earlier"] = "earlier"
    """Situation."""
    turns: list[str] = Field(
        default=[
            "Hello, are you there?",
            "Yes, I am here. How can I help you?",
            "I have been reading all morning and need a break.",
            "That sounds like a good morning. A short walk may help.",
        ],
        min_length=2,
    )
    """What the user and the assistant said before, in turns, the user first and the assistant
    last."""

    @field_validator("turns")
    @classmethod
    def _end_with_the_assistant(cls, value: list[str]) -> list[str]:
        if len(value) % 2 or any(not turn.strip() for turn in value):
            raise ValueError(
                "turns must be texts of user and assistant in turns, an even number and none blank"
            )
        return value

    def asked(self, messages: Conversation, seed: int) -> Conversation:
        """The conversation behind the earlier turns."""
        del seed
        roles = ("user", "assistant")
        before = [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.turns)]
        return [*before, *messages]


class Sampling(Situation):
    """Answers that are drawn in another way."""

    type: Literal["sampling"] = "sampling"
    """Situation."""
    temperature: float | None = Field(default=None, ge=0.0, le=10.0)
    """Temperature, 0 for the most likely token; null = as in the plain situation."""
    top_k: int | None = Field(default=None, ge=1)
    """The k most likely tokens only; null = as in the plain situation."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus; null = as in the plain situation."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if self.temperature is None and self.top_k is None and self.top_p is None:
            raise ValueError("nothing is changed; set temperature, top_k or top_p")
        return self

    def sampled(self, sampling: SamplingSettings) -> SamplingSettings:
        """The settings with what is set here."""
        asked = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return sampling.model_copy(update={k: v for k, v in asked.items() if v is not None})


class Quantised(Situation):
    """Weights of the base's linear layers rounded to a few bits, group by group."""

    type: Literal["quantised"] = "quantised"
    """Situation."""
    bits: Literal[4, 8] = 8
    """Bits of a weight."""
    group_size: int = Field(default=64, ge=1)
    """Weights of a row that share a scale."""


class Dialogue(Situation):
    """Several turns with a simulated user; the answers of some turns are scored."""

    type: Literal["dialogue"] = "dialogue"
    """Situation."""
    turns: tuple[int, ...] = Field(default=(1, 3, 5), min_length=1)
    """Turns whose answers are scored, counted from 1, in ascending order."""
    user: Literal["base", "rules"] = "base"
    """Who writes what the user says next: the base without a system message, who is shown the
    conversation, or a list of short follow-ups that ships with the package. A small base writes
    poor users; one that writes nothing is replaced by the list for that turn."""
    queries: int | None = Field(default=None, ge=1)
    """Queries that dialogues begin with, the first ones; null = all."""

    @field_validator("turns")
    @classmethod
    def _ascend(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or value[0] < 1 or value[-1] > 50:
            raise ValueError("turns must be different numbers from 1 to 50 in ascending order")
        return value


SITUATIONS: dict[str, type[Situation]] = {
    "system": System,
    "frame": Frame,
    "paraphrase": Paraphrase,
    "misspelt": Misspelt,
    "long_context": LongContext,
    "earlier": Earlier,
    "sampling": Sampling,
    "quantised": Quantised,
    "dialogue": Dialogue,
}
"""By `type`."""

AnySituation = Annotated[Situation, OneOf(dict(SITUATIONS), is_extensible=False)]


def require_labels(labels: Sequence[str]) -> None:
    """Refuse names that results could not tell apart.

    Args:
        labels: names in results, in the order of their list.

    Raises:
        ValueError: two are equal, one is that of the plain situation, or holds a slash.
    """
    for place, label in enumerate(labels):
        if label in labels[:place] or label == PLAIN:
            raise ValueError(
                f"two are called '{label}'; give this one a name of its own (entry {place})"
            )
        if "/" in label:
            raise ValueError(f"the name '{label}' holds a slash; write it without")


_SWAPS = (
    ("What is", "What's"),
    ("How do I", "How can I"),
    ("How can I", "What is a way to"),
    ("Why is", "For what reason is"),
    ("Tell me", "Let me know"),
    ("Explain", "Make clear to me"),
    ("Give me", "I would like"),
    ("Write", "Please write"),
    ("Describe", "Give a description of"),
    ("Help me", "I need help to"),
)
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _draws(seed: int, text: str) -> random.Random:
    """Draws that depend on seed and text alone."""
    return random.Random(f"{seed}|{text}")


def _with_last(messages: Conversation, text: str) -> Conversation:
    return [*messages[:-1], {**messages[-1], "content": text}]


def _reworded(text: str) -> str:
    """The text with the first opening that is known exchanged."""
    for old, new in _SWAPS:
        if text.startswith(f"{old} "):
            return new + text[len(old) :]
    return text


def _mistyped(word: str, draws: random.Random) -> str:
    """The word with one typing error inside."""
    inner = [i for i in range(1, len(word) - 1) if word[i].isalpha() and word[i + 1].isalpha()]
    if not inner:
        return word
    at = draws.choice(inner)
    kind = draws.choice(("exchange", "omit", "double", "beside"))
    before, letter, after = word[:at], word[at], word[at + 1 :]
    if kind == "omit":
        return before + after
    if kind == "double":
        return before + letter * 2 + after
    row = next((keys for keys in _KEYS if letter.lower() in keys), None)
    if kind == "beside" and row is not None:
        place = row.index(letter.lower())
        return before + row[place - 1 if place else 1] + after
    return before + after[0] + letter + after[1:]
