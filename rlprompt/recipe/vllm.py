"""What a recipe may say where vLLM servers draw the completions, judged while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlprompt.engines.vllm.requests import sampling_objection
from rlprompt.engines.vllm.settings import VllmSettings
from rlprompt.prompts.adapter import AdapterSettings
from rlprompt.prompts.base import PromptSettings
from rlprompt.prompts.layer_adapters import IA3Settings
from rlprompt.prompts.sequence import SequenceSettings

if TYPE_CHECKING:
    from rlprompt.recipe.schema import Recipe

_CAP = VllmSettings.model_fields["importance_cap"].default


def check_vllm(recipe: Recipe) -> None:
    """Refuse what cannot be drawn or learned from on vLLM servers.

    Args:
        recipe: the recipe; one with another engine passes.

    Raises:
        ValueError: the end of a sentence about the first such thing.
    """
    engine = recipe.engine
    if not isinstance(engine, VllmSettings):
        return
    for sentence in _objections(recipe, engine):
        raise ValueError(sentence)


def _objections(recipe: Recipe, engine: VllmSettings) -> Iterator[str]:
    yield from _of_prompt(recipe.prompt, "prompt")
    objection = sampling_objection(recipe.sampling)
    if objection:
        yield objection
    learns_from_draws = recipe.search is None and not recipe.algorithm.answer_columns
    if learns_from_draws:
        yield from _of_logprobs(recipe)
    if recipe.distributed.base == "sharded":
        yield (
            "distributed.base is sharded, which is not tried with engine.type: vllm; hold the base "
            "whole on each rank (distributed.base: replicated), or use engine.type: native"
        )
    if engine.importance_cap != _CAP:
        yield from _of_cap(recipe, learns_from_draws=learns_from_draws)
    if engine.adapter_folder is not None and not isinstance(recipe.prompt, AdapterSettings):
        yield (
            f"engine.adapter_folder has no effect with prompt.type: {recipe.prompt.type}, which "
            "travels with the requests; remove it"
        )


def _of_prompt(settings: PromptSettings, where: str) -> Iterator[str]:
    """Why a prompt cannot be applied there; one from an artifact is judged when it is loaded."""
    if isinstance(settings, SequenceSettings):
        for place, part in enumerate(settings.parts):
            yield from _of_prompt(part, f"{where}.parts.{place}")
    elif settings.keeps_place:
        yield (
            f"{where}.type is {settings.type}, which engine.type: vllm cannot apply, since a "
            "request to vLLM holds tokens and input embeddings, and no keys and values of layers; "
            "set soft, or engine.type: native"
        )
    elif isinstance(settings, AdapterSettings) and isinstance(settings.method, IA3Settings):
        yield (
            f"{where}.method.type is ia3, which engine.type: vllm cannot apply, since vLLM has "
            "layers for LoRA only; set lora, or engine.type: native"
        )


def _of_logprobs(recipe: Recipe) -> Iterator[str]:
    """Sampling under which vLLM's log-probabilities are not those that training compares."""
    sampling = recipe.sampling
    changed = {
        "top_k": sampling.top_k is not None,
        "top_p": sampling.top_p < 1.0,
        "min_p": sampling.min_p > 0.0,
        "min_tokens": sampling.min_tokens > 0,
    }
    for name, is_set in changed.items():
        if is_set:
            yield (
                f"sampling.{name} leaves tokens out, and vLLM gives log-probabilities among those "
                "that are left, which training cannot compare with its own; remove it, or use "
                "engine.type: native"
            )


def _of_cap(recipe: Recipe, *, learns_from_draws: bool) -> Iterator[str]:
    """Where a cap that was set would have no effect."""
    if not learns_from_draws:
        yield (
            "engine.importance_cap has no effect, since no gradient is taken of what is drawn; "
            "remove it"
        )
    elif not recipe.algorithm.has_ratio:
        yield (
            f"engine.importance_cap has no effect with algorithm.type: {recipe.algorithm.type}, "
            "which has no probability ratio; remove it"
        )
    elif recipe.training.overlap_rollouts:
        yield (
            "engine.importance_cap has no effect with training.overlap_rollouts, where the "
            "algorithm's own ratio is taken against what drew the tokens; remove it"
        )
