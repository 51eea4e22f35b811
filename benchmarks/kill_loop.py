"""Kill a training run with SIGKILL again and again, resume it, and compare it with an unkilled one.

    python benchmarks/kill_loop.py [--kills 30] [--seed 0] [--json FILE]

The runs are those of `rlprompt train --auto-resume` on a tiny random model. They are killed at
random times, at random tokens of a rollout, and before or after random file operations of a
checkpoint.
After each kill every checkpoint must load, and no more steps may be lost than since the last save.
Processes are forked, so that imports are paid for once; what is killed is a process of its own.

Writes `kills`, `corrupt` (checkpoints or logs that could not be read back), `lost_steps` (finished
steps that were lost although they had been saved), `equal_to_unkilled`, and the kills by kind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import yaml
from safetensors.torch import load_file

from rlprompt import files
from rlprompt.cli.commands.train import TrainOptions, run
from rlprompt.engines.native import NativeEngine
from rlprompt.files import read_jsonl
from rlprompt.runs import checkpoint
from rlprompt.runs import run as loop
from rlprompt.runs.checkpoint import checkpoint_steps, load_checkpoint
from tests.fixtures.runs import QUERIES, comparable_rows
from tests.fixtures.tiny import save_tiny

KINDS = ("step", "rollout", "checkpoint")
STEPS, SAVE_EVERY = 12, 2
REWARD = """
import random

def reward(completions, **kwargs):
    return [sum(c in "aeiou" for c in text) / 8 + 0.1 * random.random() for text in completions]
"""
MODEL = {"dtype": "float32", "device": "cpu", "threads": 1}
RECIPE: dict[str, Any] = {
    "name": "killed",
    "prompt": {"num_virtual_tokens": 4, "init_text": "the sun and the rain"},
    "algorithm": {"group_size": 4},
    "sampling": {"max_tokens": 8},
    "data": {"rows": list(QUERIES), "heldout": 2},
    "rewards": [{"path": "reward.py:reward", "name": "vowels"}],
    "training": {"steps": STEPS, "queries_per_step": 2, "save_every": SAVE_EVERY},
    "evaluation": {"every": 4, "completions_per_query": 2},
    "tracking": {"trackers": ["jsonl"]},
}


@dataclass
class Findings:
    """What the loop found."""

    by_kind: Counter[str] = field(default_factory=Counter)
    corrupt: list[str] = field(default_factory=list)
    lost_steps: int = 0
    different: list[str] = field(default_factory=list)
    rounds: int = 0

    @property
    def kills(self) -> int:
        return sum(self.by_kind.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="at least this many (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the findings there")
    arguments = parser.parse_args()
    dice = random.Random(arguments.seed)
    findings = Findings()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_child(lambda: save_tiny(folder / "model"))
        (folder / "reward.py").write_text(REWARD)
        (folder / "recipe.yaml").write_text(
            yaml.safe_dump(RECIPE | {"model": MODEL | {"path": str(folder / "model")}})
        )
        while findings.kills < arguments.kills:
            one_round(folder, findings, arguments.kills, dice)
    result = {
        "kills": findings.kills,
        "corrupt": len(findings.corrupt),
        "lost_steps": findings.lost_steps,
        "equal_to_unkilled": not findings.different,
        "kills_by_kind": dict(findings.by_kind),
        "rounds": findings.rounds,
        "seconds": round(time.perf_counter() - started, 1),
        "details": [*findings.corrupt, *findings.different],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")
    good = not findings.corrupt and not findings.lost_steps and not findings.different
    return 0 if good else 1


def one_round(folder: Path, findings: Findings, wanted: int, dice: random.Random) -> None:
    """One run to its end without a kill, and the same one with kills."""
    findings.rounds += 1
    seed = findings.rounds
    straight, killed = folder / f"straight_{seed}", folder / f"killed_{seed}"
    start = time.perf_counter()
    assert in_child(lambda: train(folder, straight, seed)) == 0
    seconds = time.perf_counter() - start
    saved = 0
    while True:
        kind = dice.choice(KINDS) if findings.kills < wanted else "none"
        code = in_child(
            partial(train, folder, killed, seed, kind, dice.random()),
            kill_after=dice.uniform(0, seconds) if kind == "step" else None,
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"the run ended with code {code}"
        findings.by_kind[kind] += 1
        saved = inspect(killed, findings, saved)
    compare(straight, killed, findings)


def train(folder: Path, output: Path, seed: int, kind: str = "none", at: float = 0.0) -> int:
    """One attempt, which kills itself in a rollout or a checkpoint when told so."""
    if kind == "rollout":
        kill_in_rollout(at)
    if kind == "checkpoint":
        kill_in_checkpoint(at)
    options = TrainOptions(output=output, auto_resume=True)
    return run(folder / "recipe.yaml", [f"seed={seed}"], options)


def kill_in_rollout(at: float) -> None:
    """Kill this process in one of its first rollouts, at a random token."""
    left = int(at * 8)
    generate = NativeEngine.generate

    def generate_and_die(self: NativeEngine, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            return generate(self, *args, **kwargs)
        token = int(at * 64) % 8

        def progress(done: int, total: int) -> None:
            if done > token:
                die()

        names = ("queries", "num_completions", "sampling", "seed")
        given = {**dict(zip(names, args, strict=False)), **kwargs, "progress": progress}
        result = generate(self, **given)
        die()  # every row ended before that token
        return result

    NativeEngine.generate = generate_and_die  # type: ignore[method-assign]  # until it dies


def kill_in_checkpoint(at: float) -> None:
    """Kill this process before or after one of the file operations of its first checkpoints."""
    operations = int(at * 26)
    place = 0
    inside = False

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal place
            for moment in ("before", "after"):
                if inside and place == operations:
                    die()
                place += inside
                if moment == "before":
                    result = call(*args, **kwargs)
            return result

        return wrapper

    save = checkpoint.save_checkpoint

    def save_counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return save(*args, **kwargs)
        finally:
            inside = False

    for name in ("replace", "fsync", "open"):
        setattr(os, name, counted(getattr(os, name)))
    vars(checkpoint)["write_atomic"] = counted(files.write_atomic)
    vars(loop)["save_checkpoint"] = save_counted


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> int:
    """Run in a forked process; returns its exit code, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            quiet()
            code = as_code(work())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while deadline is not None and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)  # not reaped yet, so this is no other process
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def as_code(result: Any) -> int:
    return result if isinstance(result, int) else 0


def quiet() -> None:
    """What the command prints is not wanted; errors are."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)


def inspect(output: Path, findings: Findings, saved: int) -> int:
    """Read back what a kill left; returns the newest saved step."""
    folder = output / "checkpoints"
    steps = checkpoint_steps(folder)
    for step in steps:
        try:
            load_checkpoint(folder, step)
        except Exception as error:
            findings.corrupt.append(f"{folder} step {step}: {error}")
    finished = 0
    for name in ("metrics", "completions", "evaluation"):
        path = output / f"{name}.jsonl"
        try:
            rows = read_jsonl(path) if path.exists() else []
        except Exception as error:
            findings.corrupt.append(f"{path}: {error}")
            continue
        if name == "metrics":
            finished = max((row["step"] for row in rows), default=0)
    newest = steps[-1] if steps else 0
    # The step in which a save falls may be finished and not yet saved.
    due = max(0, (finished - 1) // SAVE_EVERY * SAVE_EVERY)
    findings.lost_steps += max(0, max(saved, due) - newest)
    return max(saved, newest)


def compare(straight: Path, killed: Path, findings: Findings) -> None:
    """Note every difference between two finished runs, clocks aside."""
    for kind in ("metrics", "completions", "evaluation"):
        if comparable_rows(straight, kind) != comparable_rows(killed, kind):
            findings.different.append(f"{killed.name}: {kind}.jsonl")
    prompts = [load_file(o / "artifact" / "prompt.safetensors") for o in (straight, killed)]
    if any(not prompts[0][name].equal(prompts[1][name]) for name in prompts[0]):
        findings.different.append(f"{killed.name}: the learned prompt")
    last = [load_checkpoint(o / "checkpoints") for o in (straight, killed)]
    if any(not last[0].tensors[name].equal(last[1].tensors[name]) for name in last[0].tensors):
        findings.different.append(f"{killed.name}: the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
