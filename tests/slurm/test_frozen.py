"""What a job runs is what was submitted: recipe, the user's code, rlprompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rlprompt
from rlprompt.errors import InputError
from rlprompt.recipe.schema import load_recipe
from rlprompt.runs.changes import Change, is_of_server
from rlprompt.runs.claim_folder import recipe_folder
from rlprompt.slurm.frozen import Frozen, differing_version, freeze
from rlprompt.user_code import load_object
from tests.cli.runs import rlprompt as run_command
from tests.cli.runs import write_recipe


def frozen_of(folder: Path, *overrides: str, with_package: bool = False) -> Frozen:
    path = write_recipe(folder, folder / "model")
    recipe = load_recipe(path, overrides)
    jobs = folder / "run" / "slurm"
    made = freeze(path, [recipe], [list(overrides)], jobs, with_package=with_package)
    made.write()
    return made


def test_the_recipe_is_the_one_that_was_submitted(tmp_path: Path) -> None:
    frozen = frozen_of(tmp_path)
    before = load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("name: other")
    assert load_recipe(frozen.recipe) == before
    assert recipe_folder(frozen.recipe) == tmp_path


def test_a_reward_is_the_one_that_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = frozen_of(tmp_path)
    reward = tmp_path / "reward.py"
    before = load_object("reward.py:reward", tmp_path)(completions=["aeiou"])
    for change in ("edited", "deleted"):
        if change == "edited":
            reward.write_text("def reward(completions, **kwargs): return [99.0]\n")
            assert load_object("reward.py:reward", tmp_path)(completions=["a"]) == [99.0]
        else:
            reward.unlink()
        with monkeypatch.context() as job:
            job.setenv("RLPROMPT_FROZEN", str(frozen.code.folder))
            found = load_object("reward.py:reward", tmp_path)
        assert found(completions=["aeiou"]) == before, change
        assert found.__code__.co_filename == str(reward)
    assert not list(tmp_path.glob("__pycache__/*99*"))


def test_rewards_of_overrides_are_kept_too(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("def reward(completions, **kwargs): return [1.0]\n")
    frozen = frozen_of(tmp_path, "rewards.0.path=other.py:reward")
    files = json.loads((frozen.code.folder / "files.json").read_text())
    assert [Path(file).name for file in files] == ["other.py"]
    told = json.loads((frozen.code.folder / "submission.json").read_text())
    assert told["overrides"] == [["rewards.0.path=other.py:reward"]]
    assert told["rlprompt"]["version"] == rlprompt.__version__


def test_a_template_is_the_one_that_was_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    frozen = frozen_of(tmp_path, "model.template=chat.jinja")
    template.write_text("{{ 'edited' }}")
    monkeypatch.setenv("RLPROMPT_FROZEN", str(frozen.code.folder))
    recipe = load_recipe(frozen.recipe, ["model.template=chat.jinja"])
    assert recipe.model.template == "{{ messages[0].content }}"


def test_equal_submissions_share_a_folder_and_others_do_not(tmp_path: Path) -> None:
    first, again = frozen_of(tmp_path), frozen_of(tmp_path)
    other = frozen_of(tmp_path, "seed=7")
    assert first.code.folder == again.code.folder != other.code.folder


def test_the_copy_of_rlprompt_runs_though_a_checkout_is_the_working_directory(
    tmp_path: Path,
) -> None:
    frozen = frozen_of(tmp_path, with_package=True)
    assert frozen.code.package is not None
    code = "import rlprompt; print(rlprompt.__file__)"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=Path(rlprompt.__file__).parents[1],
        env={**os.environ, "PYTHONPATH": f"{frozen.code.package}:."},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shown.stdout.strip() == str(frozen.code.package / "rlprompt" / "__init__.py")


def test_another_rlprompt_on_the_nodes_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = frozen_of(tmp_path)
    assert differing_version() == ""
    monkeypatch.setenv("RLPROMPT_FROZEN", str(frozen.code.folder))
    assert differing_version() == ""
    path = frozen.code.folder / "submission.json"
    told = json.loads(path.read_text())
    told["rlprompt"]["code"] = "0123456789ab"
    path.write_text(json.dumps(told))
    assert "was submitted with rlprompt" in differing_version()
    path.write_text("[]")
    assert "cannot be read" in differing_version()


def test_a_folder_of_no_submission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLPROMPT_FROZEN", str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="submit the job again"):
        load_object("reward.py:reward", tmp_path)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("http://10.0.0.1:80/x", "http://10.0.0.2:80/x", True),
        ("at-n1", "at-10.0.0.2", True),
        ("http://[::1]:80", "http://10.0.0.2:80", True),
        ("http://10.0.0.1:81/x", "http://10.0.0.2:80/x", False),
        ("http://10.0.0.1:80/y", "http://10.0.0.2:80/x", False),
        ("http://10.0.0.1/a:80/x", "http://10.0.0.2:80/x", False),
        ("n1", "n3", False),
        (3, "10.0.0.2", False),
    ],
    ids=["url", "name", "ipv6", "port", "path", "two-parts", "not-the-server", "no-text"],
)
def test_only_the_address_of_the_own_server_may_move(before: object, now: str, same: bool) -> None:
    assert is_of_server(Change("rewards.0.options.url", before, now), "10.0.0.2") is same
    assert not is_of_server(Change("rewards.0.options.url", before, now), None)


def test_a_run_goes_on_though_its_server_has_moved(
    tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, model_dir, training__steps=2)
    began = ("train", recipe, "--output", tmp_path / "run", "--auto-resume")
    assert run_command(*began, "name=at-10.0.0.1", "training.steps=1").code == 0
    refused = run_command(*began, "name=at-10.0.0.2")
    assert refused.code == 2 and "another recipe" in refused.err
    monkeypatch.setenv("RLPROMPT_SERVER", "10.0.0.2")
    gone_on = run_command(*began, "name=at-10.0.0.2")
    assert gone_on.code == 0, gone_on.err
    assert "name: at-10.0.0.2" in (tmp_path / "run" / "recipe.resolved.yaml").read_text()
