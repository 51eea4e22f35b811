from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlprompt.certify.verdict import judge
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reports.plots import MAX_POINTS, Curve, draw_curves, thin
from rlprompt.reports.report import write_report
from rlprompt.tracking.tracker import RunInfo
from rlprompt.tracking.trackers import JsonlTracker

HOSTILE = '</div><script>alert("x")</script><img src=https://evil.example/a onerror=alert(1)>'
WHO = {"base": -2.0, "handwritten": -1.25, "learned": -0.5}


VERDICT = judge(
    {who: np.full((8, 2), mean) + np.arange(8)[:, None] / 80 for who, mean in WHO.items()},
    split="validation",
    num_compared=3,
).plain()


class Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def evaluation(reward: float) -> dict[str, Any]:
    return {
        "reward": reward,
        "reward_std": 0.5,
        "reward_sem": 0.0625,
        "rewards": {"brevity": reward, "<i>watch</i>": 0.25, "$a_b$": None},
        "num_queries": 32,
        "num_completions": 64,
        "mean_length": 40.0,
        "terminated_share": 0.75,
        "base_logprob": -1.5,
    }


def completions(who: str, split: str, count: int, text: str) -> list[dict[str, Any]]:
    return [
        {
            "split": split,
            "who": who,
            "query": f"query {index} {HOSTILE}",
            "completion": f"{who} {index} {text}",
            "reward": 0.5 if index else None,
            "rewards": {"brevity": 0.5, HOSTILE: None},
            "terminated": index != 1,
            "num_tokens": 7,
            "advantage": None,
        }
        for index in range(count)
    ]


def metrics(step: int) -> dict[str, float]:
    phases = {f"time/{name}": 0.5 for name in ("rollout", "reward", "forward", "backward")}
    return {
        "reward": -1.0 / (step + 1),
        "reward_std": 0.25,
        "rewards/brevity/mean": step * 0.1,
        "rewards/<i>watch</i>/mean": step * 0.1,
        "rewards/$a_b$/mean": 0.5,
        "kl": 0.01 * step if step != 3 else math.nan,
        "clip_ratio/low_mean": 0.01,
        "clip_ratio/high_mean": 0.02,
        "step_time": 2.0,
        **phases,
    }


def make_run(folder: Path, steps: int = 6, text: str = HOSTILE) -> None:
    tracker = JsonlTracker()
    tracker.start(RunInfo(name="test", output_dir=folder, steps=steps, base="tiny"))
    for who, reward in WHO.items():
        tracker.log_evaluation(0, who, evaluation(reward - (who == "learned")))
        tracker.log_completions(0, completions(who, "heldout", 12, text))
    for step in range(1, steps + 1):
        tracker.log_metrics(step, metrics(step))
        tracker.log_completions(step, completions("learned", "train", 2, text[:100]))
    tracker.log_evaluation(steps // 2, "learned", evaluation(WHO["learned"]))
    tracker.log_completions(steps // 2, completions("learned", "heldout", 12, f"kept {text}"))
    tracker.log_evaluation(steps, "learned", evaluation(-0.75))
    tracker.log_completions(steps, completions("learned", "heldout", 12, f"last {text}"))
    tracker.finish({})
    summary = {
        "steps": steps,
        "seconds": 12.5,
        "heldout_reward_before": WHO["base"],
        "heldout_reward_handwritten": WHO["handwritten"],
        "heldout_reward_after": WHO["learned"],
        "best_step": steps // 2,
        "verdict": VERDICT,
        "steps_without_signal": 2,
        "base_fingerprint_before": "sha256:abc",
        "base_fingerprint_after": "sha256:abc",
        "artifact": f"/runs/{HOSTILE}",
        "stopped_because": "finished",
        "versions": {"torch": "2.13.0", HOSTILE: HOSTILE},
        "machine": "two cores",
    }
    write_atomic(folder / "summary.json", to_json(summary))
    recipe = (
        f"name: {to_json(HOSTILE)}\nrewards:\n"
        "- {name: brevity, weight: 0.5, role: score}\n- {name: '<i>watch</i>', role: metric}\n"
    )
    write_atomic(folder / "recipe.resolved.yaml", recipe)


def report(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_hostile_text_is_inert_and_nothing_is_fetched(tmp_path: Path) -> None:
    make_run(tmp_path)
    html, page = report(tmp_path)
    assert not {"script", "img", "iframe", "link", "object", "embed", "base", "form"} & {*page.tags}
    assert page.tags.count("style") == 1 and page.tags.count("i") == html.count('<i style="')
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    # A reference may only point into the page itself.
    references = [v for _, name, v in page.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    styles = [value for _, name, value in page.attributes if name in ("style", "clip-path")]
    assert all(re.findall(r"url\((.)", value) in ([], ["#"]) for value in styles)
    assert "url(" not in html[html.index("<style>") : html.index("</style>")]
    assert "default-src 'none'" in html
    # Inert, not lost: a reader sees what the model wrote.
    assert page.text.count('<script>alert("x")</script>') > 20


def test_the_report_holds_what_a_reader_looks_for(tmp_path: Path) -> None:
    make_run(tmp_path)
    html, page = report(tmp_path)
    text = page.text
    for expected in (
        "Better than the hand-written text by 0.75",
        "n = 8 validation queries that also chose it among 3 prompts",
        "Rewards had nothing to teach in 2 of 6 steps.",
        "Base, validation reward",
        "-2.000 \u00b1 0.062",
        "-1.250",
        "Learned minus base",
        "+1.500",
        "32 queries, 64 completions, step 3",
        "brevity weight 0.5",
        "<i>watch</i> metric",
        "$a_b$",
        "KL to the reference",
        "rollout 0.50 s (25%)",
        "log-probability under the base",
        "sha256:abc",
        "two cores",
        "role: metric",
        "cut off at the token limit",
    ):
        assert expected in text, expected
    # Differences, two of reward, three single rewards, KL, clip ratio, time.
    assert page.tags.count("svg") == 9
    assert len(html.encode()) < 2_000_000
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_every_phase_that_was_logged_is_drawn(tmp_path: Path) -> None:
    """A phase that the chart does not know by name is time all the same."""
    tracker = JsonlTracker()
    tracker.start(RunInfo(name="test", output_dir=tmp_path, steps=2, base="tiny"))
    phases = {"rollout": 1.0, "reference": 0.5, "prefill": 0.25, "of_my_own": 0.125, "other": 0.125}
    for step in (1, 2):
        tracker.log_metrics(step, {f"time/{name}": value for name, value in phases.items()})
    tracker.finish({})
    text = report(tmp_path)[1].text
    for name, value in phases.items():
        assert f"{name} {value:.2f} s ({value / 2:.0%})" in text


def test_ten_queries_in_order_with_the_prompt_that_was_kept(tmp_path: Path) -> None:
    make_run(tmp_path)
    _, page = report(tmp_path)
    assert page.tags.count("article") == 10
    queries = re.findall(r"query (\d+)", page.text)
    assert [int(number) for number in queries] == list(range(10))
    for who in ("base 0", "handwritten 0", "learned 0 kept"):
        assert who in page.text
    assert "last <" not in page.text


@pytest.mark.parametrize(
    "missing",
    [
        ["summary.json"],
        ["evaluation.jsonl"],
        ["completions.jsonl"],
        ["metrics.jsonl"],
        ["recipe.resolved.yaml"],
        ["summary.json", "evaluation.jsonl", "completions.jsonl", "recipe.resolved.yaml"],
        ["metrics.jsonl", "evaluation.jsonl", "completions.jsonl"],
    ],
    ids=" ".join,
)
def test_a_partial_run_gets_the_report_its_files_allow(tmp_path: Path, missing: list[str]) -> None:
    make_run(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    _, page = report(tmp_path)
    notices = {
        "summary.json": "This run has no summary.json",
        "evaluation.jsonl": "No held-out evaluation was logged",
        "metrics.jsonl": "No training step was logged",
    }
    for name, notice in notices.items():
        assert (notice in page.text) == (name in missing)


def test_a_run_killed_in_its_first_step(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start(RunInfo(name="test", output_dir=tmp_path, steps=5, base="tiny"))
    tracker.log_metrics(1, metrics(1))
    tracker.log_completions(1, completions("learned", "train", 2, "text"))
    tracker.finish({})
    with open(tmp_path / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 2, "rew')
    _, page = report(tmp_path)
    assert "Training completions of the last step" in page.text
    assert page.tags.count("article") == 2


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        write_report(tmp_path)


def test_a_changed_base_is_said(tmp_path: Path) -> None:
    write_atomic(
        tmp_path / "summary.json",
        to_json({"base_fingerprint_before": "a", "base_fingerprint_after": "b"}),
    )
    assert "fingerprint after the run is not the one before" in report(tmp_path)[1].text


def test_a_long_run_with_long_completions_stays_small(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3000, text="\x00\ud800<b>&" * 4000)
    html, page = report(tmp_path)
    assert len(html.encode()) < 2_000_000
    assert "more characters" in page.text and "\x00" not in html


def test_thin_averages_equal_parts_and_ignores_missing_values() -> None:
    steps, values = thin(range(1200), [1.0 if step % 2 else None for step in range(1200)])
    assert len(steps) == len(values) == MAX_POINTS
    assert values.tolist() == [1.0] * MAX_POINTS
    assert steps[:2].tolist() == [1.5, 5.5]


def test_drawings_follow_the_page_colours() -> None:
    svg = draw_curves([Curve("learned", [1, 2], [0.5, None]), Curve("base", [0], [1.0])], "a")
    assert "var(--learned)" in svg and "var(--ink)" in svg
    assert "#0101" not in svg and "http" not in svg.replace("http://www.w3.org/", "")
