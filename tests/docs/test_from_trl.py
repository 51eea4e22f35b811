"""docs/from_trl.md: names of TRL and PEFT beside ours, from the table that error messages use."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.errors import InputError
from rlprompt.recipe.hints import (
    FOREIGN_KINDS,
    FOREIGN_NAMES,
    Ours,
    elsewhere,
    foreign_hint,
    key_paths,
    kind_hint,
)
from rlprompt.recipe.schema import Recipe, recipe_of_tree
from tests.docs.pages import DOCS, check_page, code

NAMES_HEADING = "## Names\n"
"""The part of the page below it is written here; what stands above is written by hand."""
TAIL = """
A key that stands elsewhere in a recipe is named with its place (`kl_coef` at the top: "did you mean
'algorithm.kl_coef' or 'search.kl_coef'?"), and a misspelt one with the nearest.
"""
FROM_CONFIGS = ("train_dataset", "eval_dataset", "prompt", "model", "reward_funcs", "peft_config")
"""Arguments of trainers and columns, not of configurations."""
OTHER_TRAINERS = {
    "num_ppo_epochs", "num_mini_batches", "cliprange", "cliprange_value", "vf_coef", "lam", "gamma",
    "whiten_rewards", "missing_eos_penalty", "kl_estimator", "reward_model_path",
    "max_new_tokens", "min_new_tokens", "chat_template", "max_prompt_length", "reward_kwargs",
    "warmup_ratio", "early_stopping_patience",
}  # fmt: skip
"""Of TRL's PPOConfig, of earlier releases, of `generate`, and of transformers' callbacks."""


def cell(ours: Ours) -> str:
    keys = ", ".join(code(key) for key in ours.keys) or "none"
    return f"{keys} | {ours.note.replace('|', chr(92) + '|')}"


def page() -> str:
    head, heading, _ = (DOCS / "from_trl.md").read_text(encoding="utf-8").partition(NAMES_HEADING)
    parts = [head + heading]
    for section, names in FOREIGN_NAMES.items():
        owner = "PEFT" if section == "PEFT" else "TRL"
        parts.append(f"### {section}\n\n| {owner} | here | |\n|---|---|---|")
        parts += [f"| {code(name)} | {cell(ours)} |" for name, ours in names.items()]
        parts.append("")
    return "\n".join(parts).rstrip() + "\n" + TAIL


def test_the_page_is_current() -> None:
    check_page("from_trl.md", page())


def test_every_key_on_the_right_is_one_of_a_recipe() -> None:
    known = set(key_paths(Recipe.model_json_schema()))
    for names in FOREIGN_NAMES.values():
        for name, ours in names.items():
            assert set(ours.keys) <= known, name
            assert ours.keys or ours.note, name


def test_every_name_on_the_left_is_one_of_theirs() -> None:
    peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
    configs = [
        *(trl.GRPOConfig, trl.RLOOConfig, trl.DPOConfig, trl.SFTConfig, trl.ModelConfig),
        *(trl.ScriptArguments, peft.PromptTuningConfig, peft.PrefixTuningConfig),
        *(peft.LoraConfig, peft.IA3Config),
    ]
    theirs = {field.name for config in configs for field in dataclasses.fields(config)}
    named = {name for names in FOREIGN_NAMES.values() for name in names}
    assert named - theirs - OTHER_TRAINERS == set(FROM_CONFIGS)


def recipe_on_page() -> dict[str, Any]:
    text = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    tree = yaml.safe_load(block[1])
    assert isinstance(tree, dict)
    return tree


def test_the_two_runs_of_the_page_have_the_same_batches() -> None:
    trl = pytest.importorskip("trl")
    text = (DOCS / "from_trl.md").read_text(encoding="utf-8")
    call = re.search(r"GRPOConfig\((.*?)\n\)", text, re.DOTALL)
    assert call is not None
    arguments: dict[str, Any] = eval(f"dict({call[1]})")  # the text of our own page
    theirs = trl.GRPOConfig(**arguments, output_dir="unused", bf16=False)
    ours = Recipe(**recipe_on_page())
    groups = theirs.generation_batch_size // theirs.num_generations
    assert ours.training.queries_per_step == groups
    assert getattr(ours.algorithm, "group_size", None) == theirs.num_generations
    updates = ours.algorithm.num_epochs * ours.algorithm.num_minibatches
    assert ours.training.steps * updates == theirs.max_steps
    assert ours.training.optimizer.lr == theirs.learning_rate
    assert [reward.weight for reward in ours.rewards] == theirs.reward_weights


def told(tree: dict[str, Any]) -> str:
    plain = {"name": "x", "data": {"rows": ["a", "b"]}, "rewards": [{"path": "builtin:length"}]}
    with pytest.raises(InputError) as caught:
        recipe_of_tree(plain | tree, Path(), lambda place: "recipe.yaml")
    return str(caught.value).removeprefix("recipe.yaml: ")


def test_a_name_of_theirs_is_answered_with_ours() -> None:
    schema = Recipe.model_json_schema()
    for section, names in FOREIGN_NAMES.items():
        owner = "PEFT" if section == "PEFT" else "TRL"
        for name, ours in names.items():
            hint = foreign_hint(name, schema)
            expected = f"is {' and '.join(ours.keys)} here" if ours.keys else "has no counterpart: "
            assert hint.startswith(f"{owner}'s {name} {expected}")


def test_examples_of_the_sentences() -> None:
    assert told({"beta": 0.1}) == "unknown key 'beta'; TRL's beta is algorithm.kl_coef here"
    assert told({"algorithm": {"beta": 0.1}}).endswith("TRL's beta is algorithm.kl_coef here")
    assert told({"training": {"learning_rate": 1}}).startswith(
        "unknown key 'training.learning_rate'; TRL's learning_rate is training.optimizer.lr here"
    )
    sentence = told({"algorithm": {"epsilon": 0.2}})
    assert "TRL's epsilon is algorithm.clip_low and algorithm.clip_high here" in sentence
    assert "PEFT's prompt_tuning_init_text is prompt.init_text here" in told(
        {"prompt": {"prompt_tuning_init_text": "Hi"}}
    )


def test_a_key_of_another_place_is_named_with_its_place() -> None:
    places = "'algorithm.kl_coef' or 'search.kl_coef'"
    assert told({"kl_coef": 1}) == f"unknown key 'kl_coef'; did you mean {places}?"
    assert told({"training": {"lr": 1}}).endswith("did you mean 'training.optimizer.lr'?")
    assert "'sampling.max_tokens'" in told({"max_tokens": 8})
    assert told({"trainin": {}}).endswith("did you mean 'training'?")
    schema = Recipe.model_json_schema()
    assert elsewhere("type", "sampling.type", schema) == ""  # too many places to say anything
    assert foreign_hint("nothing_of_theirs", schema) == ""


def test_a_key_of_another_type_is_said_to_be_one() -> None:
    for tree, place in (
        ({"algorithm": {"gamma": 1.0}}, "algorithm.gamma"),
        ({"algorithm": {"normalize_advantages": True}}, "algorithm.normalize_advantages"),
        ({"prompt": {"rank": 4}}, "prompt.rank"),
    ):
        kind = f"{place.partition('.')[0]}.type"
        assert told(tree).startswith(f"unknown key '{place}', which another {kind} has; known keys")
    assert told({"augment": [{"situation": {"type": "misspelt", "words": 20}}]}).startswith(
        "unknown key 'augment.0.situation.words', which another augment.0.situation.type has; "
    )


def test_a_kind_of_theirs_is_answered_with_ours() -> None:
    sentence = told({"algorithm": {"type": "dapo"}})
    assert sentence.startswith("'algorithm.type' is 'dapo'; use grpo, ")
    assert sentence.endswith(" (dapo is grpo with normalizer: token)")
    assert told({"prompt": {"type": "PROMPT_TUNING"}}).endswith(" (PROMPT_TUNING is soft)")
    assert "(" not in told({"prompt": {"type": "dapo"}})
    for name, (kind, settings) in FOREIGN_KINDS.items():
        section = "prompt" if kind in ("soft", "prefix", "adapter") else "algorithm"
        assert told({section: {"type": name}}).endswith(kind_hint(name, [kind]))
        written = yaml.safe_load("{" + settings.replace(" and ", ", ") + "}")
        rewards = [{"path": "builtin:length"}]
        tree = {"name": "x", "data": {"rows": ["a", "b"]}, "rewards": rewards}
        Recipe.model_validate({**tree, section: {"type": kind, **written}} | CHANGES.get(name, {}))


CHANGES: dict[str, dict[str, Any]] = {
    "cispo": {"algorithm": {"type": "grpo", "surrogate": "cispo", "num_minibatches": 2}},
    "gspo": {"algorithm": {"type": "grpo", "ratio": "sequence_mean", "num_minibatches": 2}},
}
"""What has an effect only with several updates per batch."""


def test_a_schema_without_the_key_gets_no_hint() -> None:
    schema: dict[str, Any] = {"properties": {"learning": {"properties": {"rate": {}}}}}
    assert foreign_hint("beta", schema) == ""
    assert key_paths(schema) == ["learning", "learning.rate"]
