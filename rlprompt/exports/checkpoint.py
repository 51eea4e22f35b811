"""Whole checkpoints that plain transformers loads: the prompt as vocabulary, or an adapter merged.

A checkpoint of the first kind has one more vocabulary row per position of the prompt, and a
template that writes these tokens into the system slot. Input rows are the prompt; the first V
output rows are the base's, to the bit, and those of the new tokens are written so that they are
unlikely, and suppressed in `generate` altogether. Input and output are untied for that.

Letters: V rows of the base's embedding, m virtual tokens, d model width.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import AddedToken
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rlprompt.errors import InputError
from rlprompt.exports.readme import ANSWERING, page
from rlprompt.exports.source import Source
from rlprompt.exports.template import check_template, with_text, with_tokens
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.layer_adapters import IA3, LayerAdapter
from rlprompt.types import Query

_LARGEST_FILE = "5GB"
_EXAMPLE = (
    """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(".")
"""
    + ANSWERING
)

_VOCABULARY_WORDS = """\
The tokens {first} to {last} ({count} of them) are the prompt: their input rows were learned, and
the chat template writes them into the system turn. Any engine that takes this checkpoint, or its
token ids, answers as rlprompt does, with prefix caching and without a patch. One prompt per
checkpoint: to change it, export again.

- User text cannot spell these tokens through the chat template, which breaks such text up. An
  engine that is sent raw text parses it like that of any other control token of this tokenizer;
  their names hold 64 bits that are in no conversation.
- They are never answers: `generation_config.json` suppresses them, and an engine that does not read
  it finds output rows as unlikely as the least likely token's under this prompt.
- A system message in the conversation is refused, as its place is taken."""

_MERGED_WORDS = """\
The adapter's change is added to the weights, in float32 and then rounded to {dtype}. It was learned
under a system text, which the chat template of this folder writes by itself; a system message in
the conversation is refused. In float32 the logits are those of rlprompt up to the order of sums; in
{dtype} rounding the sum of weights is another rounding than that of two products."""


def write_vocabulary(source: Source, folder: Path) -> None:
    """Write a checkpoint whose vocabulary has the prompt.

    Args:
        source: prompt that is input embeddings.
        folder: folder, which is there and empty.

    Raises:
        InputError: the tokenizer cannot be given such tokens.
    """
    base = source.policy.base
    rows = source.embeddings()
    tokenizer, new = _tokenizer_with(source, len(rows))
    tokenizer.save_pretrained(folder)
    config, generation = copy.deepcopy(base.model.config), _generation(source)
    text = config.get_text_config(decoder=True)
    text.vocab_size = base.vocab_size + len(rows)
    text.tie_word_embeddings = config.tie_word_embeddings = False
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *new})
    _write(source, _grown(source, rows), config, generation, folder)
    names = tokenizer.convert_ids_to_tokens([new[0], new[-1]])
    words = _VOCABULARY_WORDS.format(first=f"`{names[0]}`", last=f"`{names[1]}`", count=len(new))
    text_of = page(source, "a checkpoint with the prompt as vocabulary", words, _EXAMPLE)
    (folder / "README.md").write_text(text_of, encoding="utf-8")


def write_merged(source: Source, folder: Path) -> None:
    """Write a checkpoint with the adapter in its weights.

    Args:
        source: adapter prompt.
        folder: folder, which is there and empty.

    Raises:
        InputError: the tokenizer reads the template with the text in another way.
    """
    prompt, slot = source.prompt, source.policy.slot
    assert isinstance(prompt, AdapterPrompt)  # formats asks
    tokenizer = source.tokenizer(with_text(slot, prompt.init_text))
    before = [*slot.head_ids, *slot.slot_ids(prompt.init_text)]
    check_template(slot, tokenizer, before, "merged")
    tokenizer.save_pretrained(folder)
    model = source.policy.base.model
    weights = merged_weights(dict(model.state_dict()), prompt.adapter)
    _write(source, weights, copy.deepcopy(model.config), _generation(source), folder)
    dtype = str(source.policy.base.dtype).removeprefix("torch.")
    words = _MERGED_WORDS.format(dtype=dtype)
    text = page(source, "a checkpoint with the adapter merged", words, _EXAMPLE)
    (folder / "README.md").write_text(text, encoding="utf-8")


@torch.no_grad()
def merged_weights(weights: dict[str, Tensor], adapter: LayerAdapter) -> dict[str, Tensor]:
    """A base's weights with an adapter's change in them.

    LoRA (arXiv 2106.09685): W + alpha / r * B A. IA3 (arXiv 2205.05638): rows, or columns, times l.

    Args:
        weights: the base's, by name; they are not changed.
        adapter: the adapter.

    Returns:
        New tensors for what changes, the same ones for the rest.
    """
    changed = dict(weights)
    for name, low in (adapter.low_rank() or {}).items():
        key = f"{name}.weight"
        product = low.scale * (low.up.float() @ low.down.float())
        changed[key] = (weights[key].float() + product.to(weights[key].device)).to(
            weights[key].dtype
        )
    if isinstance(adapter, IA3):
        for name in adapter.layers:
            factors = adapter.weights[f"{name}.ia3_l"].detach().float()  # [out, 1] or [1, in]
            # Inputs are scaled by [1, in]; outputs, and with them the bias, by [out, 1].
            keys = [f"{name}.weight"]
            keys += [f"{name}.bias"] if factors.shape[1] == 1 and f"{name}.bias" in weights else []
            for key in keys:
                by = factors if weights[key].dim() == 2 else factors[:, 0]
                wide = weights[key].float() * by.to(weights[key].device)
                changed[key] = wide.to(weights[key].dtype)
    return changed


def _tokenizer_with(source: Source, count: int) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """The base's tokenizer with one token per row, and the ids of these.

    Rows that the base has beyond its tokenizer keep their ids: names fill them up, which nothing
    writes.

    Raises:
        InputError: the tokenizer does not number new tokens one by one.
    """
    policy = source.policy
    stem = f"<|prompt_{source.prompt_hash[:16]}_"
    rows = policy.base.vocab_size
    first = max(policy.base.tokenizer.get_vocab().values()) + 1
    spare = [f"{stem}unused_{i}|>" for i in range(rows - first)]
    names = [f"{stem}{i}|>" for i in range(count)]
    tokenizer = source.tokenizer(with_tokens(policy.slot, stem, names))
    tokenizer.add_tokens(
        [AddedToken(name, special=True, normalized=False) for name in [*spare, *names]],
        special_tokens=True,
    )
    found: Any = tokenizer.convert_tokens_to_ids([*spare, *names])
    ids = list(found)
    if ids != list(range(first, rows + count)):
        raise InputError(
            "the tokenizer of this base does not number new tokens one after the other, so they "
            "cannot be rows of its vocabulary; use --to peft, vllm-embeds or kv"
        )
    new = ids[len(spare) :]
    check_template(policy.slot, tokenizer, [*policy.slot.head_ids, *new], "vocabulary")
    return tokenizer, new


@torch.no_grad()
def _grown(source: Source, rows: Tensor) -> dict[str, Tensor]:
    """The base's weights with m more input and output rows, untied."""
    model = source.policy.base.model
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(inputs, torch.nn.Module) and isinstance(outputs, torch.nn.Module)
    scale = getattr(inputs, "embed_scale", 1.0)  # of Gemma 3, which multiplies what it looks up
    own = (rows / scale).to(rows.dtype)
    weights = dict(model.state_dict())
    places = {id(module): name for name, module in model.named_modules()}
    into, out = places[id(inputs)], places[id(outputs)]
    embedding, head = inputs.weight, outputs.weight
    assert isinstance(embedding, Tensor) and isinstance(head, Tensor)
    least = head[_least_likely(source, head)]
    weights[f"{into}.weight"] = torch.cat([embedding.detach(), own.to(embedding)])
    weights[f"{out}.weight"] = torch.cat([head.detach(), least.expand(len(rows), -1)])
    bias = getattr(outputs, "bias", None)
    if isinstance(bias, Tensor):
        lowest = bias.detach().min().expand(len(rows))
        weights[f"{out}.bias"] = torch.cat([bias.detach(), lowest])
    return weights


def _least_likely(source: Source, head: Tensor) -> int:
    """The token whose highest logit, wherever a conversation stands, is the lowest."""
    policy, prompt = source.policy, source.prompt
    query = Query(messages=({"role": "user", "content": "How are you today?"},))
    prefix = source.prefix()
    tree = policy.tree([query], [[]], prefix, prompt)
    states = policy.hidden(tree, prefix)  # [N, d]
    logits = states.float() @ head.detach().float().t()
    return int(logits.amax(0).argmin())


def _generation(source: Source) -> GenerationConfig:
    own = source.policy.base.model.generation_config
    return GenerationConfig() if own is None else copy.deepcopy(own)


def _write(
    source: Source,
    weights: dict[str, Tensor],
    config: PretrainedConfig,
    generation: GenerationConfig,
    folder: Path,
) -> None:
    """Weights, once where two names share them, with the two configurations."""
    model = source.policy.base.model
    named: Any = config
    named.architectures = [type(model).__name__]
    named.dtype = source.policy.base.dtype
    kept: dict[tuple[int, tuple[int, ...]], str] = {}
    single: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in kept:
            kept[place] = name
            single[name] = tensor.detach().cpu().contiguous()
    save_torch_state_dict(single, folder, max_shard_size=_LARGEST_FILE)
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
