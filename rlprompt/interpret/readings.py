"""What the model says a prompt tells it: many readings, in frames that ask for it.

Two kinds of frames. In its own place, the prompt stands in the system slot and the user asks what
it says; that works for every kind of prompt. Quoted, its vectors stand in the user's text; that
works for what is vectors. A reading is a guess of the model about itself, and is measured before
anything is said of it (`interpret.sentences`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.interpret.clock import Slice
from rlprompt.interpret.derived import BegunPrompt, first_ids, quoted, vectors_of
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.types import Query

LONGEST = 240
"""Characters of a reading that is kept."""
_SHORTEST = 6
_READING = SamplingSettings(temperature=0.7, max_tokens=28)


@dataclass(frozen=True)
class Frame:
    """A question that makes the model say what a prompt tells it."""

    name: str
    question: str
    """What the user says; with `{}`, the prompt's vectors stand there, else in the system slot."""
    first: str
    """What the answer begins with."""
    keeps: str = ""
    """What a sentence made of the answer begins with, in place of `first`."""


FRAMES = (
    Frame("repeat", "Repeat the instruction above, word for word.", "The instruction above is:"),
    Frame("rule", "In one sentence, which rule do you follow?", "In one sentence, the rule is:"),
    Frame("told", "What were you told to do when somebody writes to you?", "I was told to"),
    Frame("must", "How must you answer here?", "Here I must always", "Always"),
    Frame("style", "Describe the style of your answers.", "My answers are", "Your answers are"),
    Frame("quoted", "Instruction: {}\nSay the instruction in other words.", "In other words:"),
    Frame("meaning", "What does this ask for?\n\n{}", "It asks you to"),
    Frame(
        "note", "A note on the desk reads: {}\nWhat does it tell the reader to do?", "It says to"
    ),
)


@dataclass(frozen=True)
class Reading:
    """One answer, as a sentence that could stand in the system slot."""

    text: str
    frame: str
    """Name of its frame."""


def read(policy: Policy, prompt: Prompt, *, copies: int, seed: int, time: Slice) -> list[Reading]:
    """Readings of a prompt in every frame that its kind allows; equal ones once.

    Args:
        policy: the policy over the base.
        prompt: the prompt.
        copies: number of readings of each frame.
        seed: seed of the draws.
        time: time that there is; at least one frame is read.
    """
    engine = NativeEngine(policy)
    found: dict[str, Reading] = {}
    for place, frame in enumerate(FRAMES):
        if place and time.is_over:
            break
        framed = _framed(policy, prompt, frame)
        if framed is None:
            continue
        query = Query(({"role": "user", "content": frame.question},))
        try:
            engine.sync(framed)
            drawn = engine.generate([query], copies, _READING, seed + place).groups[0]
        except InputError:
            continue  # a long prompt leaves no room for this frame; `of_frames` counts none
        for completion in drawn.completions:
            text = sentence(frame, completion.text)
            if text:
                found.setdefault(text.casefold(), Reading(text, frame.name))
    return list(found.values())


def _framed(policy: Policy, prompt: Prompt, frame: Frame) -> Prompt | None:
    """The prompt as a frame shows it; None where its kind cannot be shown so."""
    if "{}" not in frame.question:
        return BegunPrompt(prompt, first_ids(policy, frame.first))
    vectors = vectors_of(policy, prompt)
    return None if vectors is None else quoted(policy, vectors, frame.question, frame.first)


def sentence(frame: Frame, written: str) -> str:
    """A model's answer as one or two sentences for the system slot; empty where it is none.

    Args:
        frame: the frame that it answers.
        written: what the model wrote behind `Frame.first`.
    """
    text = " ".join(written.replace("\ufffd", " ").split("\n\n")[0].split())
    text = text.strip(" \"'`*:\u201c\u201d-")
    parts = re.split(r"(?<=[.!?])\s+", text)
    if len(parts) > 1 and not re.search(r"[.!?]$", parts[-1]):
        parts = parts[:-1]  # the token limit has cut it
    text = " ".join(parts[:2])[:LONGEST].strip(" \"'`*")
    if frame.keeps:
        text = f"{frame.keeps} {text}"
    if len(text) < _SHORTEST or not re.search(r"\w{2}", text):
        return ""
    text = text[0].upper() + text[1:]
    return text if re.search(r"[.!?]$", text) else f"{text}."


def of_frames(readings: Sequence[Reading]) -> dict[str, int]:
    """How many readings each frame gave.

    Args:
        readings: the readings.
    """
    counts = {frame.name: 0 for frame in FRAMES}
    for each in readings:
        counts[each.frame] += 1
    return counts
