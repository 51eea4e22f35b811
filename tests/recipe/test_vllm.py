"""Recipes and whole runs whose completions are drawn on vLLM servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlprompt.engines.vllm.settings import VllmSettings
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_single_run
from rlprompt.recipe.schema import Recipe
from rlprompt.recipe.stored import foreign_parts
from rlprompt.runs.changes import may_change
from tests.fixtures.runs import tiny_recipe, tiny_trainer
from tests.fixtures.vllm_server import fake_vllm

URL = "http://127.0.0.1:9/v1"
SOFT = {"type": "soft", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": {"type": "prefix"}}, r"prompt\.type is prefix, which engine\.type: vllm can"),
        (
            {"prompt": {"type": "adapter", "method": {"type": "ia3"}}},
            r"prompt\.method\.type is ia3, which engine\.type: vllm cannot apply",
        ),
        (
            {"prompt": {"type": "sequence", "parts": [{"type": "prefix"}, SOFT]}},
            r"prompt\.parts\.0\.type is prefix",
        ),
        ({"sampling": {"top_p": 0.9}}, r"sampling\.top_p leaves tokens out, and vLLM gives"),
        ({"sampling": {"top_k": 5}}, r"sampling\.top_k leaves tokens out"),
        ({"sampling": {"min_p": 0.1}}, r"sampling\.min_p leaves tokens out"),
        ({"sampling": {"min_tokens": 2}}, r"sampling\.min_tokens leaves tokens out"),
        ({"sampling": {"temperature": 2.5}}, r"vLLM takes no more than 2; lower it"),
        ({"distributed": {"base": "sharded"}}, r"distributed\.base is sharded, which is not tried"),
        ({"engine": {"adapter_folder": "/shared"}}, r"adapter_folder has no effect with prompt\.t"),
        (
            {"engine": {"importance_cap": 3.0}, "training": {"overlap_rollouts": True}},
            r"importance_cap has no effect with training\.overlap_rollouts",
        ),
        (
            {"engine": {"importance_cap": 3.0}, "algorithm": {"type": "distill", "teacher": "a"}},
            r"importance_cap has no effect with algorithm\.type: distill",
        ),
        (
            {"engine": {"importance_cap": None}, "algorithm": {"type": "supervised"}},
            r"importance_cap has no effect, since no gradient is taken of what is drawn",
        ),
        ({"engine": {"importance_cap": 0.5}}, r"greater than or equal to 1"),
        ({"engine": {"urls": []}}, r"at least 1 item"),
        ({"engine": {"urls": [URL, f"{URL}/"]}}, r"urls names http.* twice; name each server onc"),
        ({"engine": {"api_key": "sk-abcdefghijklmnopqrstuvwx"}}, r"must name an environment varia"),
        ({"engine": {"url": URL}}, r"Extra inputs"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_drawn_or_has_no_effect_is_refused(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    plain = tiny_recipe(tmp_path).plain()
    engine = {"type": "vllm", "urls": URL, **changes.get("engine", {})}
    sections = {"prompt", "algorithm"} & changes.keys()
    for key, value in changes.items():
        plain[key] = value if key in sections else {**plain[key], **value}
    with pytest.raises(ValidationError, match=sentence) as caught:
        Recipe.model_validate({**plain, "engine": engine})
    assert "abcdefghijklmnop" not in str(caught.value.errors()[0]["msg"])


def test_one_address_may_be_written_as_a_text() -> None:
    assert VllmSettings.model_validate({"urls": URL}).urls == (URL,)


def test_servers_may_move_and_an_artifact_alone_asks_none() -> None:
    settings = VllmSettings(urls=(URL,), adapter_folder="/shared")
    decide = {"type", "model", "importance_cap", "largest_gap"}
    for name in VllmSettings.model_fields:
        assert may_change(f"engine.{name}") == (name not in decide)
    found = foreign_parts({"engine": settings.model_dump(mode="json")})
    assert found == {"engine.urls": [URL], "engine.adapter_folder": "/shared"}


LORA = {"type": "adapter", "text": "the rain", "method": {"type": "lora", "rank": 2}}


def test_a_run_draws_on_its_servers_and_corrects_for_them(tmp_path: Path) -> None:
    with fake_vllm(noise=1e-3) as one, fake_vllm(noise=1e-3) as two:
        engine = {"type": "vllm", "urls": [one.url, two.url]}
        changes = {
            "training": {"steps": 3, "queries_per_step": 2},
            "evaluation": {"every": 3, "completions_per_query": 1},
        }
        tiny_trainer(tmp_path, tmp_path / "run", engine=engine, **changes).run()
        for server in (one, two):
            assert {body["model"] for body in server.completions} == {"tiny"}
            assert sum("prompt_embeds" in body for body in server.completions) > 3
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert 1e-4 < row["sampling/sampling_logp_difference/mean"] < 5e-3
        assert row["sampling/sampling_logp_difference/max"] < 0.02
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.01)
        assert row["sampling/importance_sampling_ratio/truncated"] == 0.0


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "ahead"])
def test_a_resumed_run_goes_on_on_servers_elsewhere(tmp_path: Path, overlap: bool) -> None:
    changes: dict[str, Any] = {
        "training": {"steps": 2, "overlap_rollouts": overlap},
        "evaluation": {"every": 3, "completions_per_query": 1},
    }
    with fake_vllm() as server:
        engine = {"type": "vllm", "urls": server.url}
        tiny_trainer(tmp_path, tmp_path / "run", engine=engine, **changes).run()
    changes["training"]["steps"] = 3
    with fake_vllm() as server:
        engine = {"type": "vllm", "urls": server.url}
        run = tiny_trainer(tmp_path, tmp_path / "run", engine=engine, **changes)
        run.run(resume=True)
    steps = [row["step"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3]


def test_lora_learns_on_a_server(tmp_path: Path) -> None:
    with fake_vllm() as server:
        engine = {"type": "vllm", "urls": server.url, "adapter_folder": str(tmp_path / "versions")}
        plain = tiny_recipe(tmp_path, evaluation={"every": 3, "completions_per_query": 1}).plain()
        recipe = Recipe.model_validate({**plain, "engine": engine, "prompt": LORA})
        build_single_run(recipe, tmp_path, tmp_path / "run").run()
        assert len([each for each in server.history if each.startswith("load")]) >= 3
        assert len(server.loaded) == 1
    rows = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-3
