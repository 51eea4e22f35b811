"""What a recipe may say where a model is behind an endpoint: whose weights are not here.

Such a run finds a text from outputs alone. What needs a base (gradients, other kinds of prompt,
measures under the base) is refused while the recipe is read, and what would have no effect too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rlprompt.distributed.ranks import DistributedSettings
from rlprompt.endpoints.settings import EndpointSettings
from rlprompt.engines.endpoint import EndpointEngineSettings, unsent
from rlprompt.model.base import ModelSettings
from rlprompt.prompts.text import TextSettings
from rlprompt.training.settings import TrainingSettings

if TYPE_CHECKING:
    from rlprompt.recipe.schema import Recipe


def endpoints_of(recipe: Recipe) -> Mapping[str, EndpointSettings]:
    """The endpoints that a recipe asks, by section.

    Args:
        recipe: a recipe, without its members.
    """
    inner = getattr(recipe.search, "text_search", None)
    named = {
        "engine": recipe.engine,
        "search.writer": getattr(recipe.search, "writer", None),
        "search.text_search.writer": getattr(inner, "writer", None),
    }
    return {place: each for place, each in named.items() if isinstance(each, EndpointSettings)}


def check_endpoints(recipe: Recipe) -> None:
    """Refuse what cannot be done with a model that is elsewhere.

    Raises:
        ValueError: the end of a sentence about the first such thing.
    """
    endpoints = endpoints_of(recipe)
    budget = recipe.budget
    if budget is not None and not endpoints:
        raise ValueError(
            "budget has no effect, since nothing in the recipe asks an endpoint; remove it, or set "
            "engine.type: endpoint"
        )
    for place, each in endpoints.items():
        if budget is not None and budget.max_cost is not None and each.price_in is None:
            raise ValueError(
                f"budget.max_cost needs to know what {place} costs; set {place}.price_in and "
                f"{place}.price_out, 0 where it is free"
            )
    if isinstance(recipe.engine, EndpointEngineSettings):
        for sentence in _objections(recipe, recipe.engine):
            raise ValueError(sentence)


def _objections(recipe: Recipe, engine: EndpointEngineSettings) -> Iterator[str]:
    """What a recipe asks of a base that is not here."""
    kind = recipe.prompt.type
    if recipe.search is None and not isinstance(recipe.prompt, TextSettings):
        yield (
            "engine.type is endpoint, so no weights are here to learn by gradients; add search, "
            "such as {type: texts}, and set prompt.type: text"
        )
    if not isinstance(recipe.prompt, TextSettings):
        yield f"engine.type is endpoint, which takes texts only, prompt.type is {kind}; set text"
    without_effect = {
        "model": recipe.model != ModelSettings(),
        "distributed": recipe.distributed != DistributedSettings(),
        "training.token_budget": recipe.training.token_budget
        != TrainingSettings.model_fields["token_budget"].default,
    }
    for key, is_set in without_effect.items():
        if is_set:
            yield f"{key} has no effect with engine.type: endpoint, which loads no base; remove it"
    if recipe.evaluation.query_information:
        yield (
            "evaluation.query_information is measured under a base, and with engine.type: endpoint "
            "none is here; remove it"
        )
    if recipe.data.too_long != "refuse":
        yield (
            f"data.too_long is {recipe.data.too_long}, but how many positions a model behind an "
            "endpoint has is not known; remove it"
        )
    name = unsent(engine, recipe.sampling)
    if name is not None:
        yield (
            f"sampling.{name} is no part of OpenAI's protocol; remove it, or set "
            "engine.sampling_extensions: true for a server that takes it, such as vLLM"
        )
