"""The text that a fresh prompt really starts from: which tokens, what is said, what is kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from rlprompt.artifacts.card import started_from
from rlprompt.artifacts.format import read_artifact_info, save_artifact
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt, PromptSettings
from rlprompt.prompts.make import AnyPromptSettings, make_prompt
from rlprompt.prompts.prefix import PrefixSettings
from rlprompt.prompts.sequence import SequenceSettings
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.recipe.schema import load_recipe
from rlprompt.reports.report import write_report
from tests.fixtures.prompts import TEXT, make
from tests.invariants.oracle import policy_of

RECIPES = Path(__file__).parents[2] / "recipes"
ALL_RECIPES = sorted(p for p in RECIPES.rglob("*.yaml") if p.parent.name != "reward_models")
TEXT_KINDS = [{"type": "soft"}, {"type": "prefix"}, {"type": "prefix", "rank": 2}]


def parsed(plain: dict[str, Any]) -> PromptSettings:
    adapter: TypeAdapter[PromptSettings] = TypeAdapter(AnyPromptSettings)
    return adapter.validate_python(plain)


def created(plain: dict[str, Any], policy: Policy, *sources: Prompt) -> Prompt:
    """The prompt of a section of a recipe; an artifact at "0" holds the first source."""
    return make_prompt(parsed(plain), policy, 0, lambda path: sources[int(path)])


def slot_length(policy: Policy, prompt: Prompt) -> int:
    return policy.prefix_length(prompt) - len(policy.head_ids)


@pytest.mark.parametrize("kind", TEXT_KINDS, ids=["soft", "prefix", "low_rank"])
def test_the_length_is_the_texts_where_nobody_says(
    kind: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of("llama")
    long = " ".join([TEXT] * 8)
    ids = policy.slot_ids(long)
    assert len(ids) > 16
    prompt = created({**kind, "init_text": long}, policy)
    assert slot_length(policy, prompt) == len(ids)
    assert prompt.init_text == long
    assert not caplog.records


@pytest.mark.parametrize("kind", TEXT_KINDS, ids=["soft", "prefix", "low_rank"])
def test_a_shorter_prompt_says_which_words_are_lost(
    kind: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of("llama")
    ids = policy.slot_ids(TEXT)
    prompt = created({**kind, "init_text": TEXT, "num_virtual_tokens": 3}, policy)
    kept, lost = policy.decode(ids[:3]), policy.decode(ids[3:]).strip()
    assert prompt.init_text == kept and TEXT.startswith(kept)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert f"loses {lost!r}" in message and repr(kept) in message
    assert f"has {len(ids)} tokens and num_virtual_tokens is 3" in message


@pytest.mark.parametrize("kind", TEXT_KINDS, ids=["soft", "prefix", "low_rank"])
def test_a_longer_prompt_says_that_the_text_is_repeated(
    kind: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    policy = policy_of("llama")
    ids = policy.slot_ids(TEXT)
    length = len(ids) + 2
    prompt = created({**kind, "init_text": TEXT, "num_virtual_tokens": length}, policy)
    assert prompt.init_text == policy.decode([*ids, *ids[:2]])
    (record,) = caplog.records
    assert "it is repeated" in record.getMessage() and repr(prompt.init_text) in record.getMessage()


def test_parts_of_a_sequence_say_it_too(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    parts = [
        {"type": "text", "text": TEXT},
        {"type": "soft", "init_text": TEXT, "num_virtual_tokens": 2},
    ]
    prompt = created({"type": "sequence", "parts": parts}, policy)
    kept = policy.decode(policy.slot_ids(TEXT)[:2])
    assert prompt.init_text == f"{TEXT} | {kept}"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert isinstance(parsed({"type": "sequence", "parts": parts}), SequenceSettings)


def test_warm_starts_say_it_too(caplog: pytest.LogCaptureFixture) -> None:
    policy = policy_of("llama")
    text, soft = make("text", policy), SoftPrompt(policy.embed(policy.slot_ids(TEXT)), TEXT)
    cut = created({"type": "soft", "from_artifact": "0", "num_virtual_tokens": 2}, policy, text)
    assert cut.init_text == policy.decode(policy.slot_ids(TEXT)[:2])
    assert "loses" in caplog.text
    caplog.clear()
    created({"type": "soft", "from_artifact": "0", "num_virtual_tokens": 2}, policy, soft)
    assert "they are resampled" in caplog.text
    caplog.clear()
    created({"type": "soft", "from_artifact": "0"}, policy, soft)
    created({"type": "soft", "from_artifact": "0"}, policy, text)
    created({"type": "prefix", "from_artifact": "0"}, policy, text)
    assert not caplog.records


def test_drawn_tokens_are_sixteen_where_nobody_says() -> None:
    assert SoftSettings().num_virtual_tokens is None
    assert SoftSettings(init_text=None).num_virtual_tokens == 16
    assert SoftSettings(init_text=None, num_virtual_tokens=3).num_virtual_tokens == 3
    assert SoftSettings.model_validate({"from_artifact": "x"}).num_virtual_tokens is None
    assert PrefixSettings().num_virtual_tokens is None


def test_card_prompt_json_and_report_name_what_was_left(tmp_path: Path) -> None:
    policy = policy_of("llama")
    plain = {"type": "soft", "init_text": TEXT, "num_virtual_tokens": 3}
    prompt = created(plain, policy)
    folder = tmp_path / "artifact"
    save_artifact(folder, policy, prompt, name="x", recipe={"prompt": plain}, metrics={})
    (tmp_path / "recipe.resolved.yaml").write_text(json.dumps({"prompt": plain}))
    info = read_artifact_info(folder)
    assert info.init_text == prompt.init_text != TEXT
    sentence = f"{prompt.init_text} (cut to 3 tokens, from: {TEXT})"
    assert started_from(info.model_dump()) == sentence
    assert f"| started from | {sentence} |" in (folder / "README.md").read_text()
    html = write_report(tmp_path).read_text()
    assert "Started from" in html and sentence in html


def info_of(prompt: dict[str, Any], text: str, **more: Any) -> dict[str, Any]:
    return {"init_text": text, "details": {}, "recipe": {"prompt": prompt}, **more}


def test_a_card_says_where_a_start_came_from() -> None:
    assert started_from(info_of({"init_text": "a b"}, "a b")) == "a b"
    assert started_from(info_of({"init_text": None}, "")) == "random embeddings"
    repeated = started_from(info_of({"init_text": "a b", "num_virtual_tokens": 3}, "a b a"))
    assert repeated == "a b a (repeated to 3 tokens, from: a b)"
    warm = started_from(info_of({"from_artifact": "../x/artifact"}, "a b"))
    assert warm == "the prompt of ../x/artifact, which had begun with: a b"
    parts = [{"init_text": "a"}, {"init_text": "b"}, {"init_text": ""}]
    asked = [{"from_artifact": "x"}, {"init_text": "b c", "num_virtual_tokens": 1}, {}]
    sequence = info_of({"parts": asked}, "a | b | ", details={"parts": parts})
    assert started_from(sequence) == (
        "the prompt of x, which had begun with: a | b (cut to 1 token, from: b c) | "
        "random embeddings"
    )


@pytest.mark.model
@pytest.mark.parametrize("path", ALL_RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_recipe_of_ours_cuts_its_text(path: Path, smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    recipe = load_recipe(path)
    for member in recipe.members().values() if recipe.population else [recipe]:
        prompt = member.prompt
        for each in getattr(prompt, "parts", None) or [prompt]:
            text = getattr(each, "init_text", None)
            length = getattr(each, "num_virtual_tokens", None)
            if text is not None and length is not None:
                assert length >= len(tokenizer(text, add_special_tokens=False)["input_ids"])
