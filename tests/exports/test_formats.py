"""Exports: what another program makes of them is what rlprompt makes of the prompt.

The program is the example in the folder's README, run as it stands.
"""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.exports.formats import FORMATS, export_prompt
from rlprompt.exports.source import Source
from rlprompt.model.base import ModelSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt
from rlprompt.types import Query
from tests.fixtures.prompts import KINDS, make
from tests.fixtures.tiny import FAMILIES, save_tiny

QUESTION = "How do I sharpen a knife?"
EMBEDDED = ("soft", "text", "text_then_soft", "soft_then_text_then_soft")
CACHED = ("prefix", "prefix_low_rank", "soft_then_prefix")
ADAPTERS = ("lora", "ia3")
HELD = {
    **{kind: {"peft", "vocabulary", "vllm-embeds", "kv"} for kind in EMBEDDED},
    **{kind: {"peft", "kv"} for kind in CACHED},
    **{kind: {"peft", "merged"} for kind in ADAPTERS},
    "text": {"peft", "vocabulary", "vllm-embeds", "kv", "text"},
}
CASES = [(kind, to) for kind in sorted(KINDS) for to in sorted(HELD[kind])]
_OPENED: dict[str, Policy] = {}


def opened(family: str, folder: Path) -> Policy:
    """A policy over a saved tiny model; one per family."""
    if family not in _OPENED:
        save_tiny(folder, family)
        settings = ModelSettings(path=str(folder), dtype="float32", device="cpu")
        _OPENED[family] = open_policy(settings)
    return _OPENED[family].sibling()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _OPENED.clear()
    return tmp_path_factory.mktemp("models")


def source(policy: Policy, prompt: Prompt) -> Source:
    return Source(policy, prompt, "n", "ab" * 32)


def greedy(policy: Policy, prompt: Prompt, text: str = QUESTION, count: int = 10) -> list[int]:
    """The answer of rlprompt."""
    engine = NativeEngine(policy)
    engine.sync(prompt)
    query = Query(messages=({"role": "user", "content": text},))
    settings = SamplingSettings(max_tokens=count, temperature=0.0)
    return list(engine.generate([query], 1, settings, seed=0).groups[0].completions[0].token_ids)


def run_example(folder: Path, count: int = 10) -> dict[str, Any]:
    """What the README's program leaves behind."""
    found = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    here = Path.cwd()
    os.chdir(folder)
    try:
        with torch.no_grad():
            exec(found[1].replace("max_new_tokens=200", f"max_new_tokens={count}"), names)
    finally:
        os.chdir(here)
    return names


def answer_of(names: dict[str, Any]) -> list[int]:
    ids = names["ids"] if "ids" in names else names["inputs"]["input_ids"]
    answer: list[int] = names["answer"][0, ids.shape[1] :].tolist()
    return answer


def check(policy: Policy, prompt: Prompt, to: str, folder: Path) -> None:
    export_prompt(source(policy, prompt), to, folder)
    names = run_example(folder)
    if to == "text":
        assert names["messages"][0] == {"role": "system", "content": prompt.init_text}
    elif to == "vllm-embeds":
        check_body(policy, prompt, names["body"])
    else:
        assert answer_of(names) == greedy(policy, prompt)


def check_body(policy: Policy, prompt: Prompt, body: dict[str, Any]) -> None:
    """A server that puts the rows where the system text would be computes what we compute."""
    part = body["messages"][0]["content"][0]
    rows = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
    tail = policy.tail_ids([{"role": "user", "content": body["messages"][1]["content"]}])
    whole = torch.cat([policy.embed(policy.head_ids), rows, policy.embed(tail)])[None]
    model: Any = AutoModelForCausalLM.from_pretrained(policy.base.id, dtype=torch.float32)
    answer = model.generate(inputs_embeds=whole, do_sample=False, max_new_tokens=10)[0]
    assert answer.tolist() == greedy(policy, prompt)


@pytest.mark.parametrize(("kind", "to"), CASES)
def test_the_example_answers_as_rlprompt(models: Path, tmp_path: Path, kind: str, to: str) -> None:
    policy = opened("llama", models / "llama")
    check(policy, make(kind, policy, noise=0.3), to, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
@pytest.mark.parametrize(
    ("kind", "to"),
    [("soft", "vocabulary"), ("soft", "peft"), ("prefix", "peft"), ("lora", "merged")],
)
def test_it_does_so_on_every_family(
    models: Path, tmp_path: Path, family: str, kind: str, to: str
) -> None:
    policy = opened(family, models / family)
    check(policy, make(kind, policy, noise=0.3), to, tmp_path / "out")


@pytest.mark.parametrize("kind", ["soft", "prefix", "lora"])
def test_peft_gives_our_logits(models: Path, tmp_path: Path, kind: str) -> None:
    policy = opened("llama", models / "llama")
    prompt = make(kind, policy, noise=0.3)
    folder = export_prompt(source(policy, prompt), "peft", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(policy.base.id, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    query = Query(messages=({"role": "user", "content": QUESTION},))
    inputs: Any = tokenizer.apply_chat_template(
        list(query.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = model(**inputs).logits[0, -1]
        prefix = policy.prefix(prompt)
        states = policy.hidden(policy.tree([query], [[]], prefix, prompt), prefix)
        ours = policy.base.model.get_output_embeddings()(states[-1])
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_other_formats_are_refused(models: Path, tmp_path: Path, kind: str) -> None:
    policy = opened("llama", models / "llama")
    prompt = make(kind, policy)
    for to in sorted(FORMATS.keys() - HELD[kind]):
        with pytest.raises(InputError, match=f"no form in the format {to}; use --to ") as caught:
            export_prompt(source(policy, prompt), to, tmp_path / "out")
        named = str(caught.value).partition("use --to ")[2].split(" or ")
        assert set(named) == HELD[kind]
    assert not (tmp_path / "out").exists()


def test_what_is_no_format(models: Path, tmp_path: Path) -> None:
    policy = opened("llama", models / "llama")
    soft = source(policy, make("soft", policy))
    with pytest.raises(InputError, match="there is no format 'PEFT'; use --to peft or merged"):
        export_prompt(soft, "PEFT", tmp_path / "out")
    with pytest.raises(InputError, match=r"no GGUF control vector.*--to vocabulary"):
        export_prompt(soft, "gguf-control", tmp_path / "out")
    with pytest.raises(InputError, match="no format holds it"):
        export_prompt(source(policy, NonePrompt()), "kv", tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_is_left(models: Path, tmp_path: Path) -> None:
    policy = opened("llama", models / "llama")
    soft = source(policy, make("soft", policy))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in (("full", "is not empty"), ("file", "no folder"), ("file/in", "written")):
        with pytest.raises(InputError, match=words):
            export_prompt(soft, "kv", tmp_path / name)
    (tmp_path / "empty").mkdir()
    export_prompt(soft, "kv", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


# The checkpoint with the prompt as vocabulary.


@pytest.fixture(scope="module")
def vocabulary(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Policy, Path]:
    policy = opened("llama", models / "llama")
    folder = tmp_path_factory.mktemp("vocabulary") / "out"
    return policy, export_prompt(source(policy, make("soft", policy, 0.3)), "vocabulary", folder)


def test_the_base_is_in_it_to_the_bit(vocabulary: tuple[Policy, Path]) -> None:
    policy, folder = vocabulary
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    own = dict(policy.base.model.state_dict())
    rows, count = policy.base.vocab_size, make("soft", policy).parameters()[0].shape[0]
    assert model.config.vocab_size == rows + count and not model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[: own[name].shape[0]], own[name]), name
    assert model.generation_config.suppress_tokens == list(range(rows, rows + count))
    soft = make("soft", policy, 0.3).state_dict()["embeddings"]
    assert torch.equal(model.get_input_embeddings().weight[rows:], soft)


def test_user_text_cannot_spell_the_prompt(vocabulary: tuple[Policy, Path]) -> None:
    policy, folder = vocabulary
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = policy.base.vocab_size
    names = tokenizer.convert_ids_to_tokens(list(range(policy.vocab_size, len(tokenizer))))
    stem = names[0].partition("unused")[0]
    clean = read(tokenizer, "hello")
    prompt = [each for each in clean if each >= rows]
    assert prompt == list(range(rows, len(tokenizer)))
    for text in (
        names[-1],
        "".join(names),
        stem[:3] + names[-1] + stem[3:] + "0|>",
        stem * 3 + "0|>",
        policy.slot.template.mark,
        policy.slot.template.mark + names[-1],
        f"{policy.slot.template.mark}\n{policy.slot.template.mark}",
    ):
        for turns in ([text], ["hi", text, "so"], ["hi", "yes", text]):
            ids = read(tokenizer, *turns)
            assert [each for each in ids if each >= policy.vocab_size] == prompt, text
            assert ids[: len(policy.head_ids)] == list(policy.head_ids)


def read(tokenizer: Any, *contents: str) -> list[int]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    return list(ids["input_ids"])


@pytest.mark.parametrize("to", ["vocabulary", "peft", "kv"])
def test_a_system_message_is_refused(models: Path, tmp_path: Path, to: str) -> None:
    policy = opened("llama", models / "llama")
    folder = export_prompt(source(policy, make("soft", policy)), to, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "system", "content": "Obey"}, {"role": "user", "content": "hi"}]
    with pytest.raises(Exception, match="leave the system message out"):
        tokenizer.apply_chat_template(turns, add_generation_prompt=True)


def test_weights_of_the_base_stay_as_they_are(models: Path, tmp_path: Path) -> None:
    policy = opened("llama", models / "llama")
    for kind, to in (("lora", "merged"), ("ia3", "merged"), ("soft", "vocabulary")):
        export_prompt(source(policy, make(kind, policy, 0.3)), to, tmp_path / kind)
    assert policy.verify() == policy.base.fingerprint
    assert policy.base.model.config.tie_word_embeddings
    assert policy.base.model.config.vocab_size == policy.base.vocab_size


def test_a_text_that_spells_a_control_token_is_refused(models: Path, tmp_path: Path) -> None:
    """In rlprompt it is text; a plain tokenizer would read it as the end of the turn."""
    policy = opened("llama", models / "llama")
    prompt = make("lora", policy, text="be <|im_end|> nice")
    with pytest.raises(InputError, match="in another way than rlprompt"):
        export_prompt(source(policy, prompt), "merged", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_keys_and_values_are_those_of_the_policy(models: Path, tmp_path: Path) -> None:
    policy = opened("llama", models / "llama")
    prompt = make("prefix", policy, 0.3)
    folder = export_prompt(source(policy, prompt), "kv", tmp_path / "out")
    tensors, prefix = load_file(folder / "keys_values.safetensors"), policy.prefix(prompt)
    for layer in range(2):
        assert torch.equal(tensors[f"keys.{layer}"], prefix.keys[layer])
        assert torch.equal(tensors[f"values.{layer}"], prefix.values[layer])


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("kind", "to"), [("soft", "vocabulary"), ("soft", "peft")])
def test_smollm2_answers_the_same(smollm2_dir: Path, tmp_path: Path, kind: str, to: str) -> None:
    settings = ModelSettings(path=str(smollm2_dir), dtype="float32", device="cpu")
    policy = open_policy(settings)
    prompt = make(kind, policy, noise=0.1, init_text="You are a pirate.")
    folder = export_prompt(source(policy, prompt), to, tmp_path / "out")
    readme = folder / "README.md"  # stored in bfloat16: "auto" would be another precision
    readme.write_text(readme.read_text().replace('dtype="auto"', 'dtype="float32"'))
    assert answer_of(run_example(folder, 8)) == greedy(policy, prompt, count=8)
