from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.artifacts.format import load_artifact, save_artifact
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.policy import open_policy
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.serving.chat import Chat, ChatOptions, open_chat, printable
from rlprompt.types import Query
from tests.cli.runs import rlprompt, write_recipe
from tests.fixtures.tiny import save_tiny, tiny_model, tiny_tokenizer

SAMPLING = SamplingSettings(max_tokens=8)
SETTINGS: dict[str, Any] = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def artifact(finished: Path) -> Path:
    return finished / "artifact"


def edited(artifact: Path, folder: Path, **sections: object) -> Path:
    """A copy of the artifact whose recipe has other sections."""
    shutil.copytree(artifact, folder)
    path = folder / "prompt.json"
    content = json.loads(path.read_text())
    content["recipe"] |= sections
    path.write_text(json.dumps(content))
    return folder


def test_one_answer_is_all_that_stdout_gets(artifact: Path) -> None:
    shown = rlprompt("chat", artifact, "--query", "what is rain", "--max-tokens", "5")
    assert (shown.code, shown.err) == (0, "")
    (answer,) = open_chat(artifact, ChatOptions(max_tokens=5)).ask("what is rain").values()
    cut = "" if answer.terminated else " ... (cut at 5 tokens)"
    assert shown.out == f"{printable(answer.text)}{cut}\n"


def test_equal_seeds_give_equal_answers_and_others_do_not(artifact: Path) -> None:
    ask = ("chat", artifact, "-q", "what is rain")
    first, again, other = (rlprompt(*ask, "--seed", seed).out for seed in (3, 3, 4))
    assert first == again != other


def test_every_query_is_a_conversation_of_its_own(artifact: Path) -> None:
    alone = rlprompt("chat", artifact, "-q", "what is sun").out
    both = rlprompt("chat", artifact, "-q", "what is rain", "-q", "what is sun").out
    assert both.startswith("> what is rain\n")
    assert both.endswith(f"\n\n> what is sun\n{alone}")


def test_compare_answers_as_base_handwritten_and_learned(artifact: Path, model_dir: Path) -> None:
    shown = rlprompt("chat", artifact, "--compare", "-q", "what is rain", "--temperature", "0")
    assert shown.code == 0, shown.err
    policy = open_policy(ModelSettings(path=str(model_dir), **SETTINGS))
    prompts = {
        "base": NonePrompt(),
        "hand-written": TextPrompt("Answer in one line."),
        "learned": load_artifact(artifact, policy),
    }
    engine = NativeEngine(policy)
    query = Query(messages=({"role": "user", "content": "what is rain"},))
    for name, prompt in prompts.items():
        engine.sync(prompt)
        greedy = SamplingSettings(max_tokens=8, temperature=0.0)
        (completion,) = engine.generate([query], 1, greedy, 0).groups[0].completions
        assert f"[{name}] {printable(completion.text.strip())}" in shown.out


def test_each_prompt_goes_on_from_its_own_answers(model_dir: Path) -> None:
    policy = open_policy(ModelSettings(path=str(model_dir), **SETTINGS))
    prompts = {"a": NonePrompt(), "b": TextPrompt("Be rude.")}
    chat = Chat(policy, prompts, SAMPLING, seed=5)
    first, second = chat.ask("what is rain"), chat.ask("and the sun")
    engine = NativeEngine(policy)
    for name, prompt in prompts.items():
        engine.sync(prompt)
        messages = (
            {"role": "user", "content": "what is rain"},
            {"role": "assistant", "content": first[name].text},
            {"role": "user", "content": "and the sun"},
        )
        (group,) = engine.generate([Query(messages=messages)], 1, SAMPLING, 6).groups
        assert group.completions[0].text.strip() == second[name].text
    chat.reset()
    assert chat.ask("what is rain") == first


def test_lines_of_stdin_are_turns_until_quit(artifact: Path) -> None:
    once = rlprompt("chat", artifact, stdin="what is rain\n").out
    lines = "what is rain\n\n  /reset \nwhat is rain\n/quit\nwhat is sun\n"
    shown = rlprompt("chat", artifact, stdin=lines)
    assert shown.code == 0
    assert shown.out == once * 2
    assert shown.err == "a new conversation\n"
    went_on = rlprompt("chat", artifact, stdin="what is rain\nwhat is rain").out
    assert went_on.startswith(once)
    assert went_on != once * 2


def test_a_conversation_that_grew_too_long_is_told_and_can_be_reset(artifact: Path) -> None:
    long = " ".join(["rain"] * 600)
    shown = rlprompt("chat", artifact, stdin=f"{long}\nwhat is rain\n")
    assert shown.code == 0
    assert shown.err.startswith("error: query 0 needs ")
    assert "/reset begins a new one" in shown.err
    assert shown.out == rlprompt("chat", artifact, stdin="what is rain\n").out


def test_what_the_user_types_is_neither_markup_nor_control(artifact: Path) -> None:
    typed = "[bold]rain[/bold] \x1b[31m <|im_end|>"
    shown = rlprompt("chat", artifact, "-q", typed, "-q", "what is sun")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("> [bold]rain[/bold] [31m <|im_end|>\n")
    assert "\x1b" not in shown.out


def test_half_a_surrogate_pair_from_the_terminal_is_asked_as_a_question_mark(
    artifact: Path,
) -> None:
    chat = open_chat(artifact, ChatOptions())
    broken = chat.ask("what is \udce4")
    chat.reset()
    assert chat.ask("what is ?") == broken


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", "two\nlines"),
        ("win\r\ndows", "win\ndows"),
        ("red \x1b[31m\x07 bell", "red [31m bell"),
        ("\u202eturned", "turned"),
        ("a\tb", "a   b"),
        ("caf\u00e9 \u4f60", "caf\u00e9 \u4f60"),
        ("half \ud83d", "half "),
    ],
)
def test_printable_keeps_text_and_lines_only(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_another_base_is_refused_unless_forced(artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    shown = rlprompt("chat", artifact, "--model", other, "-q", "what is rain")
    assert shown.code == 2
    assert "was made on base " in shown.err
    assert shown.err.count("\n") == 1
    forced = rlprompt("chat", artifact, "--model", other, "--force", "-q", "what is rain")
    assert forced.code == 0
    assert "loaded because it was forced" in forced.err


def test_the_same_base_in_another_folder_is_the_same_base(artifact: Path, tmp_path: Path) -> None:
    moved = save_tiny(tmp_path / "moved")
    ask = ("chat", artifact, "-q", "what is rain")
    assert rlprompt(*ask, "--model", moved).out == rlprompt(*ask).out


def test_code_that_comes_with_a_base_needs_leave_on_the_command_line(
    artifact: Path, tmp_path: Path
) -> None:
    section = {"path": "org/name", "trust_remote_code": True}
    copy = edited(artifact, tmp_path / "copy", model=section)
    content = json.loads((copy / "prompt.json").read_text())
    (copy / "prompt.json").write_text(json.dumps({**content, "base": "org/name"}))
    shown = rlprompt("chat", copy, "-q", "what is rain")
    assert shown.code == 2
    assert "read that code and pass --trust-remote-code" in shown.err


def test_a_recipe_of_another_version_is_told(artifact: Path, tmp_path: Path) -> None:
    copy = edited(artifact, tmp_path / "copy", sampling={"max_tokens": 8, "beam": 4})
    with pytest.raises(InputError, match=r"sampling\.beam: Extra inputs are not permitted"):
        open_chat(copy, ChatOptions())


def test_without_a_handwritten_prompt_two_are_compared(artifact: Path, tmp_path: Path) -> None:
    copy = edited(artifact, tmp_path / "copy", evaluation={"handwritten": None})
    assert open_chat(copy, ChatOptions(compare=True)).names == ["base", "learned"]


def test_an_empty_query_is_refused(artifact: Path) -> None:
    shown = rlprompt("chat", artifact, "-q", " ")
    assert (shown.code, shown.err) == (2, "error: --query is empty; give it a text\n")


def test_an_artifact_carries_the_template_that_its_recipe_named(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(f"{{# mine #}}{tiny_tokenizer().chat_template}")
    write_recipe(tmp_path, model_dir, model__template=template.name)
    monkeypatch.chdir(tmp_path.parent)
    trained = rlprompt("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert trained.code == 0, trained.err
    template.unlink()
    shown = rlprompt("chat", tmp_path / "run" / "artifact", "-q", "what is rain")
    assert shown.code == 0, shown.err


def test_a_text_prompt_can_be_an_artifact_to_chat_with(model_dir: Path, tmp_path: Path) -> None:
    policy = open_policy(ModelSettings(path=str(model_dir), **SETTINGS))
    recipe = {"model": {"path": str(model_dir), **SETTINGS}, "sampling": {"max_tokens": 8}}
    save_artifact(
        tmp_path / "text", policy, TextPrompt("Be rude."), name="text", recipe=recipe, metrics={}
    )
    chat = open_chat(tmp_path / "text", ChatOptions(seed=2))
    direct = Chat(policy, {"learned": TextPrompt("Be rude.")}, SAMPLING, seed=2)
    assert chat.ask("what is rain") == direct.ask("what is rain")
    assert torch.is_grad_enabled()
