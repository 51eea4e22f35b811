"""The readable loop: at most 60 lines, and bit for bit the trainer's prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples.grpo_loop import learn
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import load_recipe
from tests.fixtures.tiny import save_tiny

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "concise" / "smollm2_grpo.yaml"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_after_three_steps_its_prompt_is_the_trainers_bit_for_bit(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [
        f"model.path={save_tiny(tmp_path / 'model')}",
        f"model.dtype={dtype}",
        "model.device=cpu",
        "sampling.max_tokens=8",
        "training.steps=3",
        "training.token_budget=100000",  # the loop learns from the whole batch at once
        "data.max_queries=40",
        "evaluation.max_queries=2",
        "tracking.trackers=[jsonl]",
    ]
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)
    run = build_single_run(load_recipe(RECIPE, overrides), RECIPE.parent, tmp_path / "run")
    start = run.parts.learner.prompt.state_dict()["embeddings"].clone()
    run.run()
    theirs = run.parts.learner.prompt.state_dict()["embeddings"]
    ours = learn(RECIPE, overrides).prompt.state_dict()["embeddings"]
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, start)


def test_it_fits_on_a_page() -> None:
    lines = (ROOT / "examples" / "grpo_loop.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
