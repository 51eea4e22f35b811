"""examples/extend: classes of the user's own train, resume, are evaluated and talked to."""

from __future__ import annotations

import csv
import itertools
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from jsonschema import Draft202012Validator
from safetensors.torch import load_file

import rlprompt as public
from examples.extend.algorithm import MaxRL, MaxRLSettings
from rlprompt.algorithms.base import BatchView
from rlprompt.cli.commands.schema import recipe_schema
from rlprompt.files import read_jsonl
from rlprompt.recipe.schema import Recipe, load_recipe
from tests.cli.runs import Shown, rlprompt
from tests.fixtures.tiny import save_tiny

FOLDER = Path(__file__).parents[2] / "examples" / "extend"
RECIPE = FOLDER / "recipe.yaml"
CLASS = f"{FOLDER / 'prompt.py'}:LowRankPrompt"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Sequence[str]:
    """Overrides by which the example runs on a tiny model in a second."""
    return (
        f"model.path={save_tiny(tmp_path_factory.mktemp('tiny') / 'model')}",
        "model.dtype=float32",
        "model.device=cpu",
        "sampling.max_tokens=8",
        "training.steps=4",
        "training.save_every=2",
        "evaluation.every=4",
        "evaluation.max_queries=2",
        "engine.log_every=2",
    )


@pytest.fixture(scope="module")
def shown(tiny: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, Path]:
    """What a finished run has said, and its folder, which is not to be written to."""
    folder = tmp_path_factory.mktemp("extend") / "run"
    shown = rlprompt("train", RECIPE, *tiny, "--output", folder)
    assert shown.code == 0, shown.err
    return shown, folder


@pytest.fixture(scope="module")
def finished(shown: tuple[Shown, Path]) -> Path:
    return shown[1]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "artifact" / "prompt.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_all_of_its_parts_take_part(shown: tuple[Shown, Path]) -> None:
    said, run = shown
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all("frac_groups_unsolved" in row for row in rows)  # the algorithm's
    info = json.loads((run / "artifact" / "prompt.json").read_text())
    assert (info["representation"], info["num_virtual_tokens"]) == ("low_rank", 12)
    assert tensors(run)["right"].shape[0] == 2
    assert "tokens, " in said.out and "per second" in said.out  # the engine's line in the log
    with (run / "metrics.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["step", "reward", "completions/mean_length", "loss"]
    assert [float(line[1]) for line in table[1:]] == [row["reward"] for row in rows]
    assert f"--prompt-class {CLASS}" in said.out.replace("\n", "")
    assert "--prompt-class prompt.py:LowRankPrompt" in (run / "artifact/README.md").read_text()


def test_the_wrapped_engine_draws_what_the_native_one_draws(
    finished: Path, tiny: Sequence[str], tmp_path: Path
) -> None:
    plain = [each for each in tiny if not each.startswith("engine.")]
    run = tmp_path / "run"
    shown = rlprompt("train", RECIPE, *plain, "engine={type: native}", "--output", run)
    assert shown.code == 0, shown.err
    assert same(tensors(run), tensors(finished))


def test_a_resumed_run_is_the_uninterrupted_one(
    finished: Path, tiny: Sequence[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
    shown = rlprompt("train", RECIPE, *tiny, "--output", run, "--resume")
    assert shown.code == 0, shown.err
    assert same(tensors(run), tensors(finished))
    assert (run / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()
    other = rlprompt("train", RECIPE, *tiny, "algorithm.strength=0", "--output", run, "--resume")
    assert "has another recipe: algorithm.strength (was 1.0, is 0" in other.err


def test_its_artifact_is_evaluated_with_the_recipe(finished: Path, tiny: Sequence[str]) -> None:
    changes = [word for each in tiny for word in ("--set", each)]
    shown = rlprompt("eval", finished / "artifact", "--recipe", RECIPE, *changes)
    assert shown.code == 0, shown.err
    report = json.loads(shown.out)
    assert report["representation"] == "low_rank"
    summary = json.loads((finished / "summary.json").read_text())
    assert report["heldout"]["prompt"]["reward"] == summary["heldout_reward_after"]
    soft = ("--set", "prompt={type: soft}")
    shown = rlprompt("eval", finished / "artifact", "--recipe", RECIPE, *changes, *soft)
    assert "holds a prompt of the kind 'low_rank'" in shown.err


def test_one_talks_to_its_artifact_by_naming_the_class(finished: Path) -> None:
    query = ("--query", "what is rain", "--max-tokens", "4")
    shown = rlprompt("chat", finished / "artifact", "--prompt-class", CLASS, *query)
    assert shown.code == 0, shown.err
    prompt = public.load_prompt(finished, prompt_classes=[CLASS])
    assert prompt.kind == "low_rank"
    answer = prompt.generate("what is rain", max_tokens=4)
    assert shown.out.startswith(answer.split("\n")[0][:3])


def test_an_artifact_alone_imports_nothing(finished: Path, tmp_path: Path) -> None:
    """It may come from a stranger, and so may the file that its recipe names."""
    (tmp_path / "prompt.py").write_text("import os\nos.mkdir('imported')\n")
    shutil.copytree(finished / "artifact", tmp_path / "artifact")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        shown = rlprompt("chat", "artifact", "--query", "what is rain")
        assert shown.code == 2
        assert "if it is your own, name its class" in shown.err
        with pytest.raises(public.InputError, match="of the kind 'low_rank'"):
            public.load_prompt("artifact")
        assert not Path("imported").exists()


def test_a_stored_recipe_imports_nothing(tiny: Sequence[str], tmp_path: Path) -> None:
    """What resuming compares is read with the classes of the recipe on the command line only."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('imported')\n")
    stored = load_recipe(RECIPE, tiny).plain()
    stored["algorithm"]["type"] = f"{tmp_path / 'evil.py'}:Evil"
    (run / "recipe.resolved.yaml").write_text(yaml.safe_dump(stored))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        shown = rlprompt("train", RECIPE, *tiny, "--output", run, "--resume")
    assert "has another recipe: algorithm.type" in shown.err
    assert not (tmp_path / "imported").exists()


def test_its_recipe_is_written_and_read_again(tiny: Sequence[str]) -> None:
    recipe = load_recipe(RECIPE, tiny)
    assert isinstance(recipe, Recipe)
    assert type(recipe).model_validate(recipe.plain()) == recipe == load_recipe(RECIPE, tiny)
    assert recipe.plain()["algorithm"] == {
        "type": "algorithm.py:MaxRL",
        "num_epochs": 1,
        "num_minibatches": 1,
        "group_size": 4,
        "strength": 1.0,
    }
    assert recipe.plain()["tracking"]["trackers"][0] == "console"
    tree = yaml.safe_load(RECIPE.read_text())
    assert list(Draft202012Validator(recipe_schema()).iter_errors(tree)) == []
    tree["algorithm"]["type"] = "maxrl"
    (error,) = Draft202012Validator(recipe_schema()).iter_errors(tree)
    assert list(error.absolute_path) == ["algorithm", "type"]


def test_members_of_a_population_may_be_of_it(tiny: Sequence[str], tmp_path: Path) -> None:
    members = [
        {"name": "own", "changes": {"prompt.rank": 1}},
        {"name": "soft", "changes": {"prompt": {"type": "soft", "num_virtual_tokens": 4}}},
        {"name": "again", "changes": {"prompt": {"type": CLASS, "num_virtual_tokens": 4}}},
    ]
    changes = (*tiny, "training.steps=6", "training.save_every=1", "prompt={type: soft}")
    alone = load_recipe(RECIPE, [*changes, f"population={json.dumps([members[1], members[2]])}"])
    assert list(alone.own_prompts) == [CLASS]
    changes = (*changes[:-1], f"population={json.dumps(members)}")
    shown = rlprompt("train", RECIPE, *changes, "--output", tmp_path / "run")
    assert shown.code == 0, shown.err
    folder = tmp_path / "run" / "members"
    kinds = [
        json.loads((folder / name / "artifact" / "prompt.json").read_text())
        for name in ("own", "soft", "again")
    ]
    assert [each["representation"] for each in kinds] == ["low_rank", "soft", "low_rank"]


def test_it_can_be_part_of_a_sequence(tiny: Sequence[str], tmp_path: Path) -> None:
    part = {"type": "prompt.py:LowRankPrompt", "num_virtual_tokens": 3}
    sequence = {"type": "sequence", "parts": [{"type": "text", "text": "Be nice."}, part]}
    run = tmp_path / "run"
    shown = rlprompt("train", RECIPE, *tiny, f"prompt={json.dumps(sequence)}", "--output", run)
    assert shown.code == 0, shown.err
    assert {"1/left", "1/right", "1/start"} <= tensors(run).keys()
    chat = ("chat", run / "artifact", "--query", "what is rain", "--max-tokens", "4")
    assert "of the kind 'low_rank'" in rlprompt(*chat).err
    assert rlprompt(*chat, "--prompt-class", CLASS).code == 0
    misspelt = {**sequence, "parts": [{"type": "text", "text": "a"}, {**part, "rnak": 2}]}
    shown = rlprompt("train", RECIPE, *tiny, f"prompt={json.dumps(misspelt)}")
    assert "unknown key 'prompt.parts.1.rnak'; did you mean 'rank'?" in shown.err


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.strenght=1", "unknown key 'algorithm.strenght'; did you mean 'strength'?"),
        ("algorithm.strength=2", "'algorithm.strength' must be at most 1.0, given 2"),
        ("algorithm.num_epochs=0", "'algorithm.num_epochs' must be at least 1, given 0"),
        ("prompt.rank=two", "'prompt.rank' must be an integer, given 'two'"),
        ("engine.log_evry=1", "unknown key 'engine.log_evry'; did you mean 'log_every'?"),
        (
            "tracking.trackers.1.colums=[loss]",
            "unknown key 'tracking.trackers.1.colums'; did you mean 'columns'?",
        ),
        ("tracking.trackers.0=jsnl", "'tracking.trackers.0' is 'jsnl'; did you mean 'jsonl'?"),
    ],
)
def test_its_settings_are_checked_like_built_in_ones(
    override: str, sentence: str, tiny: Sequence[str]
) -> None:
    shown = rlprompt("train", RECIPE, *tiny, override)
    assert shown.code == 2
    assert sentence in shown.err


def advantages(rewards: torch.Tensor, strength: float) -> torch.Tensor:
    count = rewards.numel()
    algorithm = MaxRL(MaxRLSettings(group_size=count, strength=strength), max_tokens=1)
    lengths = torch.ones(count, dtype=torch.int64)
    view = BatchView(rewards, lengths, torch.ones(count, dtype=torch.bool), count)
    return algorithm.signal(view).advantages


def test_maxrl_follows_the_likelihood_of_success() -> None:
    """Exactly, over all outcomes of a coin: its first G - 1 terms of grad log p / grad p."""
    p, count = 0.3, 5
    total = 0.0
    for outcome in itertools.product((0.0, 1.0), repeat=count):
        rewards = torch.tensor(outcome)
        chance = math.prod(p if hit else 1 - p for hit in outcome)
        slopes = torch.where(rewards > 0, 1 / p, -1 / (1 - p))  # grad log-probability / grad p
        total += chance * float((advantages(rewards, 1.0) * slopes).mean())
    assert total == pytest.approx(sum((1 - p) ** k for k in range(count - 1)), rel=1e-5)


def test_maxrl_without_strength_is_a_group_baseline() -> None:
    rewards = torch.tensor([0.5, 0.25, math.nan, 0.0])
    assert advantages(rewards, 0.0).tolist() == pytest.approx([0.25, 0.0, 0.0, -0.25])
    with pytest.raises(public.InputError, match="give rewards of at least 0"):
        advantages(torch.tensor([1.0, -1.0]), 1.0)


def test_a_searcher_of_ones_own_runs_and_resumes(tiny: Sequence[str], tmp_path: Path) -> None:
    recipe = FOLDER / "search.yaml"
    changes = [each for each in tiny if not each.startswith("engine.")]
    whole, again = tmp_path / "whole", tmp_path / "again"
    shown = rlprompt("train", recipe, *changes, "--output", whole)
    assert shown.code == 0, shown.err
    tried = json.loads((whole / "summary.json").read_text())["candidates"]
    assert {row["origin"] for row in tried} == {"start", "swap"}
    shutil.copytree(whole, again)
    shutil.rmtree(sorted((again / "checkpoints").iterdir())[-1])
    shown = rlprompt("train", recipe, *changes, "--output", again, "--resume")
    assert shown.code == 0, shown.err
    assert json.loads((again / "summary.json").read_text())["candidates"] == tried
    shown = rlprompt("train", recipe, *changes, "search.phrase=[[a]]")
    assert "unknown key 'search.phrase'; did you mean 'phrases'?" in shown.err
    shown = rlprompt("train", recipe, *changes, "prompt={type: soft}")
    assert "search.type: searcher.py:Climb starts from a prompt of type text" in shown.err
