"""Runs whose training queries are asked in situations: what is logged, resumed, and left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlprompt.data.augment import Augmenter, AugmentSettings
from rlprompt.data.sampler import QuerySampler
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_run
from rlprompt.recipe.schema import load_recipe
from rlprompt.rollout.collect import completion_metrics
from rlprompt.rollout.sources import ColumnSource
from rlprompt.types import Query
from tests.fixtures.runs import (
    assert_same_run,
    comparable_rows,
    stops,
    tiny_policy,
    tiny_recipe,
    tiny_trainer,
)
from tests.fixtures.searches import search_run

AUGMENT = [
    {"situation": {"type": "frame", "name": "asked", "texts": ["Please. {query}"]}, "share": 0.4},
    {"situation": {"type": "misspelt", "share": 1.0}, "share": 0.4},
]
SIX = {"training": {"steps": 6, "save_every": 2}, "evaluation": {"every": 3}}


@pytest.fixture(autouse=True)
def _report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlprompt.recipe.build.write_report", lambda folder: None)


def rows(output: Path, split: str) -> list[dict[str, Any]]:
    return [row for row in read_jsonl(output / "completions.jsonl") if row["split"] == split]


def test_an_augmented_run_resumes_bit_for_bit_and_leaves_validation_alone(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    tiny_trainer(tmp_path, straight, augment=AUGMENT, **SIX, **stops(99, "crash")).run()
    with pytest.raises(InputError, match="fell over"):
        tiny_trainer(tmp_path, resumed, augment=AUGMENT, **SIX, **stops(3, "crash")).run()
    again = tiny_trainer(tmp_path, resumed, augment=AUGMENT, **SIX, **stops(99, "crash"))
    again.run(resume=True)
    assert_same_run(straight, resumed)

    drawn = rows(straight, "train")
    assert {row["situation"] for row in drawn} > {"asked"}
    for row in drawn:
        assert row["query"].startswith("Please. ") == (row["situation"] == "asked")
    heldout = rows(straight, "heldout")
    assert heldout and not any("situation" in row or "Please" in row["query"] for row in heldout)
    logged = read_jsonl(straight / "metrics.jsonl")
    for metrics in logged:  # one query per step: the situation's mean is the step's
        own = {k: v for k, v in metrics.items() if k.startswith("augment/")}
        here = [row for row in drawn if row["step"] == metrics["step"]]
        assert own == {f"augment/{here[0]['situation']}/reward": pytest.approx(metrics["reward"])}


def test_ppo_asks_in_situations(tmp_path: Path) -> None:
    output, training = tmp_path / "run", {"steps": 4, "queries_per_step": 2}
    changes: dict[str, Any] = {"algorithm": {"type": "ppo"}, "training": training}
    tiny_trainer(tmp_path, output, augment=AUGMENT, **changes).run()
    assert {row["situation"] for row in rows(output, "train")} & {"asked", "misspelt"}


def test_given_answers_stay_with_their_queries() -> None:
    given = [
        Query(({"role": "user", "content": f"the rain {i}"},), {"completion": f"sun {i}"}, i)
        for i in range(8)
    ]
    settings = [AugmentSettings.model_validate(entry) for entry in AUGMENT]
    source = ColumnSource(
        given, QuerySampler(8, 8, 0), tiny_policy(), ["completion"], Augmenter(settings, given)
    )
    batch = source.collect(0, 5)
    assert {group.query.situation for group in batch.groups} == {"asked", "misspelt", "plain"}
    for group in batch.groups:
        assert group.completions[0].text == f"sun {group.query.index}"
        assert group.query.columns == given[group.query.index].columns
    assert not any(name.startswith("augment/") for name in completion_metrics(batch))


def test_candidates_of_a_search_meet_the_same_queries_in_the_same_situations(
    tmp_path: Path,
) -> None:
    output = tmp_path / "run"
    search_run(tmp_path, output, training={"steps": 4}, augment=AUGMENT).run()
    met: dict[tuple[int, int], list[str]] = {}
    for row in rows(output, "train"):
        met.setdefault((row["step"], row["candidate"]), []).append(row["query"])
    steps = {step for step, _ in met}
    for step in steps:
        assert len({tuple(each) for (at, _), each in met.items() if at == step}) == 1
    assert any(text.startswith("Please. ") for each in met.values() for text in each)
    assert any("augment/asked/reward" in row for row in read_jsonl(output / "metrics.jsonl"))


def test_members_of_a_population_are_augmented_as_they_would_be_alone(tmp_path: Path) -> None:
    members = [{"name": "a"}, {"name": "b", "changes": {"seed": 1}}]
    changes = {"augment": AUGMENT, "population": members, "training": {"steps": 6}}
    both = tmp_path / "both"
    build_run(tiny_recipe(tmp_path, **changes), tmp_path, both).run()
    alone = tmp_path / "alone"
    tiny_trainer(tmp_path, alone, augment=AUGMENT, training={"steps": 3}).run()
    asked = {
        name: [row["query"] for row in comparable_rows(folder, "completions")]
        for name, folder in (
            ("a", both / "members" / "a"),
            ("b", both / "members" / "b"),
            ("alone", alone),
        )
    }
    assert set(asked["a"]) == set(asked["alone"]) != set(asked["b"])


def test_a_situation_too_long_for_the_base_is_told_before_the_run(tmp_path: Path) -> None:
    long = [{"situation": {"type": "long_context", "words": 2000}, "share": 0.1}]
    with pytest.raises(InputError, match="shorten it or a situation of augment"):
        tiny_trainer(tmp_path, tmp_path / "run", augment=long)


@pytest.mark.parametrize(
    ("augment", "sentence"),
    [
        ([{"type": "earlier", "share": 1.0}], "'augment.0': type is a key of the situation; write"),
        ([{"situation": {"type": "frme"}}], "'augment.0.situation.type' is 'frme'; did you mean"),
        ([{"situation": {"type": "earlier"}, "shre": 1.0}], "'augment.0.shre'; did you mean"),
        ([{"situation": {"type": "earlier"}, "share": 2}], "'augment.0.share'"),
        ([{"situation": {"type": "dialogue"}}], "'augment.0.situation': 'dialogue' needs answers"),
        ([{"situation": {"type": "earlier"}, "share": 0.7}] * 2, "two are called 'earlier'"),
    ],
    ids=["flat", "type", "key", "share", "dialogue", "twice"],
)
def test_errors_name_the_path(tmp_path: Path, augment: list[Any], sentence: str) -> None:
    tree = tiny_recipe(tmp_path).plain() | {"augment": augment}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert sentence in str(caught.value)
