"""`rlprompt certify`: what is claimed follows from what is stored, and what cannot be is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlprompt.certify.bounds import clopper_pearson_upper
from tests.cli.runs import Shown, rlprompt, write_recipe

SPLITS = {"train": 8, "validation": 4, "test": 30}
WORDS = ("rain", "sun", "land", "men", "the", "is", "he", "she", "there", "what", "who", "where")


def queries() -> list[dict[str, str]]:
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:4] for c in WORDS[5:7]]
    names = [name for name, count in SPLITS.items() for _ in range(count)]
    rows = zip(texts, names, strict=False)
    return [
        {"query": text, "split": name, "kind": "ab"[place % 2]}
        for place, (text, name) in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def trained(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certify")
    data = {"rows": queries(), "split_column": "split"}
    recipe = write_recipe(folder, model_dir, data=data)
    shown = rlprompt("train", recipe, "--output", folder / "run")
    assert shown.code == 0, shown.err
    return folder


@pytest.fixture
def project(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that may be written to."""
    folder = tmp_path / "project"
    shutil.copytree(trained, folder)
    return folder


def certify(project: Path, *options: object, alpha: object = 0.3) -> Shown:
    chosen = ("--reward", "vowels", "--fails-above", 0.9, "--alpha", alpha)
    where = ("--recipe", project / "recipe.yaml")
    return rlprompt("certify", project / "run", *where, *chosen, *options)


def stored(project: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(
        (project / "run" / "artifact" / "certificate.json").read_text()
    )
    return content


def rewrite(project: Path, **changes: Any) -> None:
    path = project / "run" / "artifact" / "certificate.json"
    path.write_text(json.dumps(stored(project) | changes))


def test_a_certificate_is_what_its_counts_say(project: Path) -> None:
    shown = certify(project)
    assert shown.code == 0, shown.err
    found = stored(project)
    failures = sum(found["risks"][0]["losses"])
    assert len(found["risks"][0]["losses"]) == found["data"]["num_queries"] == 30
    assert found["bounds"] == [
        pytest.approx(clopper_pearson_upper(int(failures), 30, 0.05), abs=1e-5)
    ]
    assert found["statement"] in shown.out
    assert "at least 0.95 over the draw of 30 queries" in found["statement"]
    assert "30 queries can certify 0.09503 at best; alpha = 0.3 needs at least 9" in shown.err
    card = (project / "run" / "artifact" / "README.md").read_text()
    assert "## Certificate" in card and "at most 0.3" in card
    verified = rlprompt("certify", project / "run", "--verify", "--recipe", project / "recipe.yaml")
    assert verified.code == 0, verified.out
    chat = rlprompt("chat", project / "run" / "artifact", "--query", "what is rain")
    assert chat.code == 0, chat.err


def test_the_same_call_gives_the_same_losses(project: Path) -> None:
    assert certify(project).code == 0
    first = stored(project)
    assert certify(project).code == 0
    second = stored(project)
    assert {**first, "created": ""} == {**second, "created": ""}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": 0.01}, "the p-value"),
        ({"delta": 1e-9}, "do not certify"),
        ({"num_compared": 40}, "the bounds"),
        ({"bounds": [0.001]}, "the bounds"),
        ({"shift": "tv:0.2"}, "the p-value"),
        ({"statement": "It never fails."}, "its words say something else"),
        ({"place": 3}, "a number of prompts"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_verify_finds_what_does_not_follow(
    project: Path, changes: dict[str, Any], said: str
) -> None:
    assert certify(project).code == 0
    rewrite(project, **changes)
    verified = rlprompt("certify", project / "run", "--verify")
    assert verified.code == 1
    assert said in verified.out


def test_verify_finds_other_losses_and_other_queries(project: Path) -> None:
    assert certify(project).code == 0
    risk = stored(project)["risks"][0]
    rewrite(project, risks=[risk | {"losses": [1.0] * 5 + risk["losses"][5:]}])
    assert "the p-value" in rlprompt("certify", project / "run", "--verify").out
    rewrite(project, risks=[risk])
    recipe = project / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("query: land rain", "query: land of rain"))
    verified = rlprompt("certify", project / "run", "--verify", "--recipe", recipe)
    assert verified.code == 1
    assert "the queries are not those that it was drawn on" in verified.out


def test_a_certificate_of_another_prompt_is_refused_on_loading(project: Path) -> None:
    assert certify(project).code == 0
    artifact = project / "run" / "artifact"
    content = json.loads((artifact / "prompt.json").read_text())
    (artifact / "prompt.json").write_text(json.dumps(content | {"init_text": "Be bad."}))
    for command in (
        ("chat", artifact, "--query", "what is rain"),
        ("certify", artifact, "--verify"),
    ):
        shown = rlprompt(*command)
        assert shown.code == 2
        assert "was issued for another prompt" in shown.err


def test_a_damaged_certificate_is_one_sentence(project: Path) -> None:
    assert certify(project).code == 0
    for text in ("{", "[]", '{"schema_version": 1}', "null", '{"alpha": "x"}'):
        (project / "run" / "artifact" / "certificate.json").write_text(text)
        shown = rlprompt("certify", project / "run", "--verify")
        assert shown.code == 2 and shown.err.count("\n") == 1, shown.err
        assert "is damaged" in shown.err


def test_what_is_impossible_is_said_before_the_model_loads(project: Path) -> None:
    shutil.rmtree(project / "model", ignore_errors=True)
    shown = certify(project, alpha=0.05)
    assert shown.code == 1
    assert "the 30 queries can certify 0.09503 at best" in shown.err
    assert "which needs 59 queries without a failure" in shown.err
    shown = certify(project, "--shift", "tv:0.3")
    assert shown.code == 1 and "no number of queries certifies it" in shown.err
    assert not (project / "run" / "artifact" / "certificate.json").exists()


def test_a_prompt_that_fails_too_often_gets_nothing(project: Path) -> None:
    shown = rlprompt(
        "certify", project / "run", "--recipe", project / "recipe.yaml", "--reward", "vowels",
        "--fails-above", -1, "--alpha", 0.3,
    )  # fmt: skip
    assert shown.code == 1
    assert "30 of 30 queries, so at most 1" in shown.out
    assert "unless it leaves" in shown.out
    assert not (project / "run" / "artifact" / "certificate.json").exists()


def judge_file(project: Path, hits: int, of: int, false: int, others: int) -> Path:
    rows = [{"human": 1, "judge": float(i < hits)} for i in range(of)]
    rows += [{"human": 0, "judge": float(i < false)} for i in range(others)]
    path = project / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_judge_that_errs_little_costs_little(project: Path) -> None:
    good = certify(project, "--judge-labels", judge_file(project, 95, 100, 1, 100))
    assert good.code == 0, good.out + good.err
    found = stored(project)
    assert found["judge"]["flagged_failures"] == 95
    assert found["bounds"][0] > clopper_pearson_upper(0, 30, 0.05)
    assert rlprompt("certify", project / "run", "--verify").code == 0


def test_a_judge_whose_errors_make_it_impossible_is_told_so(project: Path) -> None:
    shown = certify(project, "--judge-labels", judge_file(project, 3, 10, 2, 10))
    assert shown.code == 1
    assert "it flagged 3 of 10 labelled failures and 2 of 10 other answers" in shown.err
    assert "a judge that errs less" in shown.err
    assert not (project / "run" / "artifact" / "certificate.json").exists()


def test_labelled_answers_are_judged_by_the_reward_itself(project: Path) -> None:
    rows = [{"query": "q", "completion": "aeiouaeiou", "human": 1}] * 60
    rows += [{"query": "q", "completion": "xyz", "human": 0}] * 60
    path = project / "labels.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    shown = certify(project, "--judge-labels", path)
    assert shown.code == 0, shown.out + shown.err
    judge = stored(project)["judge"]
    assert (judge["flagged_failures"], judge["flagged_others"]) == (60, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--alpha", "1.5"), "--alpha is 1.5"),
        (("--alpha", "0.3"), "--alpha 0.3 is given twice"),
        (("--alpha", "0.5", "--in-sequence"), "give one --alpha, or leave --in-sequence out"),
        (("--delta", "0"), "--delta is 0"),
        (("--shift", "l2:3"), "--shift: 'l2:3' is no shift"),
        (("--fails-below", "0"), "keep one"),
        (("--groups", "colour"), "nothing in the column 'colour'"),
        (("--where", "colour=red"), "the queries have the columns kind"),
        (("--where", "kind"), "write COLUMN=VALUE"),
        (("--where", "kind=c"), "no query has kind=c"),
        (("--data", "fresh.jsonl", "--split", "validation"), "--split has no effect"),
        (("--verify",), "so alpha has no effect"),
        (("--split", "train"), "write test or validation"),
        (("--option", "a=1"), "--option has no effect on 'vowels'"),
        (("--in-sequence", "--num-compared", "3"), "leave --in-sequence out"),
        (("--candidates", "nowhere"), "is not recorded"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--judge-labels", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_options_get_one_sentence(project: Path, options: tuple[str, ...], said: str) -> None:
    shown = certify(project, *options)
    assert shown.code == 2, shown.out
    assert said in shown.err and shown.err.count("error:") == 1


def test_labels_of_one_kind_and_of_no_kind_are_refused(project: Path) -> None:
    shown = certify(project, "--judge-labels", judge_file(project, 5, 5, 0, 0))
    assert shown.code == 2 and "have the same label" in shown.err
    (project / "labels.jsonl").write_text('{"human": "maybe", "judge": 1}')
    shown = certify(project, "--judge-labels", project / "labels.jsonl")
    assert shown.code == 2 and "in the column 'human'" in shown.err


def test_a_reward_outside_of_0_and_1_needs_a_rule(project: Path) -> None:
    (project / "far.py").write_text(
        "def reward(completions, **kwargs):\n    return [3.0] * len(completions)\n"
    )
    arguments = ("certify", project / "run", "--recipe", project / "recipe.yaml", "--alpha", 0.4)
    shown = rlprompt(*arguments, "--reward", project / "far.py")
    assert shown.code == 2 and "--fails-above or --fails-below" in shown.err
    shown = rlprompt(*arguments, "--reward", project / "far.py", "--fails-above", 3)
    assert shown.code == 0, shown.err
    assert stored(project)["risks"][0]["source_hash"]


def test_only_queries_of_a_kind(project: Path) -> None:
    assert certify(project, "--where", "kind=a").code == 0
    data = stored(project)["data"]
    assert (data["num_queries"], data["split"]) == (15, "test, kind=a")
    recipe = project / "recipe.yaml"
    assert rlprompt("certify", project / "run", "--verify", "--recipe", recipe).code == 0


def test_silence_counts_as_failure(project: Path) -> None:
    (project / "mute.py").write_text(
        "def reward(completions, **kwargs):\n    return [None] * len(completions)\n"
    )
    shown = rlprompt(
        "certify", project / "run", "--recipe", project / "recipe.yaml", "--alpha", 0.4,
        "--reward", project / "mute.py",
    )  # fmt: skip
    assert shown.code == 1 and "so at most 1" in shown.out


def test_groups_shift_and_averages_are_claimed_and_checked(project: Path) -> None:
    options = ("--groups", "kind", "--shift", "ratio:1.2", "--completions", 3)
    shown = certify(project, *options, alpha=0.6)
    assert shown.code == 0, shown.out + shown.err
    found = stored(project)
    assert "in each of the 2 groups of kind" in found["statement"]
    assert "with a likelihood ratio of at most 1.2 to it" in found["statement"]
    assert "the mean of 3 completions of each query" in found["statement"]
    assert rlprompt("certify", project / "run", "--verify").code == 0


def test_on_the_validation_split_every_prompt_that_was_compared_counts(project: Path) -> None:
    summary = json.loads((project / "run" / "summary.json").read_text())
    shown = certify(project, "--split", "validation", "--num-compared", 1, alpha=0.95)
    assert shown.code == (2 if summary["num_compared"] > 1 else 0)
    shown = certify(project, "--split", "validation", alpha=0.95)
    assert shown.code == 0, shown.err
    assert stored(project)["num_compared"] == summary["num_compared"]


def test_prompts_of_one_call_share_delta(project: Path) -> None:
    other = project / "other"
    shutil.copytree(project / "run" / "artifact", other)
    shown = certify(project, "--json")
    alone = json.loads(shown.out)[0]["bounds"]["vowels"]
    shown = rlprompt(
        "certify", project / "run", other, "--recipe", project / "recipe.yaml", "--reward",
        "vowels", "--fails-above", 0.9, "--alpha", 0.3, "--json",
    )  # fmt: skip
    rows = json.loads(shown.out)
    assert [row["certified"] for row in rows] == [True, True]
    assert all(row["bounds"]["vowels"] > alone for row in rows)
    assert rlprompt("certify", project / "run", other, "--verify").code == 0
    assert rlprompt("certify", other, project / "run" / ".." / "other", "--verify").code == 2


def limits(project: Path, *artifacts: Path, of: tuple[float, ...]) -> Shown:
    alphas = [part for limit in of for part in ("--alpha", limit)]
    return rlprompt(
        "certify", *artifacts, "--recipe", project / "recipe.yaml", "--reward", "vowels",
        "--fails-above", 0.9, "--json", *alphas,
    )  # fmt: skip


def test_of_several_limits_the_smallest_that_passes_is_claimed(project: Path) -> None:
    """At no price: the bound is that of one limit, and the claim is the smallest above it."""
    (row,) = json.loads(certify(project, "--json").out)
    bound = row["bounds"]["vowels"]
    of = (round(bound + 0.01, 3), 0.9, round(bound - 0.01, 3), 0.001)
    shown = limits(project, project / "run", of=of)
    assert shown.code == 0, shown.err
    (row,) = json.loads(shown.out)
    assert row["alpha"] == of[0] and row["bounds"]["vowels"] == bound
    found = stored(project)
    assert found["limits"] == sorted(of, reverse=True) and found["alpha"] == of[0]
    assert f"is at most {of[0]:g}" in row["statement"]
    assert f"not shown: at most {of[2]:g} or 0.001" in row["statement"]
    assert "impossible: the 30 queries can certify" in shown.err  # 0.001
    verified = rlprompt("certify", project / "run", "--verify", "--recipe", project / "recipe.yaml")
    assert verified.code == 0, verified.out


def test_limits_of_several_prompts_share_delta_equally(project: Path) -> None:
    other = project / "other"
    shutil.copytree(project / "run" / "artifact", other)
    shown = limits(project, project / "run", other, of=(0.9, 0.001))
    rows = json.loads(shown.out)
    assert [row["alpha"] for row in rows] == [0.9, 0.9]
    assert stored(project)["method"] == "bonferroni"
    assert rlprompt("certify", project / "run", other, "--verify").code == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "holm"}, "does not cover them"),
        ({"limits": [0.5, 0.9]}, "not in order"),
        ({"limits": [0.9]}, "without 0.5"),
        ({"limits": [0.9, 0.5, 0.45]}, "certify 0.45 too"),
    ],
    ids=["method", "order", "missing", "stricter"],
)
def test_verify_knows_several_limits(project: Path, changes: dict[str, Any], said: str) -> None:
    path = project / "run" / "artifact" / "certificate.json"
    assert limits(project, project / "run", of=(0.9, 0.5, 0.001)).code == 0
    content = stored(project)
    assert content["alpha"] == 0.5
    path.write_text(json.dumps(content | changes))
    shown = rlprompt("certify", project / "run", "--verify")
    assert shown.code == 1 and said in shown.out


def test_where_no_limit_passes_the_loosest_is_explained(project: Path) -> None:
    shown = rlprompt(
        "certify", project / "run", "--recipe", project / "recipe.yaml", "--reward", "vowels",
        "--fails-above", -1, "--alpha", 0.2, "--alpha", 0.5,
    )  # fmt: skip
    assert shown.code == 1 and "and alpha is 0.5" in shown.out
    shown = limits(project, project / "run", of=(0.01, 0.001))
    assert shown.code == 1 and shown.err.count("impossible: ") == 1


def test_fresh_queries_that_were_trained_on_are_refused(project: Path) -> None:
    path = project / "fresh.jsonl"
    path.write_text(
        "\n".join(json.dumps({"query": row["query"], "kind": "a"}) for row in queries()[:20])
    )
    shown = certify(project, "--data", path)
    assert shown.code == 2 and "trains or chooses on" in shown.err


def test_saving_another_prompt_takes_the_certificate_away(project: Path) -> None:
    from rlprompt import load_prompt

    assert certify(project).code == 0
    artifact = project / "run" / "artifact"
    load_prompt(artifact).save(artifact)
    assert not (artifact / "certificate.json").exists()
