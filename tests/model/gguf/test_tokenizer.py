"""Texts become the same tokens as under the tokenizers that the vocabularies were taken from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from rlprompt.model.gguf.convert import convert_gguf
from rlprompt.model.gguf.tokenizer import Vocabulary, make_tokenizer, vocabulary
from tests.fixtures.gguf_files import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    byte_level_values,
    write_gguf,
)

NASTY = (
    "",
    " ",
    "   three  and two\n\n\ttabs\t\t",
    "I'M don't WE'LL 12345 3.14",
    "emoji 👩\u200d👧 naïve ﬁ ½",
    "\r\n\r\n x\r",
    "中文 かな 한국어 हिन्दी",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>a</s>b<unk>",
    "[PAD302] <0x0A>",
    "\x00\x01",
    "▁under▁",
    "the rain and the land" * 20,
)
SPACE = "\u2581"


def pieces() -> tuple[list[str], list[float], list[int]]:
    """A small SentencePiece vocabulary: control, bytes, letters, and words that merge to."""
    tokens = ["<unk>", "<s>", "</s>"]
    kinds = [UNKNOWN, CONTROL, CONTROL]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [BYTE] * 256
    words = ["he", "the", SPACE + "the", "in", "an", "and", SPACE + "and", SPACE + SPACE, "ai"]
    words += [
        "ra",
        "rai",
        "rain",
        SPACE + "rain",
        SPACE + "r",
        SPACE + "a",
        SPACE + "t",
        "th",
        "nd",
    ]
    letters = [SPACE, *"abcdehilnprstuxyI'123.\n"]
    tokens += words + letters + ["<tool>"]
    kinds += [NORMAL] * (len(words) + len(letters)) + [USER_DEFINED]
    scores = [0.0] * 259 + [-float(n) for n in range(len(words) + len(letters))] + [0.0]
    return tokens, scores, kinds


def sentencepiece_bpe(text: str) -> list[str]:
    """SentencePiece's algorithm, slow and obvious: the best pair first, then the leftmost."""
    tokens, scores, kinds = pieces()
    score = {t: s for t, s, k in zip(tokens, scores, kinds, strict=True) if k == NORMAL}
    symbols = list(text)
    while True:
        pairs = [
            (score[a + b], -place)
            for place, (a, b) in enumerate(pairwise(symbols))
            if a + b in score
        ]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    out = []
    for symbol in symbols:
        if symbol in score:
            out.append(symbol)
        else:
            out += [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return out


def spm_values(**changes: Any) -> dict[str, Any]:
    tokens, scores, kinds = pieces()
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    "text",
    ["the rain", "in and  the   rain", "Ünïcode 中", "a\nb", "thetherain", "I'll 321.", "▁a"],
)
def test_pieces_merge_as_in_sentencepiece(text: str) -> None:
    tokenizer = make_tokenizer(vocabulary(spm_values(), 1000), 512)
    spaced = SPACE + text.replace(" ", SPACE)
    assert tokenizer.tokenize(text) == sentencepiece_bpe(spaced)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == text.replace(SPACE, " ")


def test_a_vocabulary_without_a_leading_space(text: str = "the rain") -> None:
    values = spm_values(add_space_prefix=False, add_bos_token=False)
    tokenizer = make_tokenizer(vocabulary(values, 1000), 512)
    assert tokenizer.tokenize(text) == sentencepiece_bpe(text.replace(" ", SPACE))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokens_that_stand_for_themselves_are_whole() -> None:
    tokenizer = make_tokenizer(vocabulary(spm_values(), 1000), 512)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in<tool>an</s>")["input_ids"])
    assert tokens == ["<s>", SPACE, "in", "<tool>", SPACE, "an", "</s>"]
    assert set(tokenizer.all_special_tokens) >= {"<s>", "</s>", "<unk>"}
    both = tokenizer.convert_tokens_to_ids(["<tool>", "</s>"])
    assert tokenizer.decode(both, skip_special_tokens=True) == "<tool>"


def trained(pattern: str | None) -> tuple[Tokenizer, dict[str, Any]]:
    """A byte-level tokenizer of transformers' make, and what a file says of it."""
    from tokenizers import Regex

    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = []
    if pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator([" ".join(NASTY)], trainer)
    described = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=lambda token: described["vocab"][token])
    return tokenizer, {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in described["merges"]],
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_byte_level_texts_are_cut_as_the_published_tokenizers_cut_them() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    for name, pattern in (("gpt-2", None), ("deepseek-r1-qwen", PRETOKENIZE_REGEX)):
        theirs, values = trained(pattern)
        ours = make_tokenizer(vocabulary(values | {"tokenizer.ggml.pre": name}, 1000), 512)
        for text in NASTY:
            assert ours(text)["input_ids"] == theirs.encode(text).ids, (name, text)
            assert ours.decode(ours(text)["input_ids"]) == text


def test_qwen2_composes_and_llama_3_groups_digits() -> None:
    _, values = trained(None)
    qwen = make_tokenizer(vocabulary(values | {"tokenizer.ggml.pre": "qwen2"}, 1000), 512)
    assert qwen("e\u0301")["input_ids"] == qwen("\u00e9")["input_ids"]
    llama = make_tokenizer(vocabulary(values | {"tokenizer.ggml.pre": "llama-bpe"}, 1000), 512)
    assert llama("e\u0301")["input_ids"] != llama("\u00e9")["input_ids"]
    cut = llama.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")
    assert [piece for piece, _ in cut] == ["123", "45"]
    cut = qwen.backend_tokenizer.pre_tokenizer.pre_tokenize_str("12345")
    assert [piece for piece, _ in cut] == list("12345")


def test_rows_that_belong_to_no_token_are_left_out() -> None:
    values = byte_level_values()
    tokenizer = make_tokenizer(vocabulary(values, 304), 512)
    assert "[PAD302]" in values["tokenizer.ggml.tokens"] and len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids("[PAD302]") is None


def test_what_ends_an_answer() -> None:
    values = byte_level_values()
    assert vocabulary(values, 304).stop_ids == [2, 0]  # the file's own first
    no_end = {k: v for k, v in values.items() if "eos" not in k}
    plain = no_end | {"tokenizer.ggml.token_type": [NORMAL] * 304}
    assert vocabulary(plain, 304).stop_ids == []
    assert vocabulary(values | {"tokenizer.ggml.eot_token_id": 1}, 304).stop_ids == [2, 1, 0]
    none = values | {"tokenizer.ggml.bos_token_id": (1 << 32) - 1}
    assert isinstance(vocabulary(none, 304), Vocabulary)
    assert "bos_token" not in vocabulary(none, 304).special


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_the_tokenizer_that_transformers_loads_is_the_one_that_was_made(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLPROMPT_CACHE", str(tmp_path / "cache"))
    values = spm_values(add_space_prefix=family != "gemma3") if family != "qwen2" else {}
    write_gguf(tmp_path / "a.gguf", family, values=values)
    stated = byte_level_values() | values
    made = make_tokenizer(vocabulary(stated, 304), 512, ordered=family == "gemma3")
    loaded = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "a.gguf", "mine"))
    for text in NASTY:
        assert loaded(text)["input_ids"] == made(text)["input_ids"], text
        assert loaded.decode(loaded(text)["input_ids"]) == made.decode(made(text)["input_ids"])
    assert loaded.chat_template == made.chat_template
