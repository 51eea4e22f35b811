"""The peer of the shared prefix: every row carries the prompt, as PEFT's prompt tuning does.

Forward and backward of the log-probabilities of given completions with respect to soft tokens that
stand in front of every row, through transformers' own forward (SDPA) in bfloat16. The LM head runs
on completion positions only, no weight has a gradient, and rows go through in micro-batches, so
what is left of the difference to rlprompt is that the prompt is computed once per row.

    python -m benchmarks.peers.carried --model DIR --queries FILE --reward NONE
        a worker (see `worker.py`): one line `{"cmd": "step"}` = one batch
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peers.worker import (
    CHATML_WITHOUT_DEFAULT,
    GrpoWork,
    claim_stdout,
    conversation,
    environment,
    load_queries,
    parse_settings,
    serve,
    setting,
    versions,
)


@dataclass(frozen=True)
class CarriedSettings(GrpoWork):
    """The shared work, and the size of a micro-batch."""

    micro_rows: int = setting(8, "Rows per forward and backward.")


class Learner:
    """A frozen base and one trainable prompt in front of every row."""

    def __init__(self, settings: CarriedSettings) -> None:
        """Load the base in bfloat16; the prompt is drawn like its embeddings."""
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self._tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
        self._tokenizer.chat_template = CHATML_WITHOUT_DEFAULT
        model = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        self._model = model.eval().requires_grad_(False)
        table = self._model.get_input_embeddings().weight
        torch.manual_seed(settings.seed)
        drawn = torch.randn(settings.num_virtual_tokens, table.shape[1]) * table.float().std()
        self.prompt = drawn.requires_grad_()
        self._queries = [row["query"] for row in load_queries(settings.queries)]

    def describe(self) -> dict[str, Any]:
        """State every setting and version."""
        return {
            "peer": "rows that carry the prompt, transformers forward",
            "settings": asdict(self.settings),
            "threads": torch.get_num_threads(),
            "environment": environment(),
            "versions": versions("torch", "transformers"),
        }

    def step(self) -> dict[str, Any]:
        """Forward and backward of all rows: `phases`, in seconds, and `tokens`."""
        settings = self.settings
        chats = [
            conversation(query)
            for query in self._queries[: settings.num_queries]
            for _ in range(settings.group_size)
        ]
        inputs: Any = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        self.prompt.grad = None
        spent = {"forward": 0.0, "backward": 0.0}
        for first in range(0, len(chats), settings.micro_rows):
            rows = slice(first, first + settings.micro_rows)
            start = time.perf_counter()
            loss = self._loss(inputs["input_ids"][rows], inputs["attention_mask"][rows])
            middle = time.perf_counter()
            loss.backward()
            spent["forward"] += middle - start
            spent["backward"] += time.perf_counter() - middle
        completion = len(chats) * settings.max_new_tokens
        width = settings.num_virtual_tokens + inputs["input_ids"].shape[1]
        return {
            "seconds": sum(spent.values()),
            "phases": spent,
            "tokens": {
                "rows": len(chats),
                "completion": completion,
                "forward_positions": len(chats) * width + completion,
            },
        }

    def _loss(self, query: Tensor, mask: Tensor) -> Tensor:
        """Minus the summed log-probabilities of drawn completions."""
        rows, length = len(query), self.settings.max_new_tokens
        completion = torch.randint(0, self._model.config.vocab_size, (rows, length))
        tokens = torch.cat([query, completion], dim=1)
        prompt = self.prompt.to(torch.bfloat16).expand(rows, -1, -1)
        embeds = torch.cat([prompt, self._model.get_input_embeddings()(tokens)], dim=1)
        ones = mask.new_ones(rows, 1)
        attends = torch.cat(
            [ones.expand(-1, prompt.shape[1]), mask, ones.expand(-1, length)], dim=1
        )
        logits = self._model(
            inputs_embeds=embeds,
            attention_mask=attends,
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
        chosen: Tensor = logits.float().log_softmax(-1).gather(-1, completion[..., None])
        return -chosen.sum()


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run as a worker."""
    settings = parse_settings(CarriedSettings, __doc__ or "", argv)
    out = claim_stdout()
    learner = Learner(settings)
    serve(learner.step, learner.describe(), out)


if __name__ == "__main__":
    main()
