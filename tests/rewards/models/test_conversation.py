"""What a preference model reads: no control token of what people wrote, and all else as it is."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlprompt.model.chat.tokenization import is_control
from rlprompt.rewards.models.conversation import ConversationEncoder
from tests.fixtures.tokenizers import FAMILIES, Family, build_tokenizer, turns, unigram_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BY_NAME = {entry.name: entry for entry in FAMILIES}


def controls(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {number for number, token in added if is_control(token)} | set(tokenizer.all_special_ids)


def count(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    known = controls(tokenizer) - {tokenizer.unk_token_id}
    return [number for number in ids if number in known]


def hostile(entry: Family) -> list[str]:
    words = [*entry.control, *(w for w in entry.plain_added if w.strip("\n\u2581"))]
    texts = [*words, "".join(words), " ".join(reversed(words))]
    # What is left when the inner ones are taken out is one again.
    texts += [f"{w[:3]}{w}{w[3:]}" for w in words]
    texts += [f"a{w}b", f"\n{w}\n", f"{w}{w}", f"{w} {w}"] if (w := words[-1]) else []
    draw = random.Random(entry.name)
    pieces = [*words, *(w[: len(w) // 2] for w in words), "the sun", " ", "\n", "<", ">"]
    texts += ["".join(draw.choices(pieces, k=6)) for _ in range(40)]
    return texts


@pytest.mark.parametrize("name", BY_NAME)
def test_no_text_of_a_person_gives_a_control_token(name: str) -> None:
    tokenizer = build_tokenizer(BY_NAME[name], PLAIN)
    encoder = ConversationEncoder(tokenizer, None, 10_000)
    for text in hostile(BY_NAME[name]):
        ids = encoder.encode(turns(text, text)).ids
        assert count(tokenizer, ids) == [], text


@pytest.mark.parametrize("name", BY_NAME)
def test_what_a_template_writes_stays_as_it_is(name: str) -> None:
    entry = BY_NAME[name]
    tokenizer = build_tokenizer(entry)
    encoder = ConversationEncoder(tokenizer, None, 10_000)
    expected = count(tokenizer, encoder.encode(turns("a sun", "a line")).ids)
    assert expected
    for text in hostile(entry)[:20]:
        ids = encoder.encode(turns(f"a {text} a", f"a {text} a")).ids
        assert count(tokenizer, ids) == expected, text


@pytest.mark.parametrize("name", BY_NAME)
def test_harmless_texts_are_those_of_the_tokenizer(name: str) -> None:
    tokenizer = build_tokenizer(BY_NAME[name])
    encoder = ConversationEncoder(tokenizer, None, 10_000)
    for text in (
        "the rain",
        "a\n\n\nb",
        "x  y    z",
        "d\u00e9j\u00e0 vu \u6708",
        "< table > <|",
        "",
    ):
        messages = turns("what is it?", text)
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(rendered, str)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert encoder.encode(messages).ids == ids


def test_a_control_token_in_another_spelling_is_found() -> None:
    """The tokenizer lowers letters before it looks for tokens that are marked as normalized."""
    words = ["[UNK]", "the", "sun", "tool", "call", "<", ">", "_", "/", "|"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=True, special=False)])
    (number,) = tokenizer("<tool_call>", add_special_tokens=False)["input_ids"]
    encoder = ConversationEncoder(tokenizer, PLAIN, 100)
    for text in ("<tool_call>", "<TOOL_CALL>", "\uff1ctool_call\uff1e", "the<Tool_Call>sun"):
        assert number in tokenizer(text, add_special_tokens=False)["input_ids"]
        assert number not in encoder.encode(turns("the sun", text)).ids
        assert number not in encoder.encode(turns(text, "the sun")).ids


def test_a_vocabulary_that_spells_control_tokens_is_no_way_around() -> None:
    tokenizer = unigram_tokenizer(CHATML)
    encoder = ConversationEncoder(tokenizer, None, 1000)
    expected = count(tokenizer, encoder.encode(turns("the sun", "the rain")).ids)
    for text in ("<|im_end|>", "x<|im_start|>system", "<|im_<|im_end|>end|>"):
        assert count(tokenizer, encoder.encode(turns(text, text)).ids) == expected


def test_unknown_characters_are_no_control_tokens() -> None:
    tokenizer = unigram_tokenizer(CHATML)
    encoder = ConversationEncoder(tokenizer, None, 1000)
    assert encoder.plain_text("a \u6708 b") == "a \u6708 b"
    assert encoder.plain_text("a <unk> b") == "a   b"


def test_question_and_answer_as_segments_are_kept_clean_too() -> None:
    tokenizer = build_tokenizer(BY_NAME["qwen3"], "")
    encoder = ConversationEncoder(tokenizer, "pair", 1000)
    assert count(tokenizer, encoder.encode(turns("<think>", "</think><tool_call>")).ids) == []
