"""A whole GGUF file of a model that cannot be converted is refused in one sentence, and leaves
nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprompt.errors import InputError
from rlprompt.model.gguf.convert import convert_gguf
from tests.fixtures.gguf_files import byte_level_values, write_gguf

TOKENS = byte_level_values()["tokenizer.ggml.tokens"]
Tensors = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"llama.block_count": 0}, "llama.block_count is 0"),
    "a layer too many": ({"llama.block_count": 3}, "tensors of 2 layers"),
    "a billion layers": ({"llama.block_count": 1_000_000_000}, "block_count is 1000000000"),
    "no width": ({"llama.embedding_length": None}, "embedding_length is missing"),
    "another width": ({"llama.feed_forward_length": 128}, "has the shape"),
    "a width in words": ({"llama.embedding_length": "64"}, "embedding_length is 64"),
    "heads that do not share": ({"llama.attention.head_count_kv": 3}, "cannot share 3"),
    "a billion heads": ({"llama.attention.head_count": 1_000_000}, "cannot be converted"),
    "heads by layer": ({"llama.attention.head_count": [4, 2]}, r"head_count is \[4, 2\]"),
    "no rms": ({"llama.attention.layer_norm_rms_epsilon": None}, "rms_epsilon is missing"),
    "rms nan": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon is nan"),
    "theta": ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0"),
    "a part of each head": ({"llama.rope.dimension_count": 8}, "a part of each head"),
    "experts": ({"llama.expert_count": 8}, "expert_count is 8"),
    "a window": ({"llama.attention.sliding_window": 64}, "a window of 64"),
    "a soft cap": ({"llama.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "scaled by 'longrope'"),
    "one of three": ({"split.count": 3}, "one part of several"),
    "no tokenizer": ({"tokenizer.ggml.model": None}, "tokenizer is of the kind 'None'"),
    "WordPiece": ({"tokenizer.ggml.model": "bert"}, "tokenizer is of the kind 'bert'"),
    "no cut": ({"tokenizer.ggml.pre": None}, "names 'default' as the way to cut texts up"),
    "another cut": ({"tokenizer.ggml.pre": "poro-chat"}, "names 'poro-chat'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
    "numbers as tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "no list of its kind"),
    "too many tokens": ({"tokenizer.ggml.tokens": [*TOKENS, "x1x"]}, "305 tokens for an"),
    "a token twice": ({"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}, "'a' stands twice"),
    "too few kinds": ({"tokenizer.ggml.token_type": [1, 1]}, "kinds for 2"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges is missing"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["ab"]}, "merge 'ab' is not of two"),
    "a merge to nothing": ({"tokenizer.ggml.merges": ["Q Z"]}, "merge 'Q Z' is not of two"),
    "eos outside": ({"tokenizer.ggml.eos_token_id": 304}, "eos_token_id is 304"),
    "a template of numbers": ({"tokenizer.chat_template": 7}, "chat_template is no text"),
}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_that_make_no_model(name: str, tmp_path: Path, cache: Path) -> None:
    values, said = VALUES[name]
    write_gguf(tmp_path / "a.gguf", "llama", values=values)
    with pytest.raises(InputError, match=said) as caught:
        convert_gguf(tmp_path / "a.gguf", "mine")
    assert "\n" not in str(caught.value) and "a.gguf" in str(caught.value)
    assert not cache.exists() or not any(path.is_dir() for path in (cache / "models").iterdir())


def without(tensors: Tensors) -> None:
    del tensors["blk.1.attn_k.weight"]


def strange(tensors: Tensors) -> None:
    tensors["blk.0.ssm_a"] = np.zeros(4)


def with_a_path(tensors: Tensors) -> None:
    tensors["../../../etc/x"] = np.zeros(4)


def not_a_number(tensors: Tensors) -> None:
    tensors["blk.0.ffn_up.weight"][3, 5] = np.nan


def narrow(tensors: Tensors) -> None:
    tensors["output_norm.weight"] = np.ones(32)


def no_embedding(tensors: Tensors) -> None:
    del tensors["token_embd.weight"]


CHANGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "one is missing": (without, r"lacks 1 tensor\(s\).*layers\.1\.self_attn\.k_proj"),
    "one of another family": (strange, r"1 tensor\(s\) that its family does not have.*ssm_a"),
    "a name with a path": (with_a_path, r"family does not have, such as '\.\./\.\./\.\./etc/x'"),
    "NaN": (not_a_number, "blk.0.ffn_up.weight holds what is no finite number"),
    "another width": (narrow, r"output_norm.weight has the shape \[32\].*\[64\]"),
    "no embedding": (no_embedding, "lacks the tensor token_embd.weight"),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_tensors_that_make_no_model(name: str, tmp_path: Path, cache: Path) -> None:
    change, said = CHANGES[name]
    write_gguf(tmp_path / "a.gguf", "llama", tensors=change)
    with pytest.raises(InputError, match=said):
        convert_gguf(tmp_path / "a.gguf", "mine")
    assert not cache.exists() or not any(path.is_dir() for path in (cache / "models").iterdir())


def test_qwen2_needs_its_biases(tmp_path: Path) -> None:
    def unbiased(tensors: Tensors) -> None:
        del tensors["blk.0.attn_q.bias"]

    write_gguf(tmp_path / "a.gguf", "qwen2", tensors=unbiased)
    with pytest.raises(InputError, match=r"lacks 1 tensor\(s\).*q_proj\.bias"):
        convert_gguf(tmp_path / "a.gguf", "mine")


def test_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, "llama")
    content = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1)
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"architecture 'mamba', and those of llama, qwen2, gemma3"
    ):
        convert_gguf(path, "mine")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("missing.gguf", "No such file"),
        (".", "it is a folder"),
        ("/dev/zero", "it is a device"),
    ],
)
def test_what_is_no_file(path: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot be read.*{said}"):
        convert_gguf(tmp_path / path, "mine")


def test_an_unknown_type_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    with pytest.raises(InputError, match="--dtype is 'int8'"):
        convert_gguf(tmp_path / "a.gguf", "mine", dtype="int8")
    monkeypatch.setattr("rlprompt.model.gguf.convert._SPARE_BYTES", 1 << 62)
    with pytest.raises(InputError, match=r"free, and mine needs .* RLPROMPT_CACHE"):
        convert_gguf(tmp_path / "a.gguf", "mine")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\)"):
        convert_gguf(tmp_path / "a.gguf", "mine")
