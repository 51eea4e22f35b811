"""Rollouts during updates: no result depends on timing, resuming included, and the ratio is taken
against the prompt that drew the batch."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rlprompt.algorithms.base import MicroSignal, TokenLosses
from rlprompt.distributed.ranks import Ranks
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.policy import TokenScores
from rlprompt.prompts.base import Prompt
from rlprompt.recipe.build import build_run, build_single_run
from rlprompt.rollout.collect import RolloutBatch
from rlprompt.runs.checkpoint import checkpoint_steps, load_checkpoint
from rlprompt.runs.learner import NotFiniteError
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from tests.fixtures.runs import (
    artifact_embeddings,
    assert_same_run,
    comparable_rows,
    gradient_step,
    merged,
    stops,
    tiny_recipe,
    tiny_trainer,
)

SIX: dict[str, Any] = {"training": {"steps": 6, "save_every": 2, "overlap_rollouts": True}}
CLIPPED = {"clip_low": 0.1, "clip_high": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"type": "grpo", "max_draws": 2, **CLIPPED}},
    "rloo_kl": {"algorithm": {"type": "rloo", "kl_coef": 0.05, "num_epochs": 2}},
    "ppo": {"algorithm": {"type": "ppo", "num_epochs": 2}, "training": {"queries_per_step": 1}},
}
RATIO = "sampling/importance_sampling_ratio/mean"


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def trainer_of(folder: Path, output: Path, *changes: dict[str, Any]) -> Run:
    plain = SIX
    for change in changes:
        plain = merged(plain, change)
    return tiny_trainer(folder, output, **plain)


def rollout_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "rlprompt-rollouts" and t.is_alive()]


def assert_no_thread_is_left() -> None:
    deadline = time.monotonic() + 5.0
    while rollout_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not rollout_threads()


def slow(trainer: Run, name: str, seconds: float) -> None:
    """Delay one of the two threads."""
    owner = (
        gradient_step(trainer).updater
        if name == "gradient"
        else gradient_step(trainer).parts.rewards
    )
    work = getattr(owner, name)

    def delayed(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return work(*args, **kwargs)

    setattr(owner, name, delayed)


@pytest.mark.parametrize("slower", ["gradient", "score"])
def test_which_thread_is_faster_changes_nothing(tmp_path: Path, slower: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    trainer_of(tmp_path, one, stops(99, "crash")).run()
    second = trainer_of(tmp_path, two, stops(99, "crash"))
    slow(second, slower, 0.03)
    second.run()
    assert_same_run(one, two)
    rows = read_jsonl(two / "metrics.jsonl")
    for row in rows:
        times = [value for name, value in row.items() if name.startswith("time/")]
        assert sum(times) == pytest.approx(row["step_time"])
    hidden = [row.get("overlap/hidden/seconds", 0.0) for row in rows]
    waited = [row.get("overlap/waited/seconds", 0.0) for row in rows]
    assert hidden[-1] == waited[-1] == 0.0  # nothing is drawn behind the last update
    assert min(hidden[:-1] if slower == "gradient" else waited[:-1]) > 0.0
    assert_no_thread_is_left()


def test_the_first_step_is_the_plain_runs_and_later_ones_are_off_policy(tmp_path: Path) -> None:
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    trainer_of(tmp_path, plain, {"training": {"overlap_rollouts": False}}).run()
    trainer_of(tmp_path, overlapped).run()
    rows = comparable_rows(overlapped, "metrics")
    assert rows[0] == comparable_rows(plain, "metrics")[0]
    gap = "sampling/sampling_logp_difference/mean"
    assert gap in rows[0] and RATIO not in rows[0]
    for row in rows[1:]:
        assert gap not in row
        assert row[RATIO] == pytest.approx(1.0, abs=0.2) and row[RATIO] != 1.0
        assert row["sampling/importance_sampling_ratio/max"] > 1.0
        assert row["off_policy/kl"] > 0.0
    epochs = [row["epoch"] for row in rows]
    assert epochs == [row["epoch"] for row in comparable_rows(plain, "metrics")]
    first = [
        [r["completion"] for r in comparable_rows(run, "completions") if r["step"] == 1]
        for run in (plain, overlapped)
    ]
    assert first[0] == first[1]


class Watch:
    """Keeps the prompt as it was before each step, and what the algorithm was given in it."""

    def __init__(self, trainer: Run) -> None:
        self.policy = trainer.parts.policy
        self.prompts: list[Prompt] = []
        self.batches: list[RolloutBatch] = []
        self.given: list[list[tuple[TokenScores, MicroSignal]]] = []
        learn, losses = (
            gradient_step(trainer).updater.learn,
            gradient_step(trainer).parts.algorithm.losses,
        )

        def watched_learn(batch: RolloutBatch, *args: Any, **kwargs: Any) -> Any:
            self.prompts.append(self.policy.prompt.copy())
            self.batches.append(batch)
            self.given.append([])
            return learn(batch, *args, **kwargs)

        def watched_losses(scores: TokenScores, micro: MicroSignal) -> TokenLosses:
            self.given[-1].append((scores, micro))
            return losses(scores, micro)

        gradient_step(trainer).updater.learn = watched_learn  # type: ignore[method-assign]
        gradient_step(trainer).parts.algorithm.losses = watched_losses  # type: ignore[method-assign]

    def logprobs(self, batch: RolloutBatch, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a batch's completions under a prompt, with their mask."""
        with torch.no_grad():
            prefix = self.policy.prefix(prompt)
            queries = [group.query for group in batch.groups]
            rows = [group.completions for group in batch.groups]
            scores = self.policy.logprobs(
                self.policy.tree(queries, rows, prefix, prompt), prefix, 1.0
            )
        return scores.logprobs, scores.mask


@pytest.mark.parametrize("variant", ["grpo", "rloo_kl"])
def test_the_ratio_is_that_of_now_and_the_prompt_before_the_last_update(
    tmp_path: Path, variant: str
) -> None:
    trainer = trainer_of(
        tmp_path,
        tmp_path / "run",
        VARIANTS[variant],
        {"algorithm": {"num_epochs": 1}, "training": {"steps": 4, "token_budget": 4096}},
    )
    watch = Watch(trainer)
    trainer.run()
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [batch.prefetched for batch in watch.batches] == [False, True, True, True]
    for step in (1, 2, 3):
        batch = watch.batches[step]
        now, mask = watch.logprobs(batch, watch.prompts[step])
        then, _ = watch.logprobs(batch, watch.prompts[step - 1])
        ((scores, micro),) = watch.given[step]
        assert micro.old_logprobs is not None
        torch.testing.assert_close(micro.old_logprobs, then, rtol=0, atol=1e-4)
        ratio = (scores.logprobs.detach() - micro.old_logprobs).exp()
        by_hand = (now - then).exp()
        torch.testing.assert_close(ratio, by_hand, rtol=0, atol=1e-3)
        assert float((by_hand - 1.0)[mask].abs().max()) > 1e-2
        assert rows[step][RATIO] == pytest.approx(float(by_hand[mask].mean()), abs=1e-3)
        kl = (by_hand - 1.0 - (now - then))[mask].mean()
        assert rows[step]["off_policy/kl"] == pytest.approx(float(kl), abs=1e-4)


@pytest.mark.parametrize(
    ("variant", "how", "at"),
    [
        ("grpo", "crash", 2),
        ("grpo", "SIGTERM", 3),
        ("rloo_kl", "crash", 3),
        ("ppo", "SIGINT", 2),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(
    tmp_path: Path, variant: str, how: str, at: int
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    trainer_of(tmp_path, straight, VARIANTS[variant], stops(99, how)).run()
    first = trainer_of(tmp_path, resumed, VARIANTS[variant], stops(at, how))
    if how == "crash":
        with pytest.raises(InputError, match="fell over"):
            first.run()
    else:
        summary = first.run()
        # The reward of step `at` is called, and the signal sent, during the step before.
        assert (summary["stopped_because"], summary["steps"]) == (how, at)
    assert_no_thread_is_left()
    random.seed(123)
    torch.manual_seed(123)
    again = trainer_of(tmp_path, resumed, VARIANTS[variant], stops(99, how))
    summary = again.run(resume=True)
    assert (summary["stopped_because"], summary["steps"]) == ("finished", 6)
    assert_same_run(straight, resumed)


def test_a_failing_reward_is_told_as_in_a_plain_run(tmp_path: Path) -> None:
    told = []
    for overlaps in (False, True):
        output = tmp_path / str(overlaps)
        changes = {"training": {"overlap_rollouts": overlaps}}
        trainer = trainer_of(tmp_path, output, changes, stops(3, "crash"))
        with pytest.raises(InputError, match="the machine fell over") as error:
            trainer.run()
        told.append(str(error.value).partition("completion '")[0])  # of another prompt
        # The batch of step 4 is drawn in step 3.
        steps = [row["step"] for row in read_jsonl(output / "metrics.jsonl")]
        assert steps == [1, 2, 3][: 2 if overlaps else 3]
        assert checkpoint_steps(output / "checkpoints") == [2]
    assert told[0] == told[1]
    assert_no_thread_is_left()


def poison(trainer: Run, step: int) -> None:
    gradient, calls = gradient_step(trainer).updater.gradient, 0

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            with torch.no_grad():
                trainer.parts.policy.parameters()[0][0, 0] = torch.nan
        return gradient(*args, **kwargs)

    gradient_step(trainer).updater.gradient = poisoned  # type: ignore[method-assign]


def test_a_prompt_that_becomes_nan_stops_the_run_which_can_go_on(tmp_path: Path) -> None:
    straight, output = tmp_path / "straight", tmp_path / "run"
    trainer_of(tmp_path, straight, stops(99, "crash")).run()
    trainer = trainer_of(tmp_path, output, stops(99, "crash"))
    poison(trainer, 3)
    with pytest.raises(NotFiniteError, match="is not finite"):
        trainer.run()
    assert json.loads((output / "failed_step_3" / "error.json").read_text())["step"] == 3
    assert load_checkpoint(output / "checkpoints").step == 2
    assert_no_thread_is_left()
    trainer_of(tmp_path, output, stops(99, "crash")).run(resume=True)
    assert_same_run(straight, output)


def test_ctrl_c_does_not_wait_for_a_reward_that_hangs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tmp_path / "run")
    release, scored = threading.Event(), gradient_step(trainer).parts.rewards.score

    def hangs(groups: Sequence[Any], *, step: int) -> Any:
        if step == 1:
            release.wait()
        return scored(groups, step=step)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    gradient_step(trainer).parts.rewards.score = hangs  # type: ignore[method-assign]
    gradient_step(trainer).updater.learn = interrupted  # type: ignore[method-assign]
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        assert time.monotonic() - start < 5.0
        assert all(thread.daemon for thread in rollout_threads())
    finally:
        release.set()
    assert_no_thread_is_left()


def test_no_batch_is_drawn_that_no_step_learns_from(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, tmp_path / "run")
    steps, scored = [], gradient_step(trainer).parts.rewards.score

    def counted(groups: Sequence[Any], *, step: int) -> Any:
        if len(groups) == 1:
            steps.append(step)
        return scored(groups, step=step)

    gradient_step(trainer).parts.rewards.score = counted  # type: ignore[method-assign]
    trainer.run()
    assert steps == [0, 1, 2, 3, 4, 5]
    state = load_checkpoint(tmp_path / "run" / "checkpoints").state["learner"]["source"]
    assert state["random"] is None


def test_a_member_of_a_population_overlaps_as_it_would_alone(tmp_path: Path) -> None:
    members = [{"name": "a"}, {"name": "b", "changes": {"training.optimizer.lr_relative": 0.2}}]
    changes = {"training": {"steps": 8, "overlap_rollouts": True}, "population": members}
    recipe = tiny_recipe(tmp_path, **changes)
    population = build_run(recipe, tmp_path, tmp_path / "run")
    assert isinstance(population, Population)
    for trainer in population.members.values():
        trainer.run()
    build_single_run(recipe.members()["b"], tmp_path, tmp_path / "alone").run()
    member = tmp_path / "run" / "members" / "b"
    for kind in ("metrics", "completions"):
        assert comparable_rows(member, kind) == comparable_rows(tmp_path / "alone", kind)
    assert torch.equal(artifact_embeddings(member), artifact_embeddings(tmp_path / "alone"))


def test_a_reward_rises(tmp_path: Path) -> None:
    """Nearly the run of tests/e2e/test_tiny_run.py, on batches that are one step old.

    Long enough for every start: after 60 steps two of six seeds were still below the bound.
    """
    summary = trainer_of(
        tmp_path,
        tmp_path / "run",
        {
            "prompt": {"num_virtual_tokens": 8, "max_norm_ratio": None},
            "algorithm": {"group_size": 16, "num_epochs": 2},
            "sampling": {"max_tokens": 2},
            "training": {"steps": 150, "save_every": 150, "queries_per_step": 4},
            "evaluation": {"every": 30, "completions_per_query": 16},
            "rewards": [{"path": "rewards.py:low_tokens"}],
        },
        {"training": {"optimizer": {"lr": 0.1}}},
    ).run()
    before, after = summary["heldout_reward_before"], summary["heldout_reward_after"]
    assert before is not None and before < 0.3
    assert after is not None and after > 0.6


GIVEN = {"data": {"rows": [{"query": "a", "completion": "b", "chosen": "b", "rejected": "c"}] * 4}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"algorithm": {"type": "supervised"}, **GIVEN}, "supervised has no probability ratio"),
        ({"algorithm": {"type": "dpo"}, **GIVEN}, "dpo has no probability ratio"),
        ({"algorithm": {"type": "distill", "teacher": "a"}}, "distill has no probability ratio"),
        (
            {"prompt": {"type": "adapter", "text": "the sun", "method": {"type": "lora"}}},
            r"training\.overlap_rollouts .* prompt\.type is adapter",
        ),
        (
            {"distributed": {"base": "sharded"}},
            r"training\.overlap_rollouts .* distributed\.base is sharded",
        ),
        ({"training": {"steps": 1}}, "overlap_rollouts has no effect with steps: 1"),
    ],
)
def test_what_cannot_overlap(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    plain = tiny_recipe(tmp_path).plain() | {k: v for k, v in changes.items() if k != "training"}
    plain["training"] = SIX["training"] | changes.get("training", {})
    with pytest.raises(ValidationError, match=sentence):
        type(tiny_recipe(tmp_path)).model_validate(plain)


def test_several_ranks_cannot_overlap(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.overlap_rollouts works on one rank, .* has 2"):
        build_single_run(
            tiny_recipe(tmp_path, **SIX), tmp_path, tmp_path / "run", ranks=Ranks(0, 2)
        )
