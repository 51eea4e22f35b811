"""The command `lm_eval` on a learned prompt, run for real where lm-eval is installed.

It may be installed in an environment of its own: name that environment's Python, which must also
have what rlprompt needs, as RLPROMPT_LMEVAL_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlprompt.api import open_model
from rlprompt.prompts.text import TextPrompt
from rlprompt.suites.likelihood import GivenAnswer, likelihoods
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("RLPROMPT_LMEVAL_PYTHON")
needs_lm_eval = pytest.mark.skipif(
    PYTHON is None and importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed; install it, or set RLPROMPT_LMEVAL_PYTHON",
)
ROWS: list[dict[str, Any]] = [
    {"question": "the rain", "options": ["the sun", "a hand and the land"], "answer": 0},
    {"question": "he is", "options": ["out there", "in"], "answer": 1},
]
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "answer",
    },
    "tiny_written": {
        "output_type": "generate_until",
        "doc_to_target": "{{options[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5},
        "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "{{question}} {{options[0]}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


def artifact(folder: Path) -> Path:
    model = open_model(str(save_tiny(folder / "model")), dtype="float32", device="cpu")
    prompt = model.prompt("Answer in one line.")
    # As here, and without a build of the kernels for another torch.
    prompt.recipe = {"model": {"dtype": "float32", "device": "cpu", "cpu_kernels": "off"}}
    return prompt.save(folder / "artifact")


def tasks(folder: Path) -> None:
    (folder / "tasks").mkdir()
    rows = folder / "tasks" / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, own in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "doc_to_text": "" if "rolling" in name else "{{question}}",
            **own,
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))


def lm_eval(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            PYTHON or sys.executable, "-m", "rlprompt.suites.lm_eval_model",
            "--model", "rlprompt", "--include_path", "tasks", *arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=560,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_lm_eval
def test_lm_eval_gives_our_own_numbers(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    tasks(tmp_path)
    done = lm_eval(
        tmp_path, "--model_args", f"artifact={folder}", "--tasks", ",".join(TASKS),
        "--batch_size", "2", "--log_samples", "--output_path", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    numbers = json.loads(results.read_text())["results"]
    assert {"tiny_choice", "tiny_written", "tiny_rolling"} <= numbers.keys()
    samples = _samples(tmp_path, "tiny_choice")
    loaded = open_model(str(tmp_path / "model"), dtype="float32", device="cpu").load(folder)
    for row, sample in zip(ROWS, samples, strict=True):
        user = ({"role": "user", "content": row["question"]},)
        answers = [GivenAnswer(user, text) for text in row["options"]]
        ours = likelihoods(loaded.policy, loaded.prompt, answers, 1000)
        for (theirs,), expected in zip(sample["resps"], ours, strict=True):
            assert float(theirs[0]) == pytest.approx(expected.logprob, abs=1e-4)
            assert str(theirs[1]) == str(expected.is_greedy)
    for row, sample in zip(ROWS, _samples(tmp_path, "tiny_written"), strict=True):
        text = loaded.generate(row["question"], temperature=0.0, max_tokens=5)
        assert sample["resps"][0][0].strip() == text.split("\n")[0].strip()


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_lm_eval
def test_lm_eval_gives_turns_and_system_text(tmp_path: Path) -> None:
    folder = artifact(tmp_path)
    tasks(tmp_path)
    done = lm_eval(
        tmp_path, "--model_args", f"artifact={folder}", "--tasks", "tiny_choice",
        "--apply_chat_template", "--system_instruction", "Be kind.", "--log_samples",
        "--output_path", "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    loaded = open_model(str(tmp_path / "model"), dtype="float32", device="cpu").load(folder)
    under = TextPrompt("Answer in one line.\n\nBe kind.")
    for row, sample in zip(ROWS, _samples(tmp_path, "tiny_choice"), strict=True):
        user = ({"role": "user", "content": row["question"]},)
        ours = likelihoods(
            loaded.policy, under, [GivenAnswer(user, text) for text in row["options"]], 1000
        )
        for (theirs,), expected in zip(sample["resps"], ours, strict=True):
            assert float(theirs[0]) == pytest.approx(expected.logprob, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_lm_eval
def test_a_wrong_argument_is_one_sentence(tmp_path: Path) -> None:
    tasks(tmp_path)
    done = lm_eval(tmp_path, "--model_args", "pretrained=x,artifact=y", "--tasks", "tiny_choice")
    assert done.returncode == 2
    sentence = "Error: there is no model argument 'pretrained'; known are artifact, model, force,"
    assert done.stderr.strip().splitlines()[-1].startswith(sentence)


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(found, key=lambda each: int(each["doc_id"]))
