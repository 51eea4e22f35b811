from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.errors import InputError
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.recipe.yaml_file import apply_override, read_tree

GOOD = """
name: x
data: {rows: [a, b, c, d]}
rewards:
  - path: builtin:length
    options: {max: 1e1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_numbers_with_exponents_are_numbers_everywhere(path: Path) -> None:
    recipe = load_recipe(path, ["rewards.0.options.low=-2E-3", "training.optimizer.lr=1e-2"])
    assert recipe.rewards[0].options == {"max": 10.0, "low": -0.002}
    assert recipe.training.optimizer.lr == 0.01
    assert load_recipe(path, ["name='1e3'"]).name == "1e3"


def test_integers_are_numbers_too(path: Path) -> None:
    optimizer = load_recipe(
        path, ["training.optimizer={lr: 1, betas: [0, 0.5]}"]
    ).training.optimizer
    assert optimizer.lr == 1.0 and optimizer.betas == (0.0, 0.5)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.steps=5", ("training", "steps"), 5),
        ("rewards.0.weight=0.5", ("rewards", 0, "weight"), 0.5),
        ("rewards.0={path: p}", ("rewards", 0, "path"), "p"),
        ("tracking.tags=[a, b]", ("tracking", "tags"), ["a", "b"]),
        ("model.path=a=b", ("model", "path"), "a=b"),
        ("evaluation.handwritten='Be: nice'", ("evaluation", "handwritten"), "Be: nice"),
        ("model.revision=", ("model", "revision"), None),
        (" seed =1", ("seed",), 1),
    ],
)
def test_an_override_sets_one_place(
    path: Path, override: str, key: tuple[str | int, ...], value: Any
) -> None:
    tree: Any = read_tree(path)
    apply_override(tree, override)
    for part in key:
        tree = tree[part]
    assert tree == value


def test_an_override_goes_below_a_key_that_the_file_leaves_empty(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + "training:\n")
    assert load_recipe(file, ["training.steps=7"]).training.steps == 7


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("rewards.0.wieght=2", "unknown key 'rewards.0.wieght'; did you mean 'weight'?"),
        ("trainin.steps=3", "unknown key 'trainin'; did you mean 'training'?"),
        ("training.optimizer.lrr=3", "unknown key 'training.optimizer.lrr'; did you mean 'lr'?"),
        ("reference.txt=x", "'reference.type' is missing; add one of none, initial, text"),
        ("reference={type: text, txt: x}", "unknown key 'reference.txt'; did you mean 'text'?"),
        ("reference={type: text}", "'reference.text' is missing; add it"),
        ("reference.type=foo", "'reference.type' is 'foo'; use none, initial, text"),
        ("model.dtype=Bfloat", "'model.dtype' is 'Bfloat'; did you mean 'bfloat16'?"),
        ("prompt.type=lora", "'prompt.type' is 'lora'; use soft, prefix, text, adapter, sequence"),
        ("rewards=length", "'rewards' must be a list (begin each entry with '- '), given 'length'"),
        ("rewards.0.options=[1]", "'rewards.0.options' must be a mapping of keys, given [1]"),
        ("training.optimizer.betas=[1, 2, 3]", "must be a list of at most 2, given [1, 2, 3]"),
        ("name=5", "'name' must be text (put it in quotes), given 5"),
        ("name=''", "'name' must be text of at least 1 character(s), given ''"),
        ("sampling.top_p=0", "'sampling.top_p' must be above 0.0, given 0"),
        ("sampling.min_p=1", "'sampling.min_p' must be below 1.0, given 1"),
        ("seed=-1", "'seed' must be at least 0, given -1"),
        ("tracking.trackers=[wandbb]", "'tracking.trackers.0' is 'wandbb'; did you mean 'wandb'?"),
        ("prompt.num_virtual_tokens=true", "must be an integer, given True"),
        ("prompt.num_virtual_tokens='16'", "must be an integer, given '16'"),
        ("training.optimizer.lr='0.1'", "'training.optimizer.lr' must be a number, given '0.1'"),
        ("training.optimizer.betas=[true, 1]", "betas.0' must be a number, given True"),
        ("rewards.0.weight=true", "'rewards.0.weight' must be a number, given True"),
        ("model.trust_remote_code=1", "must be true or false, given 1"),
        ("model.trust_remote_code=maybe", "must be true or false, given 'maybe'"),
        ("data.rows=5", "'data.rows' must be a list (begin each entry with '- '), given 5"),
        ("model.path=[" + "a, " * 90 + "]", "given ['a', 'a', 'a', 'a',"),
    ],
)
def test_a_wrong_override_is_named_with_key_and_remedy(
    path: Path, override: str, sentence: str
) -> None:
    text = message(path, "seed=3", override)
    assert text.startswith(f"override '{override}': ")
    assert sentence in text
    assert len(text) < len(override) + 150


def test_the_file_is_named_when_it_is_at_fault(path: Path) -> None:
    path.write_text(GOOD + "training: {stepz: 3, steps: many}\n")
    expected = f"{path}: unknown key 'training.stepz'; did you mean 'steps'? (1 more)"
    assert message(path) == expected
    assert message(path, "training.save_every=2", "seed=1") == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name: a: b\n", "line 1, column 8: mapping values are not allowed here; mend that line"),
        ("name: x\nname: y\n", "line 2, column 1: the key 'name' is given twice"),
        ("training:\n  steps: 1\n  steps: 2\n", "line 3, column 3: the key 'steps' is given twice"),
        ("name: *other\n", "found undefined alias 'other'"),
        ("name: !!python/object:os.system x\n", "could not determine a constructor for the tag"),
        ("name: \x00\n", "is not valid YAML"),
        ("- name\n", "is not a mapping of keys"),
        ("", "is not a mapping of keys"),
        ("5: x\n", "the key 5 is not text; put it in quotes or remove it"),
    ],
)
def test_wrong_yaml_is_told_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert sentence in message(path)
    assert str(path) in message(path)


def test_a_recipe_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("name: caf\u00e9\n".encode("latin-1"))
    assert message(path) == f"recipe '{path}' is not UTF-8 text; save it with that encoding"


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\n"
        "data: {rows: [a, b, c, d]}\n"
        "rewards:\n"
        "  - &one {path: 'builtin:length', name: a, options: {max: 5}}\n"
        "  - {<<: *one, name: b, weight: 2}\n"
    )
    recipe = load_recipe(path)
    assert [reward.name for reward in recipe.rewards] == ["a", "b"]
    assert recipe.rewards[1].options == {"max": 5}


def test_a_path_of_a_template_becomes_its_text(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{%- for m in messages %}\n{{ m.content }}\t \n{%- endfor %}\n"
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "mine.jinja").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the path is relative to the recipe
    recipe = load_recipe(path, ["model.template=chats/mine.jinja"])
    assert recipe.model.template == text
    stored = tmp_path / "elsewhere" / "recipe.yaml"
    stored.write_text(yaml.safe_dump(recipe.plain(), sort_keys=False, width=100))
    assert load_recipe(stored) == recipe
    assert load_recipe(path, ["model.template=plain"]).model.template == "plain"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("none.jinja", "check the path, relative to the recipe's folder"), ("no.jinja", "no Jinja")],
)
def test_a_template_that_cannot_be_used_is_named(path: Path, name: str, sentence: str) -> None:
    (path.parent / "no.jinja").write_text("plain\n")
    text = message(path, f"model.template={name}")
    assert sentence in text and name in text


def test_the_resolved_recipe_is_a_recipe_again(path: Path) -> None:
    recipe = load_recipe(path, ["algorithm.kl_coef=0.1", "reference={type: text, text: Be nice}"])
    assert Recipe.model_validate(recipe.plain()) == recipe
