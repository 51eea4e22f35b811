"""Targets for supervised prompt tuning, and pairs for preference optimisation.

    python experiments/make_targets.py

writes beside the query sets, row by row:

- `recipes/data/everyday_targets.jsonl`: `completion` is the hand-written answer of
  `everyday_answers.txt`, line by line; `rejected` is what the base tends to write, made by rule: an
  opening that says nothing, a remark that says little, and the answer cut off after two thirds;
- `recipes/data/topics_targets.jsonl`: `completion` is the label, `rejected` the next label of the
  list in one row, and a sentence around the right label in the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data"
LABELS = ("sports", "food", "technology", "travel", "money")
OPENINGS = (
    "That is a great question, and I am happy to help you with it today.",
    "Thank you for asking, there is a lot to say about this topic.",
    "This is something that many people wonder about at some point in their lives.",
    "Let me walk you through everything that you need to know, step by step.",
    "Before I begin, it is important to understand the background of your question.",
)
REMARKS = (
    "There are several factors to consider, and each of them plays its own role in the end.",
    "It depends on many things, such as the situation, your goals and your personal taste.",
    "First of all, let us take a closer look at what this means and why it matters so much.",
)


def everyday() -> list[dict[str, Any]]:
    """Queries with a short answer and a rambling one."""
    answers = (DATA / "everyday_answers.txt").read_text(encoding="utf-8").splitlines()
    rows = read("everyday")
    out = []
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        words = answer.split()
        cut = " ".join(words[: max(1, 2 * len(words) // 3)])
        opening, remark = OPENINGS[number % len(OPENINGS)], REMARKS[number % len(REMARKS)]
        out.append({**row, "completion": answer, "rejected": f"{opening} {remark} {cut}"})
    return out


def topics() -> list[dict[str, Any]]:
    """Messages with their label and a wrong answer."""
    out = []
    for number, row in enumerate(read("topics")):
        place = LABELS.index(row["label"])
        wrong = LABELS[(place + 1) % len(LABELS)].capitalize()
        right = row["label"].capitalize()
        chatty = f"This message is about something like {row['label']}, I would say."
        rejected = wrong if number % 2 == 0 else chatty
        out.append({**row, "completion": right, "rejected": rejected})
    return out


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a query set."""
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").open(encoding="utf-8")]


def main() -> None:
    """Write both files."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for name, rows in (("everyday", everyday()), ("topics", topics())):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (DATA / f"{name}_targets.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
