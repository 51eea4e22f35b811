"""The peer of rlprompt's training step: one GRPO step of TRL + PEFT prompt tuning on CPU.

TRL's methods are wrapped in clocks and otherwise untouched; `trl_setup.py` holds every choice.
Two ways to run it, both from the repository root:

    python -m benchmarks.peers.trl_grpo --model DIR --queries FILE --reward FILE.py:NAME
        a worker (see `worker.py`): one line `{"cmd": "step"}` = one GRPO step
    python -m benchmarks.peers.trl_grpo ... --steps 20 --heldout FILE --eval-every 2 --json OUT
        trains and writes the held-out reward by step
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.peers.trl_setup import (
    Trainer,
    TrlSettings,
    as_rows,
    build_trainer,
    compute_dtypes,
    describe,
)
from benchmarks.peers.worker import (
    PhaseClock,
    claim_stdout,
    cpu_seconds,
    emit,
    load_queries,
    memory,
    next_command,
    parse_settings,
)


class StepObserver(TrainerCallback):
    """Times each step of a trainer by phase and hands a report to `pause` after it.

    Phases: `generate` (tokens in to token lists out), `reward`, `reference` (only with beta > 0),
    `forward` (policy log-probs, entropy and loss), `backward`, `optimizer` (clip and update) and
    `other`. The time that `pause` takes belongs to no step.
    """

    def __init__(self, trainer: Trainer, pause: Callable[[dict[str, Any]], bool]) -> None:
        """Wrap the trainer's methods in clocks. `pause` returns False to end the training."""
        self._trainer, self._pause, self._clock = trainer, pause, PhaseClock()
        self._tokens: dict[str, int] = {}
        self._start = self._cpu_start = self._update_start = 0.0
        wrap = self._clock.wrap
        trainer._generate_single_turn = wrap("generate", trainer._generate_single_turn)
        trainer._calculate_rewards = wrap("reward", trainer._calculate_rewards)
        trainer._get_per_token_logps_and_entropies = wrap(
            "reference", trainer._get_per_token_logps_and_entropies
        )
        trainer.compute_loss = wrap("forward", self._counted(trainer.compute_loss))
        trainer.accelerator.backward = wrap("backward", trainer.accelerator.backward)
        trainer._clip_grad_norm = wrap("optimizer", trainer._clip_grad_norm)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the first step."""
        self._restart()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the optimizer's clock."""
        self._update_start = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the optimizer's clock."""
        self._clock.add("optimizer", time.perf_counter() - self._update_start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Report the step, wait for leave to go on, start the next step."""
        seconds = time.perf_counter() - self._start
        metrics = self._trainer._metrics["train"]
        report = {
            "step": state.global_step,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - self._cpu_start,
            "phases": self._clock.take(seconds),
            "tokens": self._tokens,
            "reward": metrics["reward"][-1],
            "reward_std": metrics["reward_std"][-1],
            **memory(),
        }
        if not self._pause(report):
            control.should_training_stop = True
        self._restart()
        return control

    def _restart(self) -> None:
        self._clock.take(0.0)
        self._start, self._cpu_start = time.perf_counter(), cpu_seconds()

    def _counted(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        def counted(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows, padded = inputs["completion_mask"].shape[0], inputs["prompt_mask"].shape[1]
            virtual = getattr(model.active_peft_config, "num_virtual_tokens", 0)
            self._tokens = {
                "rows": rows,
                "query": int(inputs["prompt_mask"].sum()),
                "virtual": rows * virtual,
                "completion": int(inputs["completion_mask"].sum()),
                "forward_positions": rows * (virtual + padded + inputs["completion_mask"].shape[1]),
            }
            return compute_loss(model, inputs, *args, **kwargs)

        return counted


def evaluate(trainer: Trainer, rows: list[dict[str, Any]], settings: TrlSettings) -> dict[str, Any]:
    """Sample held-out completions exactly as in training and score them with the same reward.

    The random state of the training is left as it was.

    Returns:
        `reward` (mean), `reward_std` (population), `num_scored`, `completion_tokens` (mean) and
        the first three completions as `samples`.
    """
    repeated = [row for row in rows for _ in range(settings.heldout_samples)]
    token_ids: list[list[int]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.eval_seed)
        for start in range(0, len(repeated), settings.eval_batch):
            batch = [row["prompt"] for row in repeated[start : start + settings.eval_batch]]
            query_ids, _, _ = trainer._tokenize_prompts(batch)
            token_ids += trainer._generate_single_turn(query_ids, None, {}, 1)[0]
    texts = trainer.processing_class.batch_decode(token_ids, skip_special_tokens=True)
    columns = {key: [row[key] for row in repeated] for key in repeated[0] if key != "prompt"}
    scores = trainer.reward_funcs[0](
        prompts=[row["prompt"] for row in repeated],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=token_ids,
        trainer_state=trainer.state,
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )
    scored = torch.tensor([score for score in scores if score is not None], dtype=torch.float64)
    return {
        "reward": float(scored.mean()),
        "reward_std": float(scored.std(correction=0)),
        "num_scored": len(scored),
        "completion_tokens": sum(map(len, token_ids)) / len(token_ids),
        "samples": texts[:3],
    }


def train_and_evaluate(settings: TrlSettings) -> dict[str, Any]:
    """Train `settings.steps` steps; return settings, one report per step and held-out reward."""
    trainer = build_trainer(settings)
    dtypes = compute_dtypes(trainer)
    heldout = (
        as_rows(load_queries(settings.heldout), settings.system_text) if settings.heldout else []
    )
    reports: list[dict[str, Any]] = []
    curve = [{"step": 0, **evaluate(trainer, heldout, settings)}] if heldout else []

    def pause(report: dict[str, Any]) -> bool:
        reports.append(report)
        step = report["step"]
        if heldout and (step % settings.eval_every == 0 or step == settings.steps):
            curve.append({"step": step, **evaluate(trainer, heldout, settings)})
            sys.stderr.write(f"step {step}: held-out reward {curve[-1]['reward']:.3f}\n")
        return len(reports) < settings.steps

    StepObserver(trainer, pause)
    trainer.train()
    return {**describe(settings, trainer, dtypes), "steps": reports, "heldout": curve}


def work(settings: TrlSettings) -> None:
    """Be a worker: one step for each command."""
    out = claim_stdout()
    trainer = build_trainer(settings)
    dtypes = compute_dtypes(trainer)

    def pause(report: dict[str, Any]) -> bool:
        emit(out, "step", {**report, "compute_dtypes": dtypes})
        return next_command(sys.stdin) == "step"

    StepObserver(trainer, pause)
    emit(out, "ready", {**describe(settings, trainer, dtypes), **memory()})
    if next_command(sys.stdin) == "step":
        trainer.train()


def main(argv: list[str] | None = None) -> None:
    """Read the flags and run as worker or as a short training."""
    settings = parse_settings(TrlSettings, __doc__ or "", argv)
    if not settings.steps:
        work(settings)
        return
    out = claim_stdout()
    result = json.dumps(train_and_evaluate(settings))
    if settings.json:
        Path(settings.json).write_text(result + "\n", encoding="utf-8")
    else:
        out.write(result + "\n")


if __name__ == "__main__":
    main()
