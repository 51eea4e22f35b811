"""Whether a recipe has work for a number of ranks: asked before nodes are waited for."""

from __future__ import annotations

from rlprompt.engines.endpoint import EndpointEngineSettings
from rlprompt.errors import InputError
from rlprompt.recipe.schema import Recipe


def require_work(recipe: Recipe, ranks: int) -> None:
    """Refuse a number of ranks that a run would refuse, or that would leave some without work.

    Args:
        recipe: the recipe.
        ranks: the number of processes that share its work, one per GPU where there are any.

    Raises:
        InputError: it cannot be divided so; the sentence says what to change.
    """
    if ranks == 1:
        return
    if recipe.population:
        raise InputError(
            f"population trains its members one after the other on one rank, and {ranks} are asked "
            "for; submit one job per member (rlprompt submit --sweep)"
        )
    if isinstance(recipe.engine, EndpointEngineSettings):
        raise InputError(
            "engine.type is endpoint, which needs no ranks to divide work among, and "
            f"{ranks} are asked for; ask for one"
        )
    if recipe.training.overlap_rollouts:
        raise InputError(
            f"training.overlap_rollouts works on one rank, and {ranks} are asked for; remove it"
        )
    queries, algorithm = recipe.training.queries_per_step, recipe.algorithm
    copies = 1 if algorithm.answer_columns else int(getattr(algorithm, "group_size", 1))
    if recipe.search is None and queries * copies < ranks:
        asked = f"training.queries_per_step is {queries}"
        if copies > 1:
            asked += f" with {copies} completions each"
        raise InputError(
            f"{asked} and there are {ranks} ranks, so some would have nothing to do; raise it"
        )
