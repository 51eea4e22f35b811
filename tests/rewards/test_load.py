from __future__ import annotations

import functools
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards import BUILTIN, RewardSettings, load_reward

SOURCE = """
from dataclasses import dataclass

NOT_CALLABLE = 3

def reward(completions, bonus=0.0, **kwargs):
    return [bonus + len(text) for text in completions]

def strict(completions, *, bonus: float):
    return [bonus] * len(completions)

@dataclass
class Scaled:
    factor: float = 1.0
    def __call__(self, completions, **kwargs):
        return [self.factor] * len(completions)

class Checked:
    def __init__(self, low):
        if low < 0:
            raise ValueError("low is negative")
    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)

class Silent:
    pass

def get_reward(value=1.0):
    return Scaled(factor=value)

def get_nothing():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def load(folder: Path, path: str, **options: Any) -> Any:
    return load_reward(RewardSettings(path=path, name="r", options=options), folder, BUILTIN)


def refusal(folder: Path, path: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, path, **options)
    message = str(caught.value)
    assert message.startswith("reward 'r': ")
    assert "\n" not in message
    return message


def test_function_of_a_file_and_its_bound_options(folder: Path) -> None:
    assert load(folder, "mine.py:reward")(completions=["ab"]) == [2.0]
    assert load(folder, "mine.py:reward", bonus=1.5)(completions=["ab"]) == [3.5]
    assert load(folder, "mine.py:strict", bonus=4.0)(completions=["ab"]) == [4.0]


def test_class_is_constructed_and_factory_is_called(folder: Path) -> None:
    assert load(folder, "mine.py:Scaled", factor=3.0)(completions=["ab"]) == [3.0]
    assert load(folder, "mine.py:get_reward", value=2.0)(completions=["ab"]) == [2.0]
    assert load(folder, "mine.py:get_reward")(completions=["ab"]) == [1.0]


def test_absolute_path_and_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert load(elsewhere, f"{folder / 'mine.py'}:reward")(completions=["ab"]) == [2.0]
    monkeypatch.chdir(folder)
    assert load(elsewhere, "mine.py:reward")(completions=["ab"]) == [2.0]


def test_the_recipes_folder_comes_before_the_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path_factory.mktemp("cwd")
    (cwd / "mine.py").write_text("def reward(completions): return [-1.0]")
    monkeypatch.chdir(cwd)
    assert load(folder, "mine.py:reward")(completions=["ab"]) == [2.0]


def test_dotted_paths_with_and_without_a_colon(folder: Path) -> None:
    by_dot = load(folder, "rlprompt.rewards.rules.sentence.Sentence", min_words=1)
    by_colon = load(folder, "rlprompt.rewards.rules.sentence:Sentence", min_words=1)
    assert by_dot == by_colon
    assert by_dot(completions=["Yes."]) == [1.0]


def test_file_is_loaded_once_until_it_changes_and_pickles(folder: Path) -> None:
    first = load(folder, "mine.py:reward")
    assert load(folder, "mine.py:reward") is first
    assert pickle.loads(pickle.dumps(first)) is first
    (folder / "mine.py").write_text("def reward(completions): return [9.0]")
    assert load(folder, "mine.py:reward")(completions=["ab"]) == [9.0]
    assert first(completions=["ab"]) == [2.0]
    assert str(folder) not in sys.path


def test_partial_options_pickle(folder: Path) -> None:
    bound = load(folder, "mine.py:reward", bonus=1.0)
    assert isinstance(bound, functools.partial)
    assert pickle.loads(pickle.dumps(bound))(completions=["ab"]) == [3.0]


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("missing.py:reward", ["there is no file", "missing.py", "recipe's folder"]),
        ("mine.py:", ["has no object ''"]),
        ("mine.py:rewrad", ["has no object 'rewrad'", "did you mean 'reward'?"]),
        ("mine.py:zzz", ["has no object 'zzz'", "choose from", "Scaled"]),
        ("mine.py:NOT_CALLABLE", ["is of type int, which cannot be called"]),
        (
            "mine.py:Silent",
            ["makes an object of type Silent, which cannot be called", "define __call__"],
        ),
        ("mine.py:get_nothing", ["makes an object of type int, which cannot be called"]),
        ("builtin:lenght", ["there is no built-in 'lenght'", "did you mean 'length'?"]),
        ("no_such_package.x:reward", ["there is no module 'no_such_package'", "install it"]),
        ("rlprompt.rewards.nothing:reward", ["there is no module 'rlprompt.rewards.nothing'"]),
        ("rlprompt.rewards.rules.sentence:Sentense", ["did you mean 'Sentence'?"]),
        ("length", ["is not a reward path", "did you mean 'length'?"]),
        ("folder/mine:reward", ["is not the path of an object", "path/file.py:object"]),
    ],
)
def test_wrong_paths(folder: Path, path: str, parts: list[str]) -> None:
    message = refusal(folder, path)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("path", "options", "parts"),
    [
        ("mine.py:reward", {"bonsu": 1}, ["no option 'bonsu'", "did you mean 'bonus'?"]),
        ("mine.py:reward", {"completions": 1}, ["'completions' is reserved"]),
        ("mine.py:Scaled", {"facto": 1}, ["no option 'facto'", "did you mean 'factor'?"]),
        ("mine.py:Checked", {}, ["wrong options for Checked", "'low'"]),
        (
            "mine.py:Checked",
            {"low": -1},
            ["raised ValueError: low is negative", "mine.py:21 (raise"],
        ),
        ("mine.py:get_reward", {"val": 1}, ["no option 'val'", "did you mean 'value'?"]),
        ("builtin:length", {"maximum": 3}, ["no option 'maximum'", "did you mean 'max'?"]),
        ("builtin:length", {"max": "many"}, ["option 'max' is wrong", "'many'"]),
        ("builtin:length", {}, ["wrong options for Length", "'max'"]),
        ("builtin:length", {"max": 3, "min": 5}, ["min 5 is above max 3; swap them"]),
        ("builtin:format", {"kind": "regex", "pattern": "("}, ["pattern '(' is not valid"]),
        ("builtin:format", {"kind": "json", "pattern": "x"}, ["pattern belongs to kind: regex"]),
        ("builtin:keyword", {}, ["set any_of, all_of or none_of"]),
        ("builtin:keyword", {"any_of": ["a*"], "regex": True}, ["matches an empty text"]),
        ("builtin:refusal", {}, ["set either want or column"]),
        ("builtin:exact", {"labels": ["A", "a"]}, ["label 'A' is empty or equals another"]),
        ("builtin:language", {"language": "xx"}, ["option 'language' is wrong", "'xx'"]),
    ],
)
def test_wrong_options(folder: Path, path: str, options: dict[str, Any], parts: list[str]) -> None:
    message = refusal(folder, path, **options)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("x = 1\ny = undefined_name\n", ["raised NameError", "bad.py:2 (y = undefined_name)"]),
        ("def reward(:\n", ["raised SyntaxError", "bad.py:1 (def reward(:)"]),
        ("import json\njson.loads('{')\n", ["JSONDecodeError", "bad.py:2 (json.loads('{'))"]),
        ("import not_installed_xyz\n", ["ModuleNotFoundError", "install 'not_installed_xyz'"]),
        ("import mine\n", ["cannot import its neighbours"]),
        ("raise SystemExit(2)\n", ["raised SystemExit", "bad.py:1"]),
    ],
)
def test_import_that_raises_shows_the_line(folder: Path, source: str, parts: list[str]) -> None:
    (folder / "bad.py").write_text(source)
    before = set(sys.modules)
    message = refusal(folder, "bad.py:reward")
    assert all(part in message for part in parts), message
    assert not [name for name in set(sys.modules) - before if name.startswith("rlprompt_user_")]
