"""A converted model computes what the model computes that the file was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.files.converted import is_converted, list_converted
from rlprompt.model.files.fetch import MANIFEST, model_dir
from rlprompt.model.files.folder import locate
from rlprompt.model.gguf import weights
from rlprompt.model.gguf.convert import convert_gguf
from rlprompt.model.gguf.families import llama3_factors
from rlprompt.reading.gguf_file import GgufFile
from tests.fixtures.gguf_files import FAMILIES, write_gguf
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(40)[None] * 7 % 300


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def converted(path: Path, **options: Any) -> PreTrainedModel:
    folder = convert_gguf(path, "mine", dtype="float32", **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_float32_gives_the_model_back(family: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "a.gguf", family)
    back = converted(tmp_path / "a.gguf")
    wanted = model.state_dict()
    assert back.state_dict().keys() == wanted.keys()
    # Gemma's norms have had one added and taken off.
    assert all(torch.allclose(v, wanted[n], atol=2e-7) for n, v in back.state_dict().items())
    assert torch.allclose(logits(back), logits(model), atol=2e-4)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_quantised_file_computes_what_transformers_makes_of_it(
    family: str, kind: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "a.gguf", family, kind=kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    ours = converted(tmp_path / "a.gguf")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)
    assert (logits(ours) - logits(tiny_model(family))).abs().max() > 0


def test_a_quantised_gemma_computes_what_transformers_makes_of_it(tmp_path: Path) -> None:
    # transformers takes the window's pattern for granted: every sixth layer sees all.
    model = tiny_model("gemma3")
    kinds = ["sliding_attention"] * 3
    model.config.layer_types = kinds
    write_gguf(tmp_path / "a.gguf", "gemma3", kind="Q8_0", model=model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32)
    theirs.config.query_pre_attn_scalar = 16
    for layer in theirs.model.layers:
        layer.self_attn.scaling = 16**-0.5
    ours = converted(tmp_path / "a.gguf")
    assert ours.config.layer_types == kinds
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-4)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_blocks_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    """Bytes drawn at random, since the package writes no such blocks, against its own reading."""
    import gguf
    from gguf.quants import dequantize

    generator = np.random.default_rng(0)
    number = gguf.GGMLQuantizationType[kind]
    in_block, size = gguf.GGML_QUANT_SIZES[number]
    blocks = generator.integers(0, 255, (256, 256 // in_block * size), dtype=np.uint8)
    # The scales are halves: these bytes keep them finite, and small.
    blocks[:, 1::2] &= 0x1F
    wanted = dequantize(blocks, number)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", blocks, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(tmp_path / "a.gguf") as file:
        ours = weights._read(file, file.tensors["x"], torch.float32, None)
    assert ours.shape == (256, 256) and np.array_equal(ours.numpy(), wanted)


def test_weights_are_rounded_once_and_to_what_is_asked_for(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "a.gguf", "gemma3")
    folder = convert_gguf(tmp_path / "a.gguf", "mine")
    back = AutoModelForCausalLM.from_pretrained(folder)
    assert back.dtype == torch.bfloat16
    exact = model.state_dict()
    for name, rounded in back.state_dict().items():
        added = (exact[name] + 1.0) - 1.0 if "norm" in name else exact[name]
        assert torch.equal(rounded, added.bfloat16()), name


def test_the_manifest_and_card_say_what_it_was_made_from(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "qwen2", kind="Q8_0", values={"general.license": "mit"})
    said: list[str] = []
    folder = convert_gguf(tmp_path / "a.gguf", "mine", progress=said.append)
    manifest = json.loads((folder / MANIFEST).read_text())
    card = (folder / "README.md").read_text()
    digest = weights_digest(tmp_path / "a.gguf")
    assert (
        manifest["source"]["sha256"] == digest
        and digest in card
        and any(digest in line for line in said)
    )
    assert manifest["weights"].startswith("Q8_0, ") and "bfloat16" in manifest["weights"]
    assert manifest["licence"] == "mit" and manifest["source"]["file"] == "a.gguf"
    (row,) = list_converted()
    assert (row.name, row.licence, row.fetched, row.folder) == ("mine", "mit", True, folder)


def weights_digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_name_is_a_model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    folder = convert_gguf(tmp_path / "a.gguf", "mine", dtype="float32")
    assert is_converted("mine")
    base = load_base(ModelSettings(path="mine", dtype="float32", device="cpu"))
    assert base.id == "mine" and base.stop_ids == {2, 0}
    with pytest.raises(InputError, match="has no revisions"):
        locate("mine", "main")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        InputError, match=r"converted model in the cache and a folder here.*\./mine"
    ):
        locate("mine", None)
    (tmp_path / "mine").rmdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"mine in .* is damaged \(tokenizer\.json has 2 bytes"):
        locate("mine", None)
    assert not list_converted()[0].fetched


def test_other_weights_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    folder = convert_gguf(tmp_path / "a.gguf", "mine", dtype="float32")
    file = folder / "model.safetensors"
    stored = bytearray(file.read_bytes())
    stored[-1] ^= 0x40
    file.write_bytes(stored)
    with pytest.raises(InputError, match=r"damaged \(fingerprint .*--force"):
        load_base(ModelSettings(path="mine", dtype="float32", device="cpu"))


def test_a_name_that_is_taken_needs_force(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    write_gguf(tmp_path / "b.gguf", "qwen2")
    first = convert_gguf(tmp_path / "a.gguf", "mine")
    with pytest.raises(InputError, match=r"There is a model mine .* --force to replace it"):
        convert_gguf(tmp_path / "b.gguf", "mine")
    assert json.loads((first / "config.json").read_text())["model_type"] == "llama"
    convert_gguf(tmp_path / "b.gguf", "mine", force=True)
    assert json.loads((first / "config.json").read_text())["model_type"] == "qwen2"
    shutil.copytree(first, model_dir("other"))
    (model_dir("other") / MANIFEST).unlink()
    with pytest.raises(InputError, match="was not made by `rlprompt model convert`"):
        convert_gguf(tmp_path / "a.gguf", "other", force=True)
    assert sorted(path.name for path in (cache / "models").iterdir() if path.is_dir()) == [
        "mine",
        "other",
    ]


@pytest.mark.parametrize(
    "name", ["smollm2-135m", "", ".hidden", "a/b", "../a", "a b", "x" * 101, "ends.", "-x"]
)
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name of an embedded model|cannot be the name"):
        convert_gguf(tmp_path / "a.gguf", name)


def test_many_shards_are_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 50_000)
    model = write_gguf(tmp_path / "a.gguf", "llama")
    back = converted(tmp_path / "a.gguf")
    assert len(list(model_dir("mine").glob("model-*.safetensors"))) > 2
    assert torch.allclose(logits(back), logits(model), atol=2e-4)
    assert load_base(ModelSettings(path="mine", dtype="float32", device="cpu")).id == "mine"


def test_llama_3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.rope_parameters = {
        "rope_theta": 500_000.0,
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = type(model)(model.config)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500_000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = llama3_factors(500_000.0, 16, 32.0)
    assert torch.allclose(plain / scaled, factors.float(), rtol=1e-5)

    def with_factors(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = factors.float().numpy()

    write_gguf(tmp_path / "a.gguf", "llama", model=model, tensors=with_factors)
    back = converted(tmp_path / "a.gguf")
    assert back.config.rope_parameters == model.config.rope_parameters
    assert torch.allclose(logits(back), logits(model), atol=2e-4)

    def other(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.linspace(1, 9, 8)

    write_gguf(tmp_path / "b.gguf", "llama", model=model, tensors=other)
    with pytest.raises(InputError, match="factors of frequencies are not those of Llama 3"):
        convert_gguf(tmp_path / "b.gguf", "b")


def test_positions_scaled_by_the_settings(tmp_path: Path) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    write_gguf(
        tmp_path / "a.gguf",
        "qwen2",
        values={f"qwen2.rope.scaling.{key}": value for key, value in yarn.items()},
    )
    rope = converted(tmp_path / "a.gguf").config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("yarn", 4.0)
    assert rope["original_max_position_embeddings"] == 128
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    write_gguf(tmp_path / "b.gguf", "llama", values=linear)
    rope = converted(tmp_path / "b.gguf", force=True).config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 2.0)


def test_the_tiny_tokenizer_comes_back(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "qwen2", values={"tokenizer.ggml.pre": "gpt-2"})
    convert_gguf(tmp_path / "a.gguf", "mine", dtype="float32")
    base = load_base(ModelSettings(path="mine", dtype="float32", device="cpu"))
    text = "the rain <|im_start|>user\nand [PAD302] there's 12 thén"
    assert base.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert base.tokenizer.chat_template == tiny_tokenizer().chat_template
