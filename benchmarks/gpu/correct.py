"""Parts that compare results: log-probabilities, greedy tokens, training and its resumption."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import rlprompt
from benchmarks.gpu.world import World, require
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt, TextSettings
from rlprompt.runs.checkpoint import load_checkpoint
from rlprompt.types import Completion, Query

TEXTS = (
    "How do I sharpen a knife?",
    "Why is the sky blue?",
    "Name three rivers.",
    "What does a cell membrane do, and how?",
)
SYSTEM = "Answer the question in one short, complete sentence."
START = "Be brief"
"""One virtual token per byte, for which eight are enough."""
LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Mean absolute difference in nats, GPU against float32 on the CPU; bfloat16 rounds each layer."""
RUN_STEPS, FAILS_AT = 5, 3

REWARD = '''
"""The share of even token ids; once, it fails in the middle of a run."""

import os


def even(completion_ids, trainer_state=None, **columns):
    at = os.environ.get("GPU_CHECK_FAILS_AT")
    if at is not None and trainer_state is not None and trainer_state.global_step == int(at):
        raise RuntimeError("the machine fell over")
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]
'''


@contextmanager
def interpreted_attention() -> Iterator[None]:
    """Inside it attention goes through the Triton kernels on a CPU too, in the interpreter."""
    from rlprompt.model.forward import attention

    replaced: Any = attention
    before = replaced.uses_triton
    replaced.uses_triton = lambda *_: True
    try:
        yield
    finally:
        replaced.uses_triton = before


def queries(count: int = len(TEXTS)) -> list[Query]:
    """Conversations of one turn; texts repeat when more are asked for."""
    chosen = [TEXTS[i % len(TEXTS)] for i in range(count)]
    return [Query(({"role": "user", "content": text},), index=i) for i, text in enumerate(chosen)]


def _open(folder: Path, device: torch.device, dtype: str) -> Policy:
    given = {"path": str(folder), "device": str(device), "dtype": dtype, "cpu_kernels": "off"}
    return open_policy(ModelSettings.model_validate(given))


def _scored(policy: Policy, drawn: list[Any]) -> list[torch.Tensor]:
    """Log-probabilities of given completions, and the gradient of their mean in the prompt."""
    policy.prompt = SoftPrompt.create(
        SoftSettings(num_virtual_tokens=8, init_text=START), policy, 0
    )
    shared = policy.shared_prefix()
    tree = policy.tree(queries(len(drawn)), drawn, shared.leaves)
    scores = policy.logprobs(tree, shared.leaves)
    (scores.logprobs.sum() / scores.mask.sum()).backward()
    policy.finish_prefix(shared)
    (parameter,) = policy.parameters()
    assert parameter.grad is not None
    return [t.detach().float().cpu() for t in (scores.logprobs, scores.mask, parameter.grad)]


def agreement(world: World) -> dict[str, Any]:
    """Log-probabilities and a gradient against the CPU; greedy tokens against HF generate."""
    world.require_device()
    figures: dict[str, Any] = {}
    tokens = 4 if world.dry_run else 64
    folder = world.folder()
    exact = _open(folder, torch.device("cpu"), "float32")
    generator = torch.Generator().manual_seed(0)
    size = len(exact.base.tokenizer)
    drawn = []
    for _ in range(1 if world.dry_run else len(TEXTS)):  # the interpreter takes its time
        ids = torch.randint(3, size, (2, tokens), generator=generator).tolist()
        drawn.append([Completion(tuple(row), (-1.0,) * tokens, "", False) for row in ids])
    truth, mask, gradient = _scored(exact, drawn)
    holds: dict[str, bool] = {}
    dtypes = (torch.float32,) if world.dry_run else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        policy = _open(folder, world.device, name)
        with interpreted_attention() if world.dry_run else nullcontext():
            given, _, moved = _scored(policy, drawn)
        gap = float((given - truth).abs().sum() / mask.sum())
        cosine = float(torch.cosine_similarity(moved.flatten(), gradient.flatten(), 0))
        figures[f"logprob_gap_{name}"], figures[f"gradient_cosine_{name}"] = gap, cosine
        holds[f"log-probabilities in {name}"] = gap < LOGPROB_TOLERANCE[dtype]
        holds[f"gradient in {name}"] = cosine > (0.999 if dtype == torch.float32 else 0.9)
        del policy
    texts = TEXTS[:1] if world.dry_run else TEXTS
    same = _greedy(world, folder, tokens, texts)
    figures |= {"greedy_tokens": tokens, "greedy_equal_float32": same}
    holds["greedy tokens equal to transformers.generate"] = same == tokens * len(texts)
    return require(figures, **holds)


def _greedy(world: World, folder: Path, tokens: int, texts: Sequence[str]) -> int:
    """How many greedy tokens are those of `generate`, counted up to each row's first difference."""
    policy = _open(folder, world.device, "float32")
    policy.prompt = TextPrompt.create(TextSettings(text=SYSTEM), policy, 0)
    engine = NativeEngine(policy)
    engine.sync(policy.prompt)
    sampling = SamplingSettings(temperature=0.0, max_tokens=tokens, min_tokens=tokens)
    with interpreted_attention() if world.dry_run else nullcontext():
        groups = engine.generate(queries(len(texts)), 1, sampling, 0).groups
    ours = [group.completions[0].token_ids for group in groups]
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.to(world.device)
    tokenizer, equal = policy.base.tokenizer, 0
    for text, mine in zip(texts, ours, strict=True):
        chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        inputs: Any = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        inputs = inputs.to(world.device)
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        theirs = out[0, inputs["input_ids"].shape[1] :].tolist()
        pairs = list(zip(mine, theirs, strict=True))
        equal += next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return equal


def training(world: World) -> dict[str, Any]:
    """Five GRPO steps on two representations; one of the runs fails, resumes and ends alike."""
    world.require_device()
    folder, reward = world.folder(), world.scratch / "rewards.py"
    reward.write_text(REWARD, encoding="utf-8")
    figures: dict[str, Any] = {}
    holds: dict[str, bool] = {}
    for kind in ("soft", "prefix"):
        run = _train(world, kind, folder, world.scratch / kind)
        figures[kind] = {"steps": run.metrics.steps, "seconds": run.metrics.seconds}
        figures[kind] |= {"start": run.metrics.base, "learned": run.metrics.learned}
        holds[f"{kind}: five steps"] = run.metrics.steps == RUN_STEPS
    broken = world.scratch / "broken"
    os.environ["GPU_CHECK_FAILS_AT"] = str(FAILS_AT)
    failed = ""
    try:
        _train(world, "soft", folder, broken)
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    finally:
        del os.environ["GPU_CHECK_FAILS_AT"]
    figures["failure"] = failed
    _train(world, "soft", folder, broken, resume=True)
    whole, resumed = (_weights(world.scratch / name) for name in ("soft", "broken"))
    gap = max(float((whole[key] - resumed[key]).abs().max()) for key in whole if key in resumed)
    figures["resumed_largest_difference"] = gap
    holds["the run fails where it should"] = "fell over" in failed
    holds["a resumed run has the same tensors"] = whole.keys() == resumed.keys()
    holds["a resumed run equals one that was never stopped"] = gap == 0.0
    return require(figures, **holds)


def _train(world: World, kind: str, folder: Path, output: Path, resume: bool = False) -> Any:
    short = 6 if world.dry_run else 32
    return rlprompt.train(
        {
            "name": "gpu_check",
            "model": {"path": str(folder), "device": str(world.device)},
            "prompt": {"type": kind, "num_virtual_tokens": 8, "init_text": START},
            "algorithm": {"type": "grpo", "group_size": 4},
            "sampling": {"max_tokens": short},
            "data": {"rows": list(TEXTS), "heldout": 1},
            "rewards": [{"path": f"{world.scratch / 'rewards.py'}:even", "name": "even"}],
            "training": {"steps": RUN_STEPS, "queries_per_step": 2, "save_every": 1},
            "evaluation": {"every": RUN_STEPS},
            "tracking": {"trackers": ["jsonl"]},
        },
        output=output,
        resume=resume,
        progress=False,
    )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Prompt and optimizer after the last step of a run."""
    return dict(load_checkpoint(folder / "checkpoints", RUN_STEPS).tensors)
