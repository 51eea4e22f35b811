"""A prompt among other system text, on coarser weights, and in a conversation of several turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlprompt.data.frames import frames
from rlprompt.data.situations import Dialogue, System
from rlprompt.engines.base import Engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import FrozenBase, freeze
from rlprompt.model.fingerprint import WRAPPERS
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.surroundings import NotApplicableError, surrounded
from rlprompt.prompts.text import NonePrompt
from rlprompt.types import Group, Query

_USER_TOKENS = 32
_SHOWN = 1200
"""Characters of a conversation that the simulated user is shown, its end."""


def among(prompt: Prompt, situation: System) -> Prompt:
    """A prompt with other system text around it; see `surrounded`.

    Args:
        prompt: the prompt; the base without one gets the other text alone.
        situation: the other text.

    Raises:
        NotApplicableError: a prompt of this kind cannot stand there.
    """
    return surrounded(prompt, situation.around((), 0))


def rounded(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Weights rounded to the nearest of 2^bits - 1 levels, symmetric about 0, per group of a row.

    Args:
        weight: [out, in] weights.
        bits: bits of a weight.
        group_size: weights of a row that share a scale; the last group of a row may be shorter.

    Returns:
        [out, in] in the same dtype.
    """
    rows, columns = weight.shape
    padding = -columns % group_size
    wide = nn.functional.pad(weight.float(), (0, padding)).view(rows, -1, group_size)
    most = 2 ** (bits - 1) - 1
    scale = wide.abs().amax(dim=-1, keepdim=True) / most
    levels = torch.where(scale > 0, wide / scale.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
    near = levels.round() * scale
    narrow: Tensor = near.view(rows, -1)[:, :columns].to(weight.dtype)
    return narrow


def quantised(policy: Policy, bits: int, group_size: int) -> Policy:
    """A policy over a copy of the base whose decoder's linear layers are rounded.

    Embeddings, norms and the LM head stay, as in common quantised checkpoints. The base itself is
    not touched; the copy needs its memory a second time.

    Args:
        policy: policy over the base.
        bits: bits of a weight.
        group_size: weights that share a scale.

    Raises:
        NotApplicableError: this rank holds only a part of the base.
    """
    base = policy.base
    if base.shards is not None:
        raise NotApplicableError("the base is cut up among ranks; evaluate it whole on one")
    names = {f"{name}.weight" for name in policy.linear_shapes}
    model = rebuilt(base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names:
                weight.copy_(rounded(weight, bits, group_size))
    coarse = replace(freeze(model, base.tokenizer, base.id), cpu_kernels=base.cpu_kernels)
    return Policy(coarse, policy.slot)


def rebuilt(base: FrozenBase) -> PreTrainedModel:
    """The base's model once more, with the same weights in memory of their own.

    A policy packs the layers of the model that it runs, so that one cannot be copied as it is.

    Args:
        base: the base, whole.

    Raises:
        NotApplicableError: the model cannot be made from its configuration.
    """
    kind: Any = type(base.model)
    model: PreTrainedModel = kind._from_config(copy.deepcopy(base.model.config), dtype=base.dtype)
    model.to(base.device)  # type: ignore[arg-type]
    own = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in base.model.state_dict().items()
        if isinstance(tensor, Tensor)
    }
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name not in own or own[name].shape != tensor.shape:
                raise NotApplicableError(
                    f"{base.id} cannot be built again from its configuration ({name} differs), so "
                    "its weights are not rounded; leave the situation out"
                )
            tensor.copy_(own[name])
    kept = dict(base.model.named_buffers())  # such as rotary frequencies, in no state dict
    for name, _ in list(model.named_buffers()):
        if name in kept:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._buffers[last] = kept[name].clone()
    model.generation_config = copy.deepcopy(base.model.generation_config)
    model.eval()
    return model


def dialogue(
    engine: Engine,
    prompt: Prompt,
    queries: Sequence[Query],
    settings: Dialogue,
    sampling: SamplingSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[Group]]:
    """Conversations with a simulated user, under a prompt.

    Args:
        engine: engine that draws for both sides.
        prompt: prompt of the assistant; the user is the base without one.
        queries: queries that the conversations begin with.
        settings: the turns that are kept, and who the user is.
        sampling: how the assistant's answers are drawn.
        seed: seed of all draws.
        progress: function that is called with tokens drawn and their limit.

    Returns:
        Turn -> one group of one completion per query, whose query is the conversation before it.
    """
    kept: dict[int, list[Group]] = {}
    present = list(queries)
    for turn in range(1, settings.turns[-1] + 1):
        engine.sync(prompt)
        groups = list(engine.generate(present, 1, sampling, seed + turn - 1, progress).groups)
        if turn in settings.turns:
            kept[turn] = groups
        if turn == settings.turns[-1]:
            break
        said = _next_turns(engine, groups, settings, seed + turn)
        present = [
            replace(
                group.query,
                messages=(
                    *group.query.messages,
                    {"role": "assistant", "content": group.completions[0].text.strip()},
                    {"role": "user", "content": text},
                ),
            )
            for group, text in zip(groups, said, strict=True)
        ]
    return kept


def _next_turns(
    engine: Engine, groups: Sequence[Group], settings: Dialogue, seed: int
) -> list[str]:
    """What the user says next in each conversation."""
    listed = frames()["follow_ups"]
    fallback = [listed[(seed + group.query.index) % len(listed)] for group in groups]
    if settings.user == "rules":
        return fallback
    asked = [
        Query(({"role": "user", "content": _user_question(g)},), index=i)
        for i, g in enumerate(groups)
    ]
    engine.sync(NonePrompt())
    draws = SamplingSettings(temperature=0.7, max_tokens=_USER_TOKENS)
    answers = [g.completions[0].text for g in engine.generate(asked, 1, draws, seed).groups]
    return [_spoken(text) or other for text, other in zip(answers, fallback, strict=True)]


def _user_question(group: Group) -> str:
    lines = [f"{m['role']}: {m['content']}" for m in group.query.messages]
    lines.append(f"assistant: {group.completions[0].text.strip()}")
    shown = "\n".join(lines)[-_SHOWN:]
    return (
        f"This is a conversation between a user and an assistant.\n\n{shown}\n\nWrite the short "
        "question that the user asks next, and nothing else."
    )


def _spoken(text: str) -> str:
    """The first line of what was written for the user, without a speaker's name."""
    line = next((each.strip() for each in text.splitlines() if each.strip()), "")
    return line.removeprefix("user:").removeprefix("User:").strip(" \"'")
