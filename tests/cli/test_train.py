from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlprompt.files import read_jsonl
from rlprompt.recipe.schema import load_recipe
from rlprompt.runs.checkpoint import load_checkpoint
from tests.cli.runs import rlprompt, write_recipe

TIMEOUT = 120.0


def copy_of(finished: Path, folder: Path) -> Path:
    """The run and its recipe in another place, free to be changed."""
    shutil.copytree(finished.parent, folder, dirs_exist_ok=True)
    return folder / "run"


def test_a_run_leaves_all_its_files_and_says_where(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "recipe.resolved.yaml",
        "metrics.jsonl",
        "completions.jsonl",
        "report.html",
        "artifact",
        "checkpoints",
        "summary.json",
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["stopped_because"] == "finished"
    shown = (finished.parent / "shown.txt").read_text()
    assert str(finished / "report.html") in shown
    assert f"rlprompt chat {finished / 'artifact'} --compare" in shown


def test_the_table_has_the_rewards_of_the_summary(finished: Path) -> None:
    lines = (finished.parent / "shown.txt").read_text().splitlines()
    heldout = json.loads((finished / "summary.json").read_text())["heldout"]
    (row,) = [line for line in lines if line.strip("|\u2502 ").startswith("reward ")]
    header = lines[lines.index(row) - 2]
    columns = [header.index(who) for who in ("base", "hand-written", "start", "learned")]
    assert columns == sorted(columns)
    shown = [float(word) for word in row.split() if word[0].isdigit()]
    expected = [heldout[who]["reward"] for who in ("base", "handwritten", "start", "learned")]
    assert shown == pytest.approx(expected, abs=5e-4)
    assert any("standard error" in line for line in lines)
    assert any("vowels" in line for line in lines)
    assert any("mean tokens" in line for line in lines)


def test_two_queries_are_shown_with_an_answer_under_each_prompt(finished: Path) -> None:
    shown = (finished.parent / "shown.txt").read_text()
    starts = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert starts.count("query") == 2
    after = starts[starts.index("query") :]
    assert after[:4] == ["query", "base", "hand-written", "learned"]


def test_the_resolved_recipe_is_the_recipe_with_every_default(finished: Path) -> None:
    stored = finished / "recipe.resolved.yaml"
    recipe = load_recipe(finished.parent / "recipe.yaml")
    assert yaml.safe_load(stored.read_text()) == recipe.plain()
    assert load_recipe(stored) == recipe


def test_the_default_output_is_named_after_the_recipe(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model_dir, data__heldout=0, name="no name")
    monkeypatch.chdir(tmp_path)
    shown = rlprompt("train", recipe, "training.steps=1")
    assert shown.code == 0, shown.err
    assert json.loads((tmp_path / "runs/no name/summary.json").read_text())["steps"] == 1
    assert "no query was held out" in shown.out
    assert "'runs/no name/artifact'" in shown.out


def test_a_name_that_leads_elsewhere_is_refused(model_dir: Path, tmp_path: Path) -> None:
    shown = rlprompt("train", write_recipe(tmp_path, model_dir, name="../outside"))
    assert shown.code == 2
    assert shown.err.startswith("error: the name '../outside' cannot be a folder")


def test_a_folder_with_a_run_is_refused_and_left_alone(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    shown = rlprompt("train", finished.parent / "recipe.yaml", "--output", finished)
    assert shown.code == 2
    assert shown.err == (
        f"error: the output folder '{finished}' holds another run; go on with it (--resume), or "
        "name another folder with --output\n"
    )
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_finished_run_can_be_resumed_without_change(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    shown = rlprompt("train", tmp_path / "recipe.yaml", "-o", run, "--resume")
    assert shown.code == 0, shown.err
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    before, after = (json.loads((r / "summary.json").read_text()) for r in (finished, run))
    assert after["heldout"] == before["heldout"]


def test_a_run_cut_off_after_a_checkpoint_ends_as_if_it_had_not_been(
    finished: Path, tmp_path: Path
) -> None:
    run = copy_of(finished, tmp_path)
    shutil.rmtree(run / "checkpoints/step_000003")
    shutil.rmtree(run / "artifact")
    (run / "summary.json").unlink()
    shown = rlprompt("train", tmp_path / "recipe.yaml", "-o", run, "--resume")
    assert shown.code == 0, shown.err
    rewards = [[row["reward"] for row in read_jsonl(r / "metrics.jsonl")] for r in (finished, run)]
    assert rewards[0] == rewards[1]
    tensors = [(r / "artifact/prompt.safetensors").read_bytes() for r in (finished, run)]
    assert tensors[0] == tensors[1]


def test_a_run_goes_on_after_settings_have_come(finished: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", finished.parent / "recipe.yaml"
    shutil.copytree(finished, run)
    stored = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    del stored["training"]["max_seconds"], stored["evaluation"]["completions_per_query"]
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(stored))
    shown = rlprompt("train", recipe, "-o", run, "--resume")
    # The first was at its default; the second was not, and is named.
    assert shown.code == 2 and "max_seconds" not in shown.err
    assert "evaluation.completions_per_query" in shown.err


def test_resuming_with_another_recipe_names_the_keys(finished: Path) -> None:
    recipe = finished.parent / "recipe.yaml"
    overrides = ["training.steps=9", "seed=1", "rewards.0.weight=2", "sampling.top_k=5"]
    overrides.append("algorithm.kl_coef=0.5")
    shown = rlprompt("train", recipe, *overrides, "-o", finished, "--resume")
    assert shown.code == 2
    assert shown.err == (
        f"error: the run in '{finished}' has another recipe: algorithm.kl_coef (was 0.0, is 0.5), "
        "sampling.top_k (was null, is 5), rewards.0.weight (was 1.0, is 2.0) and 1 more; go on as "
        f"it began with `rlprompt resume {finished}`, or start a new run with another --output\n"
    )


def test_tracking_and_memory_may_change_when_resuming(finished: Path, tmp_path: Path) -> None:
    run = copy_of(finished, tmp_path)
    overrides = ["tracking.trackers=[jsonl]", "training.token_budget=512"]
    shown = rlprompt("train", tmp_path / "recipe.yaml", *overrides, "-o", run, "--resume")
    assert shown.code == 0, shown.err
    stored = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    assert stored["tracking"]["trackers"] == ["jsonl"]


def test_nothing_to_resume_is_an_error_and_makes_no_folder(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    shown = rlprompt("train", recipe, "-o", tmp_path / "run", "--resume")
    assert shown.code == 2
    assert "holds no run to resume" in shown.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_its_first_step_can_be_mended_in_its_folder(
    model_dir: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    good = (tmp_path / "reward.py").read_text()
    (tmp_path / "reward.py").write_text("def reward(completions, **kwargs):\n    return [1.0]\n")
    failed = rlprompt("train", recipe, "-o", tmp_path / "run")
    assert failed.code == 2
    assert "reward 'vowels'" in failed.err
    (tmp_path / "reward.py").write_text(good)
    shown = rlprompt("train", recipe, "training.steps=1", "-o", tmp_path / "run")
    assert shown.code == 0, shown.err
    rows = read_jsonl(tmp_path / "run/evaluation.jsonl")
    assert [(row["step"], row["who"]) for row in rows] == [
        (0, "base"),
        (0, "handwritten"),
        (0, "learned"),
        (1, "learned"),
    ]


def test_two_processes_do_not_train_in_one_folder(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    run = tmp_path / "run"
    run.mkdir()
    hold = (
        "import fcntl, sys\n"
        f"file = open({str(run / '.lock')!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        shown = rlprompt("train", recipe, "-o", run)
        other.communicate("")
    assert shown.code == 2
    assert "another process trains in" in shown.err
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_an_output_that_cannot_be_a_folder_is_refused(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    assert "is a file; name a folder" in rlprompt("train", recipe, "-o", recipe).err
    below = rlprompt("train", recipe, "-o", recipe / "run")
    assert below.code == 2
    assert "cannot be written (Not a directory)" in below.err


def test_a_loss_that_is_not_finite_ends_with_code_1_and_names_the_data(
    model_dir: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model_dir, algorithm={"group_size": 4, "scale_rewards": "none"})
    (tmp_path / "reward.py").write_text(
        "def reward(completions, **kwargs):\n"
        "    return [3e38 if i % 4 else 0.0 for i in range(len(completions))]\n"
    )
    shown = rlprompt("train", recipe, "-o", tmp_path / "run")
    assert shown.code == 1
    assert shown.err.startswith("error: step 1: ")
    assert shown.err.count("\n") == 1
    folder = tmp_path / "run/failed_step_1"
    assert str(folder) in shown.err
    assert len(read_jsonl(folder / "completions.jsonl")) == 8


def test_wrong_input_shows_a_traceback_only_when_debugging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = rlprompt("train", tmp_path / "absent.yaml")
    assert (shown.code, shown.out) == (2, "")
    sentence = f"error: recipe '{tmp_path / 'absent.yaml'}' does not exist; check the path\n"
    assert shown.err == sentence
    monkeypatch.setenv("RLPROMPT_DEBUG", "1")
    shown = rlprompt("train", tmp_path / "absent.yaml")
    assert shown.code == 2
    assert shown.err.startswith("Traceback")
    assert shown.err.endswith(sentence)


def test_control_characters_of_an_input_do_not_reach_the_terminal() -> None:
    shown = rlprompt("train", "a\x1b[31m\nb.yaml")
    assert shown.err == "error: recipe 'a [31m b.yaml' does not exist; check the path\n"


def start_training(recipe: Path, run: Path, *arguments: str) -> subprocess.Popen[str]:
    code = "from rlprompt.cli.main import main; main()"
    command = [sys.executable, "-c", code, "train", str(recipe), "-o", str(run), *arguments]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_run_cleanly_and_it_can_go_on(
    number: signal.Signals, model_dir: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, model_dir, training__steps=8, training__save_every=100)
    (tmp_path / "reward.py").write_text(
        "import pathlib, time\n"
        "def reward(completions, **kwargs):\n"
        f"    if not pathlib.Path({str(tmp_path / 'fast')!r}).exists():\n"
        "        time.sleep(0.5)\n"
        "    return [len(text) / 8 for text in completions]\n"
    )
    run = tmp_path / "run"
    process = start_training(recipe, run, "--stop-exit-code", "85")
    wait_for_rows(run / "metrics.jsonl", 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (85, "")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["stopped_because"] == number.name
    done = summary["steps"]
    assert 2 <= done < 8
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{done:06d}"]
    assert f"stopped by {number.name} after {done} of 8 steps" in out
    assert f"go on with:\n  rlprompt resume {run}\n" in out
    if number != signal.SIGTERM:
        return
    (tmp_path / "fast").touch()
    shown = rlprompt("train", recipe, "-o", run, "--resume")
    assert shown.code == 0, shown.err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["stopped_because"]) == (8, "finished")
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == list(range(1, 9))


def test_auto_resume_starts_a_run_and_goes_on_with_it(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    run = tmp_path / "run"
    for _ in range(2):
        shown = rlprompt("train", recipe, "-o", run, "--auto-resume")
        assert shown.code == 0, shown.err
        assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3]
    shown = rlprompt("train", recipe, "seed=5", "-o", run, "--auto-resume")
    assert shown.code == 2 and "another recipe" in shown.err


def test_a_stop_signal_while_loading_leaves_nothing_behind(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir)
    source = (tmp_path / "reward.py").read_text()
    signals = "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\n"
    (tmp_path / "reward.py").write_text(signals + source)
    shown = rlprompt("train", recipe, "-o", tmp_path / "run", "--stop-exit-code", "85")
    assert shown.code == 85, shown.err
    assert "stopped by SIGUSR1 before the first step" in shown.out
    assert not (tmp_path / "run").exists()


FILLS_THE_DISK = """
own = reward

def reward(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 3:
        try:
            with open({filler!r}, "wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(4096))
        except OSError:
            pass
    return own(completions)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_ends_a_run_with_a_whole_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, model_dir, training__steps=5)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("this machine lets nobody mount a disk")
    plain, filler = (tmp_path / "reward.py").read_text(), disk / "filler"
    (tmp_path / "reward.py").write_text(plain + FILLS_THE_DISK.format(filler=str(filler)))
    try:
        shown = rlprompt("train", recipe, "-o", disk / "run")
        assert shown.code == 1
        assert "No space left on device" in shown.err and "go on with --resume" in shown.err
        assert "Traceback" not in shown.err
        assert load_checkpoint(disk / "run" / "checkpoints").step == 3  # not kept: it maps the file
        filler.unlink()
        (tmp_path / "reward.py").write_text(plain)
        assert rlprompt("train", recipe, "-o", disk / "run", "--resume").code == 0
        assert rlprompt("train", recipe, "-o", tmp_path / "straight").code == 0
        ends = [
            (each / "artifact/prompt.safetensors").read_bytes()
            for each in (disk / "run", tmp_path / "straight")
        ]
        assert ends[0] == ends[1]
    finally:
        subprocess.run(["umount", disk], check=True, timeout=20)
