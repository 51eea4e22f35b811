"""The base that a recipe names: what is known of it before it is loaded, and the policy over it."""

from __future__ import annotations

from rlprompt.data.base import QuerySplit
from rlprompt.distributed.ranks import DistributedSettings
from rlprompt.errors import InputError
from rlprompt.model.outline import Outline, read_outline
from rlprompt.model.sharded.shards import ShardSettings
from rlprompt.policy import Policy, open_policy
from rlprompt.recipe.objects import Objects, in_memory
from rlprompt.recipe.schema import Recipe


def check_renders(policy: Policy, data: QuerySplit) -> None:
    """Refuse a query that the chat template cannot take, before any is asked.

    Args:
        policy: the policy, for its template.
        data: all queries.

    Raises:
        InputError: it names the query and says why.
    """
    for query in (*data.train, *data.heldout, *data.test):
        try:
            policy.slot.check(query.messages)
        except InputError as error:
            raise InputError(f"query {query.index} of the dataset: {error}") from error


def outline_of(recipe: Recipe, objects: Objects) -> Outline:
    """What is known of the base before it is loaded.

    Args:
        recipe: the recipe.
        objects: what is in memory.

    Raises:
        InputError: see `read_outline`, or the model was in memory of another program.
    """
    if in_memory(recipe.model.path) and objects.policy is not None:
        policy = objects.policy
        return Outline(policy.base.id, policy.slot, policy.forward.max_positions)
    if in_memory(recipe.model.path):
        raise InputError(
            f"model.path is '{recipe.model.path}', a model in memory of the program that began "
            "this run; name a folder or a hub id, or call rlprompt.train with the model"
        )
    return read_outline(recipe.model)


def policy_of(recipe: Recipe, objects: Objects) -> Policy:
    """The policy over the base of a recipe: loaded, or in memory already.

    Args:
        recipe: the recipe.
        objects: what is in memory.

    Raises:
        InputError: see `open_policy`, or a model in memory is to be cut up.
    """
    if not in_memory(recipe.model.path):
        return open_policy(recipe.model, _sharding(recipe.distributed))
    assert objects.policy is not None  # `outline_of` refuses
    if recipe.distributed.base != "replicated":
        raise InputError(
            "distributed.base is sharded, which cuts a model up while it is loaded; give model "
            "as a path, or remove distributed.base"
        )
    return objects.policy.sibling()


def _sharding(settings: DistributedSettings) -> ShardSettings | None:
    """How the base is cut up; None when every rank holds it whole."""
    if settings.base == "replicated":
        return None
    return ShardSettings(
        settings.offload, settings.nvme_path, settings.secondary_shards, settings.gather
    )
