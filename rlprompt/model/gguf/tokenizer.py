"""From the vocabulary of a GGUF file to a tokenizer of transformers.

GGUF keeps tokens, their kinds and either merges (`gpt2`, byte-level BPE) or scores (`llama`,
SentencePiece's BPE); how a text is cut up before that it only names. What the names stand for is
written down here as the published tokenizers of these models have it. A name that is not known is
an error: a model that reads other tokens than it has learned from answers, only worse.

Source: llama.cpp's vocabularies; the tokenizer.json files of the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from rlprompt.reading.gguf_file import GgufError

_CONTROL, _UNKNOWN, _USER_DEFINED, _UNUSED = 3, 2, 4, 5
"""Kinds of tokens, as ggml counts them."""
_SPACE = "\u2581"
"""What SentencePiece writes for a space."""
_MOST_TOKENS = 1 << 21
_LONGEST_SPLIT = 512
"""Characters of a token up to which its merges are looked for."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Cut:
    """How a byte-level vocabulary wants texts cut up."""

    pattern: str | None = None
    """A split before bytes are mapped; None = GPT-2's own."""
    digits: bool = False
    """Whether each digit stands alone first."""
    composed: bool = False
    """Whether texts are put in Unicode's composed form (NFC)."""
    whole_words: bool = False
    """Whether a piece that is a token is taken without merges."""
    begins: bool = False
    """Whether a text begins with BOS where the file does not say."""


_CUTS: Mapping[str, _Cut] = {
    "llama-bpe": _Cut(_LLAMA3, whole_words=True, begins=True),
    "llama3": _Cut(_LLAMA3, whole_words=True, begins=True),
    "llama-v3": _Cut(_LLAMA3, whole_words=True, begins=True),
    "falcon3": _Cut(_LLAMA3, whole_words=True, begins=True),
    "qwen2": _Cut(_QWEN2, composed=True),
    "deepseek-r1-qwen": _Cut(_QWEN2),
    "tekken": _Cut(_TEKKEN, whole_words=True, begins=True),
    "smollm": _Cut(digits=True),
    "gpt-2": _Cut(),
}
"""Value of `tokenizer.ggml.pre` -> what it stands for."""

_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
)
"""Control tokens that end an answer wherever a vocabulary has them, as llama.cpp takes them."""


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of tokens, checked."""

    kind: str
    """`gpt2` or `llama`."""
    tokens: Sequence[str]
    kinds: Sequence[int]
    special: Mapping[str, int]
    """Name in transformers -> id."""
    values: Mapping[str, Any]

    @property
    def stop_ids(self) -> list[int]:
        """What ends an answer: the file's token first, then those of `_ENDS` that it has."""
        stated = [self.special.get("eos_token")]
        stated += [self._id("eot_token_id"), self._id("eom_token_id")]
        control = {t: n for n, t in enumerate(self.tokens) if self.kinds[n] == _CONTROL}
        each = [*stated, *(control.get(token) for token in _ENDS)]
        return list(dict.fromkeys(number for number in each if number is not None))

    def _id(self, key: str) -> int | None:
        return _token_id(self.values, key, len(self.tokens))


def vocabulary(values: Mapping[str, Any], rows: int) -> Vocabulary:
    """What a file says of its tokens.

    Args:
        values: values of the file by key.
        rows: rows of the embedding.

    Raises:
        GgufError: it says nothing, or what cannot be true.
    """
    kind = values.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise GgufError(
            f"its tokenizer is of the kind {str(kind)[:40]!r}, and gpt2 and llama can be converted"
        )
    tokens = _listed(values, "tokens", str)
    if not 0 < len(tokens) <= min(rows, _MOST_TOKENS):
        raise GgufError(f"it has {len(tokens)} tokens for an embedding of {rows} rows")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise GgufError(f"its token {twice[:40]!r} stands twice")
    kinds = _listed(values, "token_type", int) if "tokenizer.ggml.token_type" in values else []
    kinds = kinds or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise GgufError(f"it has {len(tokens)} tokens, and kinds for {len(kinds)}")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{n}_token": _token_id(values, f"{k}_token_id", len(tokens)) for n, k in names.items()
    }
    known = {name: number for name, number in special.items() if number is not None}
    return Vocabulary(kind, tokens, kinds, known, values)


def _listed(values: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    listed = values.get(f"tokenizer.ggml.{key}")
    if not isinstance(listed, list) or not all(isinstance(each, kind) for each in listed):
        raise GgufError(f"tokenizer.ggml.{key} is missing, or no list of its kind")
    return listed


def _token_id(values: Mapping[str, Any], key: str, count: int) -> int | None:
    number = values.get(f"tokenizer.ggml.{key}")
    if number is None or number in (-1, (1 << 32) - 1):  # both are how writers say: none
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < count:
        raise GgufError(f"tokenizer.ggml.{key} is {str(number)[:40]}, and it has {count} tokens")
    return number


def make_tokenizer(
    vocabulary: Vocabulary, longest: int, *, ordered: bool = False
) -> PreTrainedTokenizerFast:
    """The tokenizer of a vocabulary.

    Args:
        vocabulary: vocabulary of the file.
        longest: tokens that the model takes.
        ordered: whether merges follow the order of tokens rather than their scores, as Gemma's do.

    Raises:
        GgufError: the file does not say how texts are cut up, or its merges do not fit its tokens.
    """
    made = _byte_level(vocabulary) if vocabulary.kind == "gpt2" else _pieces(vocabulary, ordered)
    tokenizer, begins = made
    _add_tokens(tokenizer, vocabulary)
    named = {name: vocabulary.tokens[number] for name, number in vocabulary.special.items()}
    stated = vocabulary.values.get("tokenizer.ggml.add_bos_token", begins)
    ends = vocabulary.values.get("tokenizer.ggml.add_eos_token", False)
    _frame(tokenizer, vocabulary, begins=bool(stated), ends=bool(ends))
    template = vocabulary.values.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise GgufError("tokenizer.chat_template is no text")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    """A tokenizer over bytes, and whether its texts begin with BOS."""
    name = vocabulary.values.get("tokenizer.ggml.pre", "default")
    cut = _CUTS.get(name) if isinstance(name, str) else None
    if cut is None:
        raise GgufError(
            f"it names {str(name)[:40]!r} as the way to cut texts up, and rlprompt knows "
            f"{', '.join(_CUTS)}"
        )
    vocab = _numbered(vocabulary)
    model = models.BPE(vocab=vocab, merges=_stated_merges(vocabulary, vocab))
    model.ignore_merges = cut.whole_words
    tokenizer = Tokenizer(model)
    if cut.composed:
        tokenizer.normalizer = normalizers.NFC()
    first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []
    if cut.pattern is not None:
        first.append(pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.begins


def _stated_merges(vocabulary: Vocabulary, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in _listed(vocabulary.values, "merges", str):
        one, gap, two = merge.partition(" ")
        if not gap or one not in vocab or two not in vocab or one + two not in vocab:
            raise GgufError(f"its merge {merge[:40]!r} is not of two tokens that make a third")
        merges.append((one, two))
    return merges


def _numbered(vocabulary: Vocabulary) -> dict[str, int]:
    """Token -> id, without rows of the embedding that belong to no token.

    llama.cpp's converter calls those [PAD12], and no published tokenizer has them.
    """
    return {
        token: number
        for number, token in enumerate(vocabulary.tokens)
        if vocabulary.kinds[number] != _UNUSED or token != f"[PAD{number}]"
    }


def _pieces(vocabulary: Vocabulary, ordered: bool) -> tuple[Tokenizer, bool]:
    """A tokenizer over SentencePiece's pieces, and whether its texts begin with BOS."""
    tokens = vocabulary.tokens
    if ordered:
        # Runs of spaces stand in Gemma's files as they are, everything else as SentencePiece's.
        tokens = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
        scores = [-float(number) for number in range(len(tokens))]
    else:
        scores = [float(score) for score in _listed(vocabulary.values, "scores", float)]
    if len(scores) != len(tokens):
        raise GgufError(f"it has {len(tokens)} tokens, and scores for {len(scores)}")
    if len(set(tokens)) != len(tokens):
        raise GgufError("a run of spaces stands twice among its tokens")
    vocab = {token: number for number, token in enumerate(tokens)}
    normal = [n for n, kind in enumerate(vocabulary.kinds) if kind in (1, _USER_DEFINED, _UNUSED)]
    unknown = vocabulary.special.get("unk_token")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=derived_merges(tokens, scores, normal),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = bool(vocabulary.values.get("tokenizer.ggml.add_space_prefix", True))
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def derived_merges(
    tokens: Sequence[str], scores: Sequence[float], normal: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that pieces and their scores imply: the best-scored piece is made first.

    Args:
        tokens: pieces by id.
        scores: scores of the pieces; higher is made earlier.
        normal: ids of the pieces that text may become.
    """
    vocab = {tokens[number] for number in normal}
    found: list[tuple[float, str, str]] = []
    for number in normal:
        piece = tokens[number]
        if not 1 < len(piece) <= _LONGEST_SPLIT:
            continue
        for place in range(1, len(piece)):
            one, two = piece[:place], piece[place:]
            if one in vocab and two in vocab:
                found.append((-scores[number], one, two))
    # By the score of what comes of it; of one piece, as transformers orders them.
    found.sort(key=lambda merge: (merge[0], -len(merge[1]), -len(merge[2])))
    return [(one, two) for _, one, two in found]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Let tokens that stand for themselves be found whole in a text."""
    named = set(vocabulary.special.values())
    added = []
    for number, token in enumerate(vocabulary.tokens):
        kind = vocabulary.kinds[number]
        special = kind in (_CONTROL, _UNKNOWN) or number in named
        if token and (special or kind == _USER_DEFINED) and tokenizer.token_to_id(token) == number:
            added.append(AddedToken(token, normalized=False, special=special))
    tokenizer.add_tokens(added)


def _frame(tokenizer: Tokenizer, vocabulary: Vocabulary, *, begins: bool, ends: bool) -> None:
    """Put BOS before a text and EOS behind it where the model wants that."""
    bos, eos = (vocabulary.special.get(f"{name}_token") for name in ("bos", "eos"))
    first = [(vocabulary.tokens[bos], bos)] if begins and bos is not None else []
    last = [(vocabulary.tokens[eos], eos)] if ends and eos is not None else []
    if not first and not last:
        return
    parts = [token for token, _ in first] + ["$A"] + [token for token, _ in last]
    second = [f"{part}:1" for part in parts]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=parts,
        pair=[*parts, *[p.replace("$A:1", "$B:1") for p in second]],
        special_tokens=list(dict.fromkeys([*first, *last])),
    )
