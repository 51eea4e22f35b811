"""A short run of the real 135M model: it learns, changes no weight, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlprompt.artifacts.format import load_artifact
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.policy import open_policy
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from tests.fixtures.products import KEEPS
from tests.fixtures.runs import REWARDS, comparable_rows

pytestmark = [pytest.mark.model, pytest.mark.slow]


def recipe(crash_at: int) -> Recipe:
    plain: dict[str, Any] = {
        "name": "small",
        "model": {"path": "smollm2-135m", "threads": 1},
        "prompt": {"num_virtual_tokens": 8},
        "algorithm": {"group_size": 4},
        "sampling": {"max_tokens": 12},
        "data": {
            "rows": [f"Name a thing that is {word}." for word in ("red", "big", "old", "hot")],
            "heldout": 2,
        },
        "rewards": [
            {
                "path": "rewards.py:Stops",
                "name": "noisy",
                "options": {"at": crash_at, "how": "crash"},
            }
        ],
        "training": {"steps": 4, "queries_per_step": 1, "save_every": 2},
        "evaluation": {"every": 2, "completions_per_query": 4},
        "tracking": {"trackers": ["jsonl"]},
    }
    return Recipe(**plain)


def test_two_and_two_steps_are_four(tmp_path: Path, smollm2_dir: Path) -> None:
    assert smollm2_dir.is_dir()
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    summary = build_single_run(recipe(99), tmp_path, straight).run()
    assert summary["steps"] == 4
    assert summary["base_fingerprint_before"] == summary["base_fingerprint_after"]
    rows = read_jsonl(straight / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["prompt/drift_from_init"] > 0
    # Where decoding and training multiply in the same order they agree; else both round, each in
    # its own places (0.06 nats with AMX).
    most = 0.001 if KEEPS else 0.1
    assert all(row["sampling/sampling_logp_difference/mean"] < most for row in rows)

    with pytest.raises(InputError, match="fell over"):
        build_single_run(recipe(2), tmp_path, resumed).run()
    build_single_run(recipe(99), tmp_path, resumed).run(resume=True)
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(straight, kind) == comparable_rows(resumed, kind), kind
    saved = load_file(straight / "artifact" / "prompt.safetensors")["embeddings"]
    assert torch.equal(saved, load_file(resumed / "artifact" / "prompt.safetensors")["embeddings"])

    policy = open_policy(recipe(99).model)
    loaded = load_artifact(straight / "artifact", policy)
    assert torch.equal(loaded.state_dict()["embeddings"], saved)
