"""Loading a base: the round trip, what it is afterwards, and one sentence for each failure."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from rlprompt.errors import InputError
from rlprompt.model.base import FrozenBase, ModelSettings, freeze, load_base, verify_unchanged
from rlprompt.model.device import choose_device, choose_dtype
from rlprompt.model.in_memory import base_in_memory
from tests.fixtures.tiny import (
    CONFIGS,
    FAMILIES,
    IM_END_ID,
    TOKENIZER_SIZE,
    VOCAB_SIZE,
    save_tiny,
    tiny_base,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def load(path: Path | str, **settings: object) -> FrozenBase:
    return load_base(
        ModelSettings.model_validate(
            {"path": str(path), "dtype": "float32", "device": "cpu"} | settings
        )
    )


def sentence(path: Path | str, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        load(path, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_model_loads_as_the_same_frozen_base(family: str, tmp_path: Path) -> None:
    base = load(save_tiny(tmp_path, family))
    original = tiny_base(family)
    assert base.fingerprint == original.fingerprint
    assert base.id == str(tmp_path)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    ids = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140]])
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, original.model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_far_from_uniform(family: str) -> None:
    ids = torch.randint(3, TOKENIZER_SIZE, (2, 24))
    with torch.no_grad():
        probs = tiny_model(family)(ids).logits.softmax(-1)
    assert probs.max(-1).values.mean() > 5 / VOCAB_SIZE


@pytest.mark.parametrize("family", FAMILIES)
def test_properties(family: str) -> None:
    base = tiny_base(family)
    assert base.num_layers == (3 if family.startswith("gemma") else 2)
    assert (base.num_kv_heads, base.head_dim, base.hidden_size) == (2, 16, 64)
    assert base.vocab_size == VOCAB_SIZE
    assert base.stop_ids == {IM_END_ID}
    assert base.max_positions == 512
    assert (base.dtype, base.device.type) == (torch.float32, "cpu")


def test_stop_ids_take_lists_and_fall_back_to_the_tokenizer() -> None:
    base = tiny_base()
    assert base.model.generation_config is not None
    base.model.generation_config.eos_token_id = [2, 0]
    assert base.stop_ids == {0, 2}
    base.model.generation_config.eos_token_id = None
    assert base.stop_ids == {IM_END_ID}


def test_dtype_and_threads_are_applied(folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        base = load(folder, dtype="bfloat16", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert base.dtype == torch.bfloat16
    assert base.fingerprint == tiny_base().fingerprint


def test_auto_is_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rlprompt"):
        base = load(folder, dtype="auto", device="auto")
    assert base.dtype in (torch.bfloat16, torch.float32)
    assert "device: " in caplog.text
    assert "dtype: " in caplog.text


def test_verify_unchanged_names_the_changed_weight() -> None:
    base = tiny_base("qwen2")
    assert verify_unchanged(base) == base.fingerprint
    with torch.no_grad():
        base.model.get_parameter("model.norm.weight")[0] += 1e-6
    with pytest.raises(RuntimeError, match=r"1 weight.*model\.norm\.weight"):
        verify_unchanged(base)


def test_unknown_name_suggests_the_nearest(folder: Path) -> None:
    assert "did you mean 'smollm2-135m'?" in sentence("smollm-135m")
    assert f"did you mean '{folder}'?" in sentence(folder.parent / "tinny")
    assert sentence("zzz").endswith("no hub id (org/name); correct it.")


def test_a_relative_path_with_a_typo_suggests_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    right = f"{folder.parent.name}/{folder.name}"
    text = sentence(f"{right}y")
    assert "no such folder exists here" in text and "the hub cannot be reached" in text
    assert text.endswith(f"; did you mean '{right}'?")


def test_revision_of_what_has_none(folder: Path) -> None:
    assert "remove model.revision" in sentence(folder, revision="main")


def test_file_in_place_of_folder(folder: Path) -> None:
    assert "a file: give the folder" in sentence(folder / "model.safetensors")


BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "is a PEFT adapter",
    ),
    "artifact": (
        lambda f: (f / "config.json").rename(f / "prompt.json"),
        "is an rlprompt artifact",
    ),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "holds no settings"),
    "unknown type": (
        lambda f: edit_config(f, model_type="lama"),
        "model_type 'lama', which this version of transformers does not know",
    ),
    "remote code": (
        lambda f: edit_config(f, model_type="own", auto_map={"AutoConfig": "own.Own"}),
        "set model.trust_remote_code: true",
    ),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantised (gptq)",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pickled weights (pytorch_model.bin)",
    ),
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors is truncated or damaged",
    ),
    "not safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"<html>Not Found</html>"),
        "model.safetensors is truncated or damaged",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": 3'),
        "tokenizer in",
    ),
    "other size": (
        lambda f: edit_config(f, intermediate_size=128),
        "check that config.json and weights belong together",
    ),
    "more layers": (lambda f: edit_config(f, num_hidden_layers=3), "lack 9 tensor(s)"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_folder_is_refused_with_one_sentence(name: str, folder: Path) -> None:
    break_it, expected = BREAKS[name]
    break_it(folder)
    text = sentence(folder)
    assert expected in text
    assert str(folder) in text


def test_sharded_weights_load_and_a_missing_shard_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder).fingerprint == tiny_base().fingerprint
    (folder / "b.safetensors").unlink()
    assert "lacks b.safetensors" in sentence(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json is damaged" in sentence(folder)


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=304, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert "is an encoder-decoder" in sentence(tmp_path)


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertConfig(vocab_size=304, intermediate_size=16, **small)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    LlamaForSequenceClassification(CONFIGS["llama"]()).save_pretrained(tmp_path / "classifier")
    for name, expected in (
        ("bert", "is a BertForMaskedLM"),
        ("classifier", "is a LlamaForSequenceClassification"),
    ):
        tiny_tokenizer().save_pretrained(tmp_path / name)
        assert f"{expected}, not a causal language model" in sentence(tmp_path / name)


def test_tokenizer_larger_than_embedding() -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(TOKENIZER_SIZE - 1)
    with pytest.raises(InputError, match=r"ids up to 299, but its embedding has only 299 rows"):
        freeze(model, tiny_tokenizer(), "tiny")


def test_hub_model_without_network_fails_in_seconds() -> None:
    start = time.monotonic()
    text = sentence("some-org/some-model")
    assert text.startswith("model.path is 'some-org/some-model', but no such folder exists here, ")
    assert "the hub cannot be reached (" in text and text.endswith("(smollm2-135m).")
    assert time.monotonic() - start < 5


@pytest.mark.slow
def test_hub_that_refuses_connections_fails_in_seconds() -> None:
    code = (
        "import time; from rlprompt.model.files.folder import locate; t = time.monotonic()\n"
        "try: locate('some-org/some-model', None)\n"
        "except Exception as e: print(type(e).__name__, time.monotonic() - t < 15, e)"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("InputError True model.path is"), done.stdout + done.stderr
    assert "cannot be reached" in done.stdout


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cuda:99", "cuda:99"), ("tpu", "is no device"), ("meta", "does not run on")],
)
def test_devices_that_cannot_be_had(device: str, expected: str, folder: Path) -> None:
    text = sentence(folder, device=device)
    assert expected in text
    assert "write " in text


def test_dtype_that_the_device_cannot_use(folder: Path) -> None:
    assert "float16 on the CPU" in sentence(folder, dtype="float16")
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_auto_device() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float8"}, {"threads": 0}, {"pth": "x"}, {"trust_remote_code": "perhaps"}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ModelSettings.model_validate(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_loads_on_cuda(dtype: str, folder: Path) -> None:
    base = load(folder, device="cuda", dtype=dtype)
    assert base.device.type == "cuda"
    assert {parameter.device.type for parameter in base.model.parameters()} == {"cuda"}


@pytest.mark.model
def test_real_model(smollm2: FrozenBase) -> None:
    assert smollm2.id == "smollm2-135m"
    assert (smollm2.num_layers, smollm2.num_kv_heads, smollm2.head_dim) == (30, 3, 64)
    assert (smollm2.hidden_size, smollm2.vocab_size, smollm2.max_positions) == (576, 49152, 8192)
    assert smollm2.stop_ids == {2}
    assert verify_unchanged(smollm2) == smollm2.fingerprint


@pytest.mark.model
def test_real_model_answers(smollm2_dir: Path) -> None:
    """As transformers runs it: a base of its own, since a policy replaces modules."""
    smollm2 = load_base(ModelSettings(path="smollm2-135m"))
    tokenizer = smollm2.tokenizer
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert isinstance(text, str)
    ids = tokenizer(text.removesuffix("<|im_end|>\n"), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = smollm2.model(ids.to(smollm2.device)).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_an_adapter_beside_the_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "an adapter that would change the frozen base" in sentence(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/nowhere")
    assert "an adapter that would change the frozen base" in sentence(folder)


def test_an_adapter_in_memory_is_refused() -> None:
    model = tiny_model("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(InputError, match="model has an adapter loaded"):
        base_in_memory(model, tiny_tokenizer())


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_pipe_in_a_model_folder_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert str(folder) in sentence(folder)


def test_an_index_cannot_name_files_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "no file in that folder" in sentence(folder)
