"""The loop on a tiny model: what a run leaves behind, how it stops, and that a resumed run is the
uninterrupted one bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.artifacts.format import read_artifact_info
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.model.base import verify_unchanged
from rlprompt.runs import run as loop
from rlprompt.runs.checkpoint import checkpoint_steps, load_checkpoint
from rlprompt.runs.learner import NotFiniteError
from tests.fixtures.runs import (
    artifact_embeddings,
    assert_same_run,
    comparable_rows,
    gradient_step,
    stops,
    tiny_trainer,
)

PROMISED = {
    "steps", "seconds", "heldout_reward_before", "heldout_reward_after",
    "heldout_reward_handwritten", "completion_tokens_per_second", "step_seconds_median",
    "peak_rss_mb", "base_fingerprint_before", "base_fingerprint_after", "artifact",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing costs more than a tiny run; two tests check that it happens."""
    if "report" not in request.node.name:
        monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def scripted(*heldout: float) -> dict[str, Any]:
    options = {"heldout": list(heldout)}
    return {"rewards": [{"path": "rewards.py:Scripted", "name": "scripted", "options": options}]}


def test_a_run_leaves_everything_up_to_the_report(tmp_path: Path) -> None:
    output = tmp_path / "run"
    trainer = tiny_trainer(tmp_path, output, evaluation={"handwritten": "Use many vowels."})
    start = trainer.parts.policy.prompt.state_dict()["embeddings"].clone()
    summary = trainer.run()
    assert json.loads((output / "summary.json").read_text()) == summary
    assert summary["steps"] == 3 and summary["stopped_because"] == "finished"
    assert not [name for name, value in summary.items() if value is None and name in PROMISED]
    assert summary.keys() >= PROMISED
    fingerprint = trainer.parts.policy.base.fingerprint
    assert summary["base_fingerprint_before"] == summary["base_fingerprint_after"] == fingerprint
    assert verify_unchanged(trainer.parts.policy.base) == fingerprint

    metrics = read_jsonl(output / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for name in ("reward", "reward_std", "rewards/letters/mean", "loss", "loss/rl", "entropy",
                 "clip_ratio/region_mean", "completions/mean_length", "frac_reward_zero_std",
                 "sampling/sampling_logp_difference/mean", "prompt/grad_norm", "prompt/norm",
                 "prompt/drift_from_init", "lr", "num_tokens", "epoch", "step_time",
                 "time/rollout", "time/reward", "time/prefill", "time/forward", "time/backward",
                 "time/optimizer", "time/other"):  # fmt: skip
        assert all(row[name] is not None for row in metrics), name
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in metrics)
    assert [row["lr"] for row in metrics] == sorted((row["lr"] for row in metrics), reverse=True)
    times = [
        sum(value for name, value in row.items() if name.startswith("time/")) for row in metrics
    ]
    assert times == pytest.approx([row["step_time"] for row in metrics])

    completions = read_jsonl(output / "completions.jsonl")
    assert sum(row["split"] == "train" for row in completions) == 3 * 4
    heldout = [(row["step"], row["who"]) for row in completions if row["split"] == "heldout"]
    evaluated = [(0, "base"), (0, "handwritten"), (0, "learned"), (2, "learned"), (3, "learned")]
    assert heldout == [pair for pair in evaluated for _ in range(2 * 4)]
    evaluations = read_jsonl(output / "evaluation.jsonl")
    assert [(row["step"], row["who"]) for row in evaluations] == evaluated
    assert summary["heldout_reward_before"] == evaluations[0]["reward"]
    assert summary["heldout_reward_handwritten"] == evaluations[1]["reward"]
    assert summary["heldout_reward_after"] == max(row["reward"] for row in evaluations[2:])

    assert checkpoint_steps(output / "checkpoints") == [2, 3]
    assert "<html" in (output / "report.html").read_text()
    info = read_artifact_info(output / "artifact")
    assert info.metrics["heldout_reward_after"] == summary["heldout_reward_after"]
    assert info.recipe["name"] == info.name == "tiny"
    assert summary["artifact"] == str(output / "artifact")
    assert not torch.equal(
        load_checkpoint(output / "checkpoints").tensors["prompt/embeddings"], start
    )


def test_the_same_recipe_gives_the_same_run(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "two"):
        random.seed(name)  # a run seeds what its rewards draw from
        output = tmp_path / name
        tiny_trainer(tmp_path, output, **stops(99, "crash")).run()
        runs.append([comparable_rows(output, kind) for kind in ("metrics", "completions")])
    assert runs[0] == runs[1]


SIX = {"training": {"steps": 6, "save_every": 2}, "algorithm": {"num_epochs": 2}}


@pytest.mark.parametrize(
    ("how", "at"),
    [("crash", 0), ("crash", 3), ("crash", 4), ("SIGTERM", 0), ("SIGTERM", 2), ("SIGINT", 4)],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path, how: str, at: int) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    tiny_trainer(tmp_path, straight, **SIX, **stops(99, how)).run()
    first = tiny_trainer(tmp_path, resumed, **SIX, **stops(at, how))
    if how == "crash":
        with pytest.raises(InputError, match="fell over"):
            first.run()
        assert not (resumed / "summary.json").exists()
    else:
        summary = first.run()
        assert (summary["stopped_because"], summary["steps"]) == (how, at + 1)
        assert (resumed / "artifact" / "prompt.json").is_file()
    random.seed(123)
    torch.manual_seed(123)
    summary = tiny_trainer(tmp_path, resumed, **SIX, **stops(99, how)).run(resume=True)
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 6)
    assert_same_run(straight, resumed)


def test_a_signal_during_the_first_evaluations_repeats_none_of_them(tmp_path: Path) -> None:
    """The checkpoint at step 0 knows the baselines, so a resumed run has them once."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    plain = {**SIX, **stops(99, "SIGTERM")}
    tiny_trainer(tmp_path, straight, **plain).run()
    first = tiny_trainer(tmp_path, resumed, **plain)
    evaluate = first._evaluations.learned

    def stopped() -> None:
        import os
        import signal

        evaluate()
        os.kill(os.getpid(), signal.SIGTERM)

    first._evaluations.learned = stopped  # type: ignore[method-assign]
    assert first.run()["steps"] == 0
    tiny_trainer(tmp_path, resumed, **plain).run(resume=True)
    assert_same_run(straight, resumed)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    before = {kind: read_jsonl(output / f"{kind}.jsonl") for kind in ("metrics", "evaluation")}
    prompt = artifact_embeddings(output)
    assert tiny_trainer(tmp_path, output).run(resume=True)["steps"] == 3
    assert before == {kind: read_jsonl(output / f"{kind}.jsonl") for kind in before}
    assert torch.equal(prompt, artifact_embeddings(output))


def test_the_artifact_holds_the_best_prompt_not_the_last(tmp_path: Path) -> None:
    output = tmp_path / "run"
    summary = tiny_trainer(
        tmp_path,
        output,
        **scripted(0.1, 0.3, 0.9, 0.5, 0.9),
        training={"steps": 4, "save_every": 1, "keep_checkpoints": 9},
        evaluation={"every": 1},
    ).run()
    assert summary["best_step"] == 2
    assert summary["heldout_reward_before"] == pytest.approx(0.1)
    assert summary["heldout_reward_after"] == pytest.approx(0.9)
    kept = [
        load_checkpoint(output / "checkpoints", step).tensors["prompt/embeddings"]
        for step in (1, 2, 3, 4)
    ]
    assert torch.equal(artifact_embeddings(output), kept[1])
    assert not any(torch.equal(kept[1], other) for other in (kept[0], kept[2], kept[3]))
    # What a resumed run goes on from is the last prompt, not the best.
    last = load_checkpoint(output / "checkpoints")
    assert torch.equal(last.tensors["best/embeddings"], kept[1])


def test_when_training_only_hurts_the_artifact_is_the_start(tmp_path: Path) -> None:
    output = tmp_path / "run"
    trainer = tiny_trainer(tmp_path, output, **scripted(0.9, 0.1, 0.1, 0.1))
    start = trainer.parts.policy.prompt.state_dict()["embeddings"].clone()
    assert trainer.run()["best_step"] == 0
    assert torch.equal(artifact_embeddings(output), start)


def test_early_stopping(tmp_path: Path) -> None:
    output = tmp_path / "run"
    plain: dict[str, Any] = {
        **scripted(0.1, 0.5, 0.4, 0.4, 0.9, 0.9),
        "training": {"steps": 5, "save_every": 5, "early_stopping": 2},
        "evaluation": {"every": 1},
    }
    summary = tiny_trainer(tmp_path, output, **plain).run()
    assert (summary["stopped_because"], summary["steps"]) == ("early_stopping", 3)
    assert summary["best_step"] == 1
    assert checkpoint_steps(output / "checkpoints") == [3]
    resumed = tiny_trainer(tmp_path, output, **plain).run(resume=True)
    assert (resumed["stopped_because"], resumed["steps"]) == ("early_stopping", 3)


def test_without_heldout_queries_the_last_prompt_is_kept_and_the_report_written(
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    summary = tiny_trainer(tmp_path, output, data={"heldout": 0}).run()
    assert summary["heldout_reward_before"] is summary["heldout_reward_after"] is None
    assert summary["heldout_reward_handwritten"] is None
    assert summary["best_step"] == 3
    assert read_jsonl(output / "evaluation.jsonl") == []
    last = load_checkpoint(output / "checkpoints").tensors["prompt/embeddings"]
    assert torch.equal(artifact_embeddings(output), last)
    assert (output / "report.html").is_file()


def test_a_reward_that_scores_nothing_keeps_the_run_alive(tmp_path: Path) -> None:
    output = tmp_path / "run"
    rewards = [{"path": "rewards.py:nothing", "name": "nothing"}]
    summary = tiny_trainer(tmp_path, output, rewards=rewards).run()
    assert summary["heldout_reward_after"] is None
    assert summary["best_step"] == summary["steps"] == 3
    rows = read_jsonl(output / "metrics.jsonl")
    assert all("reward" not in row and row["frac_reward_zero_std"] == 1.0 for row in rows)


def test_kl_to_the_initial_prompt_starts_at_zero_and_survives_resuming(tmp_path: Path) -> None:
    plain: dict[str, Any] = {
        "algorithm": {"kl_coef": 0.1},
        "reference": {"type": "initial"},
        "training": {"steps": 4, "save_every": 2, "optimizer": {"lr": 0.05}},
    }
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    tiny_trainer(tmp_path, straight, **plain, **stops(99, "crash")).run()
    with pytest.raises(InputError):
        tiny_trainer(tmp_path, resumed, **plain, **stops(3, "crash")).run()
    tiny_trainer(tmp_path, resumed, **plain, **stops(99, "crash")).run(resume=True)
    kl = [row["kl"] for row in comparable_rows(straight, "metrics")]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-3
    assert kl == [row["kl"] for row in comparable_rows(resumed, "metrics")]


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_a_prompt_that_becomes_nan_stops_the_run_and_the_step_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_epochs: int
) -> None:
    output = tmp_path / "run"
    plain: dict[str, Any] = {
        "training": {"steps": 4, "save_every": 10},
        "algorithm": {"num_epochs": num_epochs},
        **stops(99, "crash"),
    }
    trainer = tiny_trainer(tmp_path, output, **plain)
    calls = 0
    gradient = gradient_step(trainer).updater.gradient

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 * num_epochs:  # the last update of step 3
            with torch.no_grad():
                trainer.parts.policy.parameters()[0][0, 0] = torch.nan
        return gradient(*args)

    monkeypatch.setattr(gradient_step(trainer).updater, "gradient", poisoned)
    with pytest.raises(NotFiniteError, match="is not finite"):
        trainer.run()
    failed = output / "failed_step_3"
    assert json.loads((failed / "error.json").read_text())["step"] == 3
    assert len(read_jsonl(failed / "completions.jsonl")) == 4
    kept = load_checkpoint(output / "checkpoints")
    assert kept.step == 2 and bool(kept.tensors["prompt/embeddings"].isfinite().all())
    assert kept.state["learner"]["updates"] == 2 * num_epochs

    # What was saved is the state before step 3: a resumed run repeats it as if nothing had been.
    tiny_trainer(tmp_path, output, **plain).run(resume=True)
    straight = tmp_path / "straight"
    tiny_trainer(tmp_path, straight, **plain).run()
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(output, kind) == comparable_rows(straight, kind), kind


def test_an_infinite_reward_is_refused_with_its_name(tmp_path: Path) -> None:
    rewards = [{"path": "rewards.py:infinite", "name": "infinite"}]
    trainer = tiny_trainer(tmp_path, tmp_path / "run", rewards=rewards)
    with pytest.raises(
        InputError, match=r"reward 'infinite' returned inf .* return a finite number"
    ):
        trainer.run()


def test_a_new_run_does_not_write_into_another_runs_folder(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    with pytest.raises(InputError, match="resume that run, or choose another output folder"):
        tiny_trainer(tmp_path, output).run()
    for kind in ("metrics", "completions", "evaluation"):
        (output / f"{kind}.jsonl").unlink()
    with pytest.raises(InputError, match="holds checkpoints of another run"):
        tiny_trainer(tmp_path, output).run()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"data": {"rows": ["a", "b", "c", "d"]}}, "the dataset has changed"),
        ({"prompt": {"num_virtual_tokens": 5}}, "holds another prompt"),
        ({"seed": 7}, "seed 0 but the recipe gives 7"),
        ({"training": {"queries_per_step": 2}}, "batch_size 1 but the recipe gives 2"),
    ],
)
def test_resuming_another_run_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    with pytest.raises(InputError, match=sentence):
        tiny_trainer(tmp_path, output, **change).run(resume=True)


def test_resuming_with_another_base_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    from tests.fixtures.tiny import save_tiny

    other = save_tiny(tmp_path / "other", "qwen3")
    with pytest.raises(InputError, match="the base has changed"):
        tiny_trainer(tmp_path, output, model={"path": str(other)}).run(resume=True)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_resumes(
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    tiny_trainer(tmp_path, output).run()
    newest = output / "checkpoints" / "step_000003"
    (newest / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="step_000003' is damaged"):
        tiny_trainer(tmp_path, output).run(resume=True)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert tiny_trainer(tmp_path, output).run(resume=True)["steps"] == 3


def test_too_few_queries_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(InputError, match="queries_per_step is 7, the dataset has 6 training"):
        tiny_trainer(tmp_path, output, training={"queries_per_step": 7})
    assert not output.exists()


def test_activations_recomputed_or_kept_give_the_same_run(tmp_path: Path) -> None:
    rows = []
    for on in (False, True):
        output = tmp_path / str(on)
        tiny_trainer(tmp_path, output, training={"gradient_checkpointing": on}).run()
        rows.append([row["reward"] for row in read_jsonl(output / "metrics.jsonl")])
    assert rows[0] == rows[1]


def test_the_loop_module_reads_no_algorithm_by_name() -> None:
    assert "grpo" not in Path(loop.__file__).read_text().lower()
