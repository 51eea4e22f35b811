"""The peer of rlprompt's rollout engine: transformers' `generate` on the bare base on CPU.

The batch is the one of a training step (4 queries x 8 completions, each query repeated, left
padding), weights and computation in bfloat16, KV cache on, plain sampling without truncation. The
number of new tokens is forced, so that every row works to the end.

    python -m benchmarks.peers.hf_generate --model DIR --queries FILE
        a worker (see `worker.py`): one line `{"cmd": "step"}` = one batch
    python -m benchmarks.peers.hf_generate --model DIR --queries FILE --repeats 5
        prints one JSON line with the median completion tokens per second
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.peers.worker import (
    CHATML_WITHOUT_DEFAULT,
    claim_stdout,
    conversation,
    environment,
    load_queries,
    measured,
    parse_settings,
    serve,
    setting,
    versions,
)


@dataclass(frozen=True)
class GenerateSettings:
    """Everything that decides what one batch costs; stated in every JSON."""

    model: str = field(metadata={"help": "Folder of the base model."})
    queries: str = field(metadata={"help": "JSONL of queries (field `query`), used in order."})
    num_queries: int = setting(4, "Queries per batch.")
    group_size: int = setting(8, "Completions per query.")
    new_tokens: int = setting(48, "Tokens of every completion, no more and no fewer.")
    temperature: float = setting(1.0, "Sampling temperature.")
    default_system: bool = setting(False, "Keep the system message that the template adds.")
    system_text: str = setting("", "System message of every query (the learned prompt's place).")
    seed: int = setting(0, "Sampling seed of the first batch.")
    threads: int = setting(0, "torch.set_num_threads; 0 leaves torch's choice.")
    repeats: int = setting(0, "Time this many batches after one warm-up; 0 = be a worker.")


class Generator:
    """A loaded base that samples one batch after another, walking through the queries."""

    def __init__(self, settings: GenerateSettings) -> None:
        """Load the base in bfloat16."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self._tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
        if not settings.default_system:
            self._tokenizer.chat_template = CHATML_WITHOUT_DEFAULT
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model.eval()
        self._queries = [row["query"] for row in load_queries(settings.queries)]
        self._config = GenerationConfig(
            max_new_tokens=settings.new_tokens,
            min_new_tokens=settings.new_tokens,
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=self._tokenizer.pad_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
        )
        self._batches = 0

    def describe(self) -> dict[str, Any]:
        """State every setting and version."""
        return {
            "peer": "transformers generate",
            "settings": asdict(self.settings),
            "dtype": str(self._model.dtype),
            "attention": self._model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "environment": environment(),
            "versions": versions("torch", "transformers"),
        }

    def batch(self) -> dict[str, Any]:
        """Sample one batch.

        Returns:
            `seconds` of generate alone (tokenising excluded), `tokens` (rows, query tokens without
            padding, completion tokens) and `tokens_per_second` (completion tokens).
        """
        settings = self.settings
        first = self._batches * settings.num_queries
        chosen = [
            self._queries[(first + i) % len(self._queries)] for i in range(settings.num_queries)
        ]
        chats = [
            conversation(query, settings.system_text)
            for query in chosen
            for _ in range(settings.group_size)
        ]
        inputs: Any = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(settings.seed + self._batches)
        self._batches += 1
        start = time.perf_counter()
        output = self._model.generate(**inputs, generation_config=self._config)
        seconds = time.perf_counter() - start
        completion_tokens = len(chats) * (output.shape[1] - inputs["input_ids"].shape[1])
        return {
            "seconds": seconds,
            "tokens": {
                "rows": len(chats),
                "query": int(inputs["attention_mask"].sum()),
                "completion": completion_tokens,
            },
            "tokens_per_second": completion_tokens / seconds,
        }


def median_tokens_per_second(settings: GenerateSettings) -> dict[str, Any]:
    """Time `settings.repeats` batches after one warm-up; `tokens_per_second` is their median."""
    generator = Generator(settings)
    generator.batch()
    batches = [measured(generator.batch) for _ in range(settings.repeats)]
    rate = statistics.median(batch["tokens_per_second"] for batch in batches)
    return {**generator.describe(), "tokens_per_second": rate, "batches": batches}


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run as worker or print one median."""
    settings = parse_settings(GenerateSettings, __doc__ or "", argv)
    out = claim_stdout()
    if settings.repeats:
        out.write(json.dumps(median_tokens_per_second(settings)) + "\n")
    else:
        generator = Generator(settings)
        serve(generator.batch, generator.describe(), out)


if __name__ == "__main__":
    main()
