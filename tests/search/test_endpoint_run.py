"""Whole runs for a model behind an endpoint: faults, a budget, signals and kills change no number.

The undisturbed run is the measure: whatever happens on the way, the rows of all logs are its rows,
and no request is answered twice.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.cli.main import main
from rlprompt.errors import InputError
from rlprompt.files import read_jsonl
from rlprompt.recipe.build import build_single_run
from rlprompt.runs.run import Run
from rlprompt.runs.summary import Summary
from tests.fixtures.endpoint import (
    Bill,
    Provider,
    endpoint_recipe,
    endpoint_tree,
    never,
    serving,
    torn,
)
from tests.fixtures.http_server import Answer
from tests.fixtures.runs import comparable_rows, tiny_policy

KINDS = ("metrics", "completions", "evaluation")
ROOT = Path(__file__).parents[2]


def run_of(folder: Path, url: str, **changes: Any) -> Run:
    """The run in `folder/out`, built anew."""
    output = folder / "out"
    output.mkdir(exist_ok=True)
    recipe = endpoint_recipe(folder, url, **changes)
    return build_single_run(recipe, folder, output, Console(file=StringIO()))


def rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {kind: comparable_rows(folder / "out", kind) for kind in KINDS}


def twice(provider: Provider) -> int:
    """Requests that were answered again."""
    counts = Counter(json.dumps(bill.body, sort_keys=True) for bill in provider.billed)
    return sum(count - 1 for count in counts.values())


def told(summary: Summary) -> dict[str, Any]:
    """What a summary says of the prompt, and of the money."""
    names = ("steps", "stopped_because", "heldout", "candidates", "verdict", "best_step")
    return {name: summary[name] for name in names}  # type: ignore[literal-required]


@pytest.fixture(scope="module")
def measure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any, int]]:
    """Rows and summary of the undisturbed run, and the tokens that it was billed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving() as provider:
        summary = run_of(folder, provider.url).run()
        assert twice(provider) == 0
        assert summary["endpoint"]["tokens"] == provider.tokens
        assert summary["endpoint"]["requests"] == len(provider.billed)
        assert summary["endpoint"]["lost_tokens"] == 0
    yield rows(folder), told(summary), provider.tokens


def test_a_run_says_what_it_can_and_leaves_out_what_needs_a_base(tmp_path: Path) -> None:
    with serving() as provider:
        run = run_of(tmp_path, provider.url, training={"steps": 2})
        summary = run.run()
    assert summary["base_fingerprint_before"] is summary["base_fingerprint_after"] is None
    assert "base_kl" not in summary["heldout"]["base"]
    (evaluated,) = [r for r in read_jsonl(tmp_path / "out/evaluation.jsonl") if r["who"] == "base"]
    assert evaluated["mean_length"] > 0
    info = read_artifact_info(tmp_path / "out/artifact")
    assert info.endpoint == {"base_url": provider.url, "model": "tiny"}
    assert (info.schema_version, info.num_virtual_tokens, info.base_fingerprint) == (3, None, None)
    card = (tmp_path / "out/artifact/README.md").read_text()
    assert info.init_text in card and "tiny at http://" in card
    with pytest.raises(InputError, match=r"was found for tiny at .* take its text"):
        _ = run.prompt
    policy = tiny_policy()
    with pytest.raises(InputError, match=r"was made on tiny at http.* or --force"):
        load_artifact(tmp_path / "out/artifact", policy)
    forced = load_artifact(tmp_path / "out/artifact", policy, force=True)
    assert (forced.kind, forced.init_text) == ("text", info.init_text)


def test_faults_change_no_number(tmp_path: Path, measure: tuple[Any, Any, int]) -> None:
    def fault(number: int, bill: Bill) -> Answer | None:
        return {
            1: Answer({"error": "slow down"}, status=429, headers={"Retry-After": "0.05"}),
            4: Answer("oops", status=500),
            7: Answer(hang_up=True),
            10: torn(bill),
            13: Answer({"choices": [], "usage": bill.answer["usage"]}),
            16: Answer(bill.answer, delay=3.0),
            19: Answer(b"\xff\x00"),
        }.get(number)

    with serving(fault) as provider:
        summary = run_of(tmp_path, provider.url, engine={"request_timeout": 2.0}).run()
    assert rows(tmp_path) == measure[0]
    assert told(summary) == measure[1]
    assert len(provider.seen) >= len(provider.billed) + 7
    assert summary["endpoint"]["tokens"] == provider.tokens + summary["endpoint"]["lost_tokens"]
    assert twice(provider) == 0 or summary["endpoint"]["lost_tokens"]


def test_a_budget_ends_it_mid_generation_and_nothing_is_lost(
    tmp_path: Path, measure: tuple[Any, Any, int]
) -> None:
    whole = measure[2]
    with serving() as provider:
        for limit in (30, whole // 5, whole // 2, whole - 1):
            ended = run_of(tmp_path, provider.url, budget={"max_tokens": limit}).run(resume=True)
            assert ended["stopped_because"] == "budget"
            assert provider.tokens == ended["endpoint"]["tokens"] <= limit
            assert limit - provider.tokens < 110  # what a request can take at most
            seen = len(provider.seen)
            again = run_of(tmp_path, provider.url, budget={"max_tokens": limit}).run(resume=True)
            assert again["stopped_because"] == "budget" and len(provider.seen) == seen
        summary = run_of(tmp_path, provider.url, budget={"max_tokens": whole + 110}).run(
            resume=True
        )
        assert twice(provider) == 0
        assert provider.tokens == summary["endpoint"]["tokens"] == whole
    assert rows(tmp_path) == measure[0]
    assert told(summary) == measure[1]


def test_a_stop_signal_changes_no_number(tmp_path: Path, measure: tuple[Any, Any, int]) -> None:
    def stopping(number: int, bill: Bill) -> None:
        if number in (5, 30):  # in an evaluation, and in a step
            os.kill(os.getpid(), signal.SIGTERM)

    with serving(stopping, pause=0.05) as provider:
        for _ in range(2):
            summary = run_of(tmp_path, provider.url).run(resume=True)
            assert summary["stopped_because"] == "SIGTERM"
        summary = run_of(tmp_path, provider.url).run(resume=True)
        assert twice(provider) == 0
        assert provider.tokens == summary["endpoint"]["tokens"] == measure[2]
    assert rows(tmp_path) == measure[0]
    assert told(summary) == measure[1]


@pytest.mark.slow
def test_a_kill_changes_no_number_and_loses_what_was_under_way_only(
    tmp_path: Path, measure: tuple[Any, Any, int]
) -> None:
    with serving(pause=0.02) as provider:
        tree = endpoint_tree(tmp_path, provider.url, engine={"concurrency": 2})
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
        command = [sys.executable, "-m", "rlprompt", "train", "recipe.yaml", "--output", "out"]
        for after in (12, 40):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            child = subprocess.Popen([*command, "--auto-resume"], cwd=tmp_path, env=environment)
            while len(provider.billed) < after and child.poll() is None:
                time.sleep(0.005)
            assert child.poll() is None
            child.kill()
            child.wait()
        run = run_of(tmp_path, provider.url, engine={"concurrency": 2})
        summary = run.run(resume=True)
    lost = summary["endpoint"]["lost_tokens"]
    assert twice(provider) <= 4  # two kills with two requests under way at most
    assert summary["endpoint"]["tokens"] - lost == measure[2]
    assert provider.tokens <= summary["endpoint"]["tokens"]
    assert rows(tmp_path) == measure[0]
    assert told(summary) == measure[1]


def test_an_error_of_the_server_ends_it_and_the_run_goes_on_later(
    tmp_path: Path, measure: tuple[Any, Any, int]
) -> None:
    with serving(lambda n, _: Answer({}, status=400) if n == 25 else None) as provider:
        with pytest.raises(InputError, match="status 400"):
            run_of(tmp_path, provider.url).run()
        summary = run_of(tmp_path, provider.url).run(resume=True)
        assert twice(provider) == 0 and provider.tokens == measure[2]
    assert rows(tmp_path) == measure[0]
    assert told(summary) == measure[1]


def test_test_queries_count_for_the_budget(tmp_path: Path) -> None:
    data = {"test": 2}
    with serving() as provider:
        whole = run_of(tmp_path, provider.url, data=data, training={"steps": 1}).run()
    assert whole["stopped_because"] == "finished" and "test" in whole
    other = tmp_path / "other"
    other.mkdir()
    spent = whole["endpoint"]["tokens"]
    changes: dict[str, Any] = {"data": data, "training": {"steps": 1}}
    with serving() as provider:
        cut = run_of(other, provider.url, **changes, budget={"max_tokens": spent - 30}).run()
        assert cut["stopped_because"] == "budget" and "test" not in cut
        done = run_of(other, provider.url, **changes).run(resume=True)
        assert done["test"] == whole["test"] and twice(provider) == 0


def test_a_population_has_one_journal_and_one_budget(tmp_path: Path) -> None:
    from rlprompt.recipe.build import build_run

    members = [{"name": name, "changes": {"seed": seed}} for seed, name in enumerate("ab")]
    changes: dict[str, Any] = {"population": members, "training": {"steps": 4}}
    output = tmp_path / "out"
    output.mkdir()
    with serving() as provider:
        limited = endpoint_recipe(tmp_path, provider.url, budget={"max_tokens": 500}, **changes)
        ended = build_run(limited, tmp_path, output).run()
        assert ended["stopped_because"] == "budget" and provider.tokens <= 500
        recipe = endpoint_recipe(tmp_path, provider.url, **changes)
        summary = build_run(recipe, tmp_path, output).run(resume=True)
    assert summary["stopped_because"] == "finished"
    assert twice(provider) == 0
    assert summary["endpoint"]["tokens"] == provider.tokens
    assert (output / "endpoint.jsonl").is_file()
    assert not list(output.glob("members/*/endpoint.jsonl"))


def command(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints."""
    with pytest.raises(SystemExit) as ended:
        sys.argv = ["rlprompt", *words]
        main()
    assert not ended.value.code, capsys.readouterr().err
    return capsys.readouterr().out


def test_commands_work_through_the_endpoint_or_say_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with serving() as provider:
        tree = endpoint_tree(
            tmp_path, provider.url, training={"steps": 3}, budget={"max_tokens": 500}
        )
        path, output = str(tmp_path / "recipe.yaml"), str(tmp_path / "out")
        Path(path).write_text(yaml.safe_dump(tree), encoding="utf-8")
        shown = command(capsys, "train", path, "--output", output)
        assert "the budget for endpoints is spent" in shown
        assert f"rlprompt resume {output} budget.max_tokens=1000" in shown.replace("\n", " ")
        command(capsys, "resume", output, "budget.max_tokens=5000")
        assert "for tiny behind an endpoint" in Path(output, "report.html").read_text()
        found = json.loads(command(capsys, "eval", output))
        assert found["base_fingerprint"] is None and found["heldout"]["prompt"]["reward"] >= 0
        assert found["endpoint"]["requests"] > 0
        forecast = command(capsys, "forecast", path, "--queries", "3", "--json", "budget=null")
        assert json.loads(forecast)["num_queries"] == 3
        asked = len(provider.seen)
        for words, sentence in (
            (["chat", output, "--query", "hello"], "whose weights are not here"),
            (["eval", f"{output}/artifact", "--recipe", path, "engine.model=x"], "not for x at"),
        ):
            with pytest.raises(SystemExit) as ended:
                sys.argv = ["rlprompt", *words]
                main()
            assert ended.value.code and sentence in " ".join(capsys.readouterr().err.split())
        assert len(provider.seen) == asked


def test_an_artifact_alone_sends_nothing_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlprompt.recipe.stored import carried_recipe

    monkeypatch.setenv("AWS_SECRET", "very-secret-indeed")
    with serving(never) as provider:
        changes: dict[str, Any] = {"training": {"steps": 1}, "engine": {"api_key": "${AWS_SECRET}"}}
        run_of(tmp_path, provider.url, **changes).run()
        for row in provider.seen:
            assert row.headers["Authorization"] == "Bearer very-secret-indeed"
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"very-secret" not in file.read_bytes(), file
    with pytest.raises(InputError, match=r"names engine\.base_url: http.*an artifact alone does"):
        carried_recipe(tmp_path / "out/artifact", ["rewards=[]"])
