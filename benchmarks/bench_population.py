"""What it costs that the rows of a batch stand under 32 different prompts in place of one.

    python benchmarks/bench_population.py [--json FILE] [--prompts 32] [--tokens 32] [--rounds 5]

SmolLM2-135M in bf16; every prompt is a soft prompt of 16 embeddings. Each side decodes the same
rows (prompts x queries x completions), all of them to the last token, in one process and in turns,
one round after the other in changing order. Only decoding is counted: seconds of a call less those
of the same call with one token. A ratio is the median over rounds of tokens per second under many
prompts, divided by those under one in the same round.

    population_ratio                 against one prompt and as many groups of completions: each
                                     query stands there once per prompt
    population_ratio_wide_groups     against one prompt and each query once, with all its
                                     completions in one group
    population_ratio_with_prefill    as the first, whole calls: prefill of all prompts and of the
                                     one, and of the queries, counted in
    population_ratio_one_by_one      the whole call against one prompt after the other, in as many
                                     batches; --one-by-one, since it takes long
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.engines.base import Engine
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.types import Query

TEXT = "Answer every question in one short, complete and friendly sentence, and never ask back."
TEXTS = ("Why is the sky blue?", "Name a city.", "What is rain?", "How do I boil an egg?")
VIRTUAL_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """What is drawn under each prompt."""

    prompts: int
    queries: int
    completions: int
    tokens: int

    @property
    def rows(self) -> int:
        """Completions of all prompts."""
        return self.prompts * self.queries * self.completions


def population(policy: Policy, count: int) -> list[SoftPrompt]:
    """Prompts near one text, as a searcher asks for."""
    start = policy.embed((policy.slot_ids(TEXT) * VIRTUAL_TOKENS)[:VIRTUAL_TOKENS]).float()
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        moved = start + 0.1 * start.std() * torch.randn(start.shape, generator=generator)
        prompt = SoftPrompt(start)
        prompt.embeddings = nn.Parameter(moved)
        made.append(prompt)
    return made


def sides(policy: Policy, sizes: Sizes, one_by_one: bool) -> dict[str, Callable[[int], None]]:
    """Each side as a function of the number of tokens, prefill of its prompts included."""
    engine = NativeEngine(policy, NativeSettings(max_rows=max(256, sizes.rows), reuse_mib=0))
    prompts = population(policy, sizes.prompts)
    queries = [Query(({"role": "user", "content": text},)) for text in TEXTS[: sizes.queries]]

    def sampling(tokens: int) -> SamplingSettings:
        return SamplingSettings(max_tokens=tokens, min_tokens=tokens)

    def many(tokens: int) -> None:
        engine.generate_each(prompts, queries, sizes.completions, sampling(tokens), 0)

    def one(tokens: int) -> None:
        engine.sync(prompts[0])
        engine.generate(queries * sizes.prompts, sizes.completions, sampling(tokens), 0)

    def wide(tokens: int) -> None:
        engine.sync(prompts[0])
        engine.generate(queries, sizes.completions * sizes.prompts, sampling(tokens), 0)

    def apart(tokens: int) -> None:
        Engine.generate_each(engine, prompts, queries, sizes.completions, sampling(tokens), 0)

    found: dict[str, Callable[[int], None]] = {"many": many, "one": one, "wide": wide}
    return found | ({"apart": apart} if one_by_one else {})


def seconds(work: Callable[[int], None], tokens: int) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    work(tokens)
    return time.perf_counter() - start


def measured(
    work: dict[str, Callable[[int], None]], tokens: int, rounds: int
) -> list[dict[str, dict[str, float]]]:
    """Seconds of each side, round by round: the whole call, and what of it is decoding."""
    for each in work.values():  # kernels, packed weights, and what is chosen at the first call
        each(2)
    found = []
    for number in range(rounds):
        names = list(work) if number % 2 == 0 else list(work)[::-1]
        row = {}
        for name in names:
            begun = seconds(work[name], 1)
            whole = seconds(work[name], tokens)
            row[name] = {"whole": whole, "decode": whole - begun}
        found.append(row)
        print(f"round {number + 1}: {_shown(row)}", file=sys.stderr)
    return found


def _shown(row: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {each['decode']:.2f} s" for name, each in row.items())


def ratio(rounds: Sequence[dict[str, dict[str, float]]], other: str, part: str) -> float:
    """Median over rounds of another side's seconds by those of many prompts."""
    return statistics.median(row[other][part] / row["many"][part] for row in rounds)


def report(rounds: Sequence[dict[str, dict[str, float]]], sizes: Sizes) -> dict[str, object]:
    """Ratios, and tokens per second of each side."""
    decoded = sizes.rows * (sizes.tokens - 1)
    result: dict[str, object] = {
        "population_ratio": ratio(rounds, "one", "decode"),
        "population_ratio_wide_groups": ratio(rounds, "wide", "decode"),
        "population_ratio_with_prefill": ratio(rounds, "one", "whole"),
    }
    if "apart" in rounds[0]:
        result["population_ratio_one_by_one"] = ratio(rounds, "apart", "whole")
    for name in rounds[0]:
        median = statistics.median(row[name]["decode"] for row in rounds)
        result[f"tokens_per_second_{name}"] = decoded / median
    return result


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--prompts", type=int, default=32, help="prompts in the batch")
    parser.add_argument(
        "--queries", type=int, default=4, choices=range(1, len(TEXTS) + 1), help="for each prompt"
    )
    parser.add_argument("--completions", type=int, default=2, help="for each prompt and query")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that are counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one-by-one", action="store_true", help="also one prompt after the other")
    options = parser.parse_args()
    for name, least in {"prompts": 2, "completions": 1, "tokens": 2, "rounds": 1}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)}; give {least} or more")
    torch.set_num_threads(options.threads)
    sizes = Sizes(options.prompts, options.queries, options.completions, options.tokens)
    policy = open_policy(ModelSettings(dtype="bfloat16"))
    rounds = measured(sides(policy, sizes, options.one_by_one), sizes.tokens, options.rounds)
    result = report(rounds, sizes)
    for key, value in result.items():
        print(f"{key:32}{value:.3f}")
    if options.json:
        settings = {**vars(sizes), "rows": sizes.rows, "threads": options.threads}
        settings |= {"virtual_tokens": VIRTUAL_TOKENS, "kernels": policy.forward.cpp}
        result |= {"settings": settings, "rounds": list(rounds)}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
