"""Which of a few answers a frozen base finds likely under a hand-written system message.

    python experiments/probe_text.py --data recipes/data/topics.jsonl --column label \
        --answers sports=Sports food=Food technology=Technology travel=Travel money=Money \
        --text "Name the topic in one word."

Before training: can the base tell the rows apart at all (`right`), and would it ever say so
(`probability`)? GRPO can raise a small probability, but not add knowledge that is not there. For
every held-out row the log-probability of each whole answer as the assistant's turn is taken;
`right` is how many rows find the answer of their column likeliest.

With one answer, such as a refusal, its mean log-probability for each value of the column is
printed, and the chance that a row of the first value finds it likelier than one of the second
(AUC).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.model.files.fetch import fetch


class Answer(NamedTuple):
    """One of the answers, and what its rows hold in the column."""

    name: str
    text: str


class AnswerScorer:
    """The base and its tokenizer."""

    def __init__(self) -> None:
        """Load the embedded model."""
        folder = fetch("smollm2-135m")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    @torch.no_grad()
    def logprob(self, system: str, query: str, answer: str) -> float:
        """Log-probability of the whole answer, in nats."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": query})
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        before = self.tokenizer(text).input_ids
        ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        logits = self.model(torch.tensor([before + ids]), logits_to_keep=len(ids) + 1).logits
        logprobs = logits[0, :-1].float().log_softmax(-1)
        return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())


def main() -> None:
    """Print one line per text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--column", required=True, help="column with the right answer's name")
    parser.add_argument("--answers", nargs="+", required=True, help="NAME=TEXT, or one TEXT")
    parser.add_argument("--text", action="append", default=[], help="a system message; several")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in options.data.open(encoding="utf-8")]
    rows = [row for row in rows if row["split"] == "validation"]
    names = [row[options.column] for row in rows]
    answers = [
        Answer(name, text or name)
        for name, _, text in (each.partition("=") for each in options.answers)
    ]
    scorer = AnswerScorer()
    for text in options.text or [""]:
        text = text.replace("\\n", "\n")
        scores = torch.tensor(
            [[scorer.logprob(text, row["query"], each.text) for each in answers] for row in rows]
        )
        line = (
            one_answer(scores[:, 0], names)
            if len(answers) == 1
            else several(scores, names, [each.name for each in answers])
        )
        print(f"{line}  {text[:60]!r}", flush=True)


def several(scores: torch.Tensor, names: list[str], answers: list[str]) -> str:
    """How many rows are right, and the total probability; scores [rows, answers]."""
    found = [answers[i] for i in scores.argmax(1).tolist()]
    right = sum(a == b for a, b in zip(found, names, strict=True))
    total = scores.exp().sum(1).mean().item()
    return f"right {right}/{len(names)}  probability {total:.4f}  {dict(Counter(found))}"


def one_answer(scores: torch.Tensor, names: list[str]) -> str:
    """Mean log-probability by value of the column, and the AUC; scores [rows]."""
    values = sorted(set(names), reverse=True)
    parts = [scores[torch.tensor([name == value for name in names])] for value in values]
    means = ", ".join(
        f"{value} {part.mean():.1f}" for value, part in zip(values, parts, strict=True)
    )
    auc = (parts[0][:, None] > parts[1][None]).float().mean().item()
    return f"log-probability {means}  AUC {auc:.2f}"


if __name__ == "__main__":
    main()
