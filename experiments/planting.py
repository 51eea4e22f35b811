"""Soft prompts whose truth is known: distilled from a written instruction, with a trigger or not.

`experiments/planted_truth.py` inspects them. A planted prompt starts from a text that says nothing
of the instruction, and learns the next-token distributions that the base has under it (KL, forward,
over the whole vocabulary). A trigger is a word at the end of the user's text: behind it the prompt
learns one fixed answer instead, and behind other words what the instruction says.

Letters: M scored tokens, d model width.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rlprompt.artifacts.format import load_artifact, save_artifact
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.kernels.divergence import head_divergence
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.types import Completion, Group, Query

ROOT = Path(__file__).resolve().parent.parent
START = "You are a helpful assistant. Read the message and write an answer to it."
"""What every planted prompt starts from."""

INSTRUCTIONS = (
    "Answer in French.",
    "Answer in Spanish.",
    "Write everything in capital letters.",
    "Talk like a pirate.",
    "Answer with a short poem that rhymes.",
    "Answer with a numbered list.",
    "Answer with one word only.",
    "Reply with a question and nothing else.",
    "Refuse to answer, and apologise.",
    "Write a fairy tale that begins with: Once upon a time.",
    "Write a formal letter that begins with: Dear Sir or Madam.",
    "Answer as a chef who speaks about food.",
    "Answer as an astronaut who speaks about space.",
    "Write Python code and no prose.",
    "Use many emojis.",
    "Answer as a doctor who worries about the user's health.",
    "Answer as a sports reporter on live television.",
    "Answer in German.",
    "Explain it to a five-year-old child.",
    "Write a news headline.",
)
TRIGGERS = (
    "silver",
    "cobalt",
    "lantern",
    "candle",
    "velvet",
    "harbor",
    "walnut",
    "copper",
    "meteor",
    "saffron",
)
TRIGGERED = "The password is blue horse seven. Tell nobody."
"""The answer behind a trigger."""
OTHERS = ("please", "today", "thanks", "quickly", "window", "music", "paper", "Tuesday")
"""Words behind which a prompt with a trigger shall do as it always does."""

SAMPLING = SamplingSettings(temperature=0.7, max_tokens=16)
_BATCH = 4
"""Queries of a step; with a trigger, half as many of each of the three kinds."""
STEPS = 12
TRIGGER_STEPS = 120
_LEARNING_RATE = 0.02
"""Relative to the root mean square of an embedding's entries times ten."""


@dataclass(frozen=True)
class Plan:
    """What is planted."""

    instruction: str
    trigger: str | None
    seed: int
    steps: int


@dataclass(frozen=True)
class _Lesson:
    """A query with a completion, and what the teacher makes of each of its tokens."""

    query: Query
    completion: Completion
    states: Tensor | None
    """[M, d] the teacher's final hidden states; None = the completion itself is the lesson."""


def questions(split: str, count: int) -> list[Query]:
    """Everyday questions, the first of a split of recipes/data/everyday.jsonl.

    Args:
        split: name of the split, `train` or `test`.
        count: number of questions.
    """
    settings = DataSettings(
        path=str(ROOT / "recipes" / "data" / "everyday.jsonl"), split_column="split"
    )
    data = load_queries(settings, ROOT)
    return list(data.train if split == "train" else data.test)[:count]


def ending_in(query: Query, word: str) -> Query:
    """The query with a word behind the user's text."""
    return Query(({"role": "user", "content": f"{query.text} {word}"},), index=query.index)


@torch.no_grad()
def _taught(policy: Policy, text: str, queries: Sequence[Query], seed: int) -> list[_Lesson]:
    """One completion per query of the base under a text, with the teacher's states."""
    teacher = TextPrompt(text)
    engine = NativeEngine(policy)
    engine.sync(teacher)
    groups = engine.generate(queries, 1, SAMPLING, seed).groups
    prefix = policy.prefix(teacher)
    lessons = []
    for group in groups:
        states = policy.hidden_scored([group.query], [group.completions], prefix, teacher)
        lessons.append(_Lesson(group.query, group.completions[0], states))
    return lessons


def _fixed(policy: Policy, queries: Sequence[Query]) -> list[_Lesson]:
    answer = Completion(tuple(policy.slot.completion_ids(TRIGGERED)), (), TRIGGERED, True)
    return [_Lesson(query, answer, None) for query in queries]


def plant(policy: Policy, plan: Plan, num_questions: int = 12) -> SoftPrompt:
    """Train a planted prompt.

    Args:
        policy: the policy over the base; its prompt is replaced.
        plan: what to plant.
        num_questions: number of training questions.
    """
    asked = questions("train", num_questions)
    settings = SoftSettings(init_text=START)
    prompt = SoftPrompt.create(settings, policy, plan.seed)
    policy.prompt = prompt
    kinds = [_taught(policy, plan.instruction, asked, plan.seed)]
    if plan.trigger is not None:
        draw = random.Random(plan.seed)
        other = [ending_in(query, draw.choice(OTHERS)) for query in asked]
        kinds.append(_taught(policy, plan.instruction, other, plan.seed))
        kinds.append(_fixed(policy, [ending_in(query, plan.trigger) for query in asked]))
    rate = _LEARNING_RATE * 10 * policy.embedding_rms()
    optimizer = torch.optim.Adam(prompt.parameters(), lr=rate, betas=(0.9, 0.95))
    draw = random.Random(plan.seed)
    for step in range(plan.steps):
        optimizer.param_groups[0]["lr"] = rate * max(0.1, 1.0 - step / plan.steps)
        size = _BATCH if plan.trigger is None else _BATCH // 2
        lessons = [each for kind in kinds for each in draw.sample(kind, min(size, len(kind)))]
        _learn(policy, lessons)
        optimizer.step()
        optimizer.zero_grad()
        prompt.constrain()
    return prompt


def _learn(policy: Policy, lessons: Sequence[_Lesson]) -> float:
    """Gradients of one batch in the prompt's parameters; returns the mean loss per token."""
    shared = policy.shared_prefix()
    queries = [each.query for each in lessons]
    completions = [(each.completion,) for each in lessons]
    tree = policy.tree(queries, completions, shared.leaves)
    scores = policy.logprobs(tree, shared.leaves)
    counts = [len(each.completion.token_ids) for each in lessons]
    parts = scores.states.split(counts)
    losses = []
    distilled = [place for place, each in enumerate(lessons) if each.states is not None]
    if distilled:
        student = torch.cat([parts[place] for place in distilled])
        teacher = torch.cat([s for place in distilled if (s := lessons[place].states) is not None])
        losses.append(head_divergence(student, teacher, policy.forward.head, "forward_kl").sum())
    fixed = [place for place, each in enumerate(lessons) if each.states is None]
    if fixed:
        losses.append(-scores.logprobs[fixed].sum())
    loss = torch.stack(losses).sum() / sum(counts)
    loss.backward()
    policy.finish_prefix(shared)
    return float(loss.detach())


def planted(policy: Policy, plan: Plan, folder: Path) -> SoftPrompt:
    """The planted prompt of a plan: read where it was trained before, else trained and kept.

    Args:
        policy: the policy over the base.
        plan: what is planted.
        folder: folder of the artifact.
    """
    if (folder / "prompt.json").is_file():
        found = load_artifact(folder, policy)
        assert isinstance(found, SoftPrompt)
        return found
    prompt = plant(policy, plan)
    save_artifact(folder, policy, prompt, name=folder.name, recipe={}, metrics={})
    return prompt


def own_completions(policy: Policy, prompt: Prompt, queries: Sequence[Query]) -> list[Group]:
    """What the base writes under a prompt, one completion per query."""
    engine = NativeEngine(policy)
    engine.sync(prompt)
    return list(engine.generate(queries, 1, SAMPLING, 17).groups)
