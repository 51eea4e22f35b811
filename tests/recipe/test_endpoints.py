"""What a recipe may say where the model is behind an endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.distributed.ranks import Ranks
from rlprompt.endpoints.settings import EndpointSettings
from rlprompt.errors import InputError
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.endpoints import endpoints_of
from rlprompt.recipe.schema import Recipe
from rlprompt.recipe.stored import foreign_parts
from rlprompt.runs.changes import may_change
from rlprompt.search.endpoint_writer import EndpointWriterSettings
from tests.fixtures.endpoint import endpoint_recipe, endpoint_tree

URL = "http://127.0.0.1:9/v1"
SOFT = {"type": "soft", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"search": None, "prompt": SOFT}, r"no weights are here to learn by gradients; add sear"),
        ({"prompt": SOFT}, r"takes texts only, prompt\.type is soft; set text"),
        ({"model": {"path": "org/model"}}, r"model has no effect with engine\.type: endpoint"),
        ({"model": {"dtype": "float32"}}, r"model has no effect"),
        ({"distributed": {"base": "sharded"}}, r"distributed has no effect"),
        ({"training": {"token_budget": 77}}, r"training\.token_budget has no effect"),
        ({"evaluation": {"query_information": True}}, r"query_information is measured under a ba"),
        ({"data": {"too_long": "skip"}}, r"data\.too_long is skip"),
        ({"sampling": {"top_k": 3}}, r"sampling\.top_k is no part of OpenAI's protocol"),
        ({"sampling": {"stop_token_ids": [3]}}, r"sampling\.stop_token_ids is no part"),
        ({"budget": {"max_cost": 1.0}}, r"set engine\.price_in and engine\.price_out"),
        ({"budget": {}}, r"budget limits nothing"),
        ({"engine": {"price_in": 1.0}}, r"price_out is missing"),
        ({"engine": {"api_key": "sk-abcdefghijklmnopqrstuvwx"}}, r"must name an environment varia"),
        ({"engine": {"base_url": "http://me:pw@host/v1"}}, r"holds a user name or password"),
        ({"engine": {"extra_body": {"api_key": "hidden"}}}, r"has the name of a secret"),
        ({"engine": {"extra_body": {"seed": 3}}}, r"extra_body holds seed"),
        ({"algorithm": {"type": "grpo", "group_size": 3}}, r"algorithm has no effect with search"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_needs_a_base_or_has_no_effect_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    tree = endpoint_tree(tmp_path, URL, **changes)
    if changes.get("prompt") == SOFT:
        tree["prompt"] = SOFT
    with pytest.raises(ValidationError, match=sentence) as caught:
        Recipe(**tree)
    assert "abcdefghijklmnop" not in str(caught.value.errors()[0]["msg"])


def test_a_budget_without_an_endpoint_has_no_effect(tmp_path: Path) -> None:
    tree = endpoint_tree(tmp_path, URL, budget={"max_tokens": 10})
    assert endpoints_of(Recipe(**tree)).keys() == {"engine"}
    del tree["engine"]
    with pytest.raises(ValidationError, match=r"budget has no effect, since nothing"):
        Recipe(**tree)


def test_a_server_that_takes_more_may_be_asked_for_more(tmp_path: Path) -> None:
    recipe = endpoint_recipe(
        tmp_path, URL, sampling={"top_k": 3}, engine={"sampling_extensions": True}
    )
    assert recipe.sampling.top_k == 3
    assert Recipe(**recipe.plain()) == recipe


def test_ranks_and_rewards_that_need_a_base_are_refused(tmp_path: Path) -> None:
    recipe = endpoint_recipe(tmp_path, URL)
    with pytest.raises(InputError, match="needs no ranks"):
        build_single_run(recipe, tmp_path, tmp_path / "out", ranks=Ranks(size=2))
    rewards = [{"path": "builtin:judge", "name": "j", "options": {"rubric": "Is it good?"}}]
    recipe = endpoint_recipe(tmp_path, URL, rewards=rewards)
    with pytest.raises(InputError, match=r"reward 'j' judges with the run's own base"):
        build_single_run(recipe, tmp_path, tmp_path / "out")


def test_a_text_without_search_has_nothing_to_train(tmp_path: Path) -> None:
    recipe = endpoint_recipe(tmp_path, URL, search=None)
    with pytest.raises(InputError, match="nothing to train; evaluate it with"):
        build_single_run(recipe, tmp_path, tmp_path / "out")


def test_how_a_server_is_reached_may_change_and_what_it_says_may_not() -> None:
    reached = {"base_url", "api_key", "concurrency", "request_timeout", "deadline", "retries"}
    reached |= {"backoff", "requests_per_minute", "tokens_per_minute", "template_tokens", "ca_file"}
    reached |= {"price_in", "price_out", "plain_http_key", "max_response_mb"}
    for section in ("engine", "search.writer"):
        for name in EndpointSettings.model_fields:
            assert may_change(f"{section}.{name}") == (name in reached), name
    assert may_change("budget") and may_change("budget.max_tokens")


def test_servers_that_a_strangers_recipe_names_are_known(tmp_path: Path) -> None:
    tree = endpoint_tree(tmp_path, URL)
    tree["search"]["writer"] = {"type": "endpoint", "base_url": "http://evil/v1", "model": "m"}
    found = foreign_parts(tree)
    assert found["engine.base_url"] == URL
    assert found["search.writer.base_url"] == "http://evil/v1"


def test_a_writer_is_an_endpoint_too() -> None:
    writer = EndpointWriterSettings(base_url=URL, model="m", max_tokens=9)
    assert isinstance(writer, EndpointSettings) and writer.sampling.max_tokens == 9
