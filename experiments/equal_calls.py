"""Learners at equal calls: runs what is missing, records it, goes on.

    python experiments/equal_calls.py --dry-run
    python experiments/equal_calls.py --only target=concise method=gepa-base,grpo-soft calls=150
    python experiments/equal_calls.py --plot
    python experiments/results.py render

A call is one scored completion in training. Every cell is `rlprompt train` of a recipe of the
repository, `recipes/TARGET/MODEL_METHOD.yaml`, with overrides; command and numbers become one row
of `equal_calls.jsonl` in docs/results when it has ended. A searcher ends with `search.max_calls`; a
gradient method makes as many steps of as many queries and completions as multiply to the calls.

What is the same for all: the start and the end are evaluated on the validation queries, which
choose between the two and cost as many completions in every cell (they are not calls); one thread;
the prompt that was kept meets the test queries once. `gain_over_best_text` is its mean difference,
query by query, to the best of the texts in `recipes/data/handwritten*.json` on the same test
queries, with a 95% interval over queries (`rlprompt.certify.comparison`). That text was picked
before, for each target and model, by the reward on the validation queries; the picks stand in
`equal_calls_texts.json` beside it. `cpu_seconds` are those of the run's steps by the CPU's
clock: loading and evaluation do not count, writing proposals does.

`gepa-hand` is given the texts of `recipes/data/proposals.json`, which were written before any of
the runs, and ends early where they are used up. A cell whose recipe or searcher does not exist is
skipped and said. Finished cells are skipped, interrupted ones resumed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rlprompt.errors import InputError  # noqa: E402
from rlprompt.evaluation.heldout import HeldoutEvaluator  # noqa: E402
from rlprompt.files import read_jsonl  # noqa: E402
from rlprompt.prompts.text import TextPrompt  # noqa: E402
from rlprompt.recipe.build import build_shared  # noqa: E402
from rlprompt.recipe.schema import Recipe, load_recipe  # noqa: E402
from rlprompt.rewards import build_rewards  # noqa: E402
from rlprompt.runs.checkpoint import load_checkpoint  # noqa: E402
from rlprompt.runs.stop_reason import StopReason  # noqa: E402

TARGETS = ("concise", "persona", "topics", "safety")
MODELS = {"smollm2": "smollm2-135m", "qwen": "qwen2.5-coder-0.5b"}
"""How recipes begin -> `model.path`."""
METHODS = {
    "evolution": "evolution",
    "gepa-base": "gepa",
    "gepa-hand": "gepa",
    "cmaes": "cmaes",
    "es": "es",
    "gradient-guided": "tokens",
    "rl-text": "rl",
    "grpo-soft": "grpo",
    "grpo-prefix": "grpo_prefix",
}
"""Method -> how its recipes end."""
CALLS = (150, 500, 2_000)
SEEDS = (0, 1, 2)
FEWEST_TEXTS = 8
PER_STEP = 48
"""Completions of a gradient step that the calls are divided into, as near as they can be."""
LONG = 100_000
KEYS = (
    "target",
    "model",
    "method",
    "calls",
    "cpu_seconds",
    "seed",
    "test_reward",
    "gain_over_best_text",
    "gain_low",
    "gain_high",
    "base_reward",
    "best_text_reward",
    "command",
)


@dataclass(frozen=True)
class Cell:
    """One run of the experiment."""

    target: str
    model: str
    method: str
    calls: int
    seed: int

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What tells it from the others."""
        return self.target, self.model, self.method, self.calls, self.seed

    @property
    def name(self) -> str:
        """Its folder."""
        return "-".join(map(str, self.key))


@dataclass(frozen=True)
class Places:
    """Where things are read and written."""

    recipes: Path = ROOT / "recipes"
    results: Path = ROOT / "docs" / "results"
    runs: Path = ROOT / "runs" / "equal_calls"

    @property
    def rows(self) -> Path:
        """One row per finished cell."""
        return self.results / "equal_calls.jsonl"

    @property
    def picked(self) -> Path:
        """Texts with their validation rewards, per target and model."""
        return self.results / "equal_calls_texts.json"


class Skipped(Exception):
    """A cell cannot be run; the message says why."""


def shape(calls: int) -> tuple[int, int, int]:
    """Steps, queries and group size of a gradient method that draws exactly `calls` completions.

    Raises:
        Skipped: there is none.
    """
    found = [
        (calls // (queries * group), queries, group)
        for queries in range(2, 17)
        for group in range(4, 17)
        if calls % (queries * group) == 0
    ]
    enough = [each for each in found if each[0] >= 5] or found
    if not enough:
        raise Skipped(f"{calls} calls are no product of steps, queries and a group of 4 to 16")
    return min(enough, key=lambda s: (abs(math.log(s[1] * s[2] / PER_STEP)), abs(s[2] - 8)))


def recipe_of(cell: Cell, places: Places) -> tuple[Path, list[str]]:
    """The recipe of a cell, and the overrides that make it one of this model and method.

    Every method begins with the text of the model's recipe for GRPO.

    Raises:
        Skipped: there is none.
    """
    folder, end = places.recipes / cell.target, METHODS[cell.method]
    path, own = folder / f"{cell.model}_{end}.yaml", folder / f"{cell.model}_grpo.yaml"
    other = folder / f"{next(iter(MODELS))}_{end}.yaml"
    if path.is_file():
        return path, _same_start(path, own)
    if cell.method == "grpo-prefix" and own.is_file():
        return own, [f"prompt={{type: prefix, init_text: {_start(own)}}}"]
    if other.is_file() and cell.model in MODELS:
        return other, [f"model.path={MODELS[cell.model]}", *_same_start(other, own)]
    raise Skipped(f"there is no recipe {path.name} in recipes/{cell.target}")


def _start(path: Path) -> str:
    """The text that a recipe begins with, as YAML."""
    prompt = load_recipe(path).prompt
    return json.dumps(getattr(prompt, "text", None) or getattr(prompt, "init_text", None))


def _same_start(path: Path, own: Path) -> list[str]:
    """The overrides by which one recipe begins with the text of another, whole."""
    if not own.is_file() or _start(path) == _start(own):
        return []
    if load_recipe(path).prompt.type == "text":
        return [f"prompt.text={_start(own)}"]
    several = load_recipe(path).prompt.type == "soft"
    return [f"prompt.init_text={_start(own)}", *(["prompt.num_virtual_tokens=null"] * several)]


def overrides_of(cell: Cell, places: Places, text: str) -> tuple[Path, list[str]]:
    """The recipe of a cell and everything that is changed in it.

    Args:
        cell: cell to be run.
        places: places of recipes.
        text: best hand-written text of target and model.

    Raises:
        Skipped: it cannot be run.
    """
    path, changes = recipe_of(cell, places)
    try:
        recipe = load_recipe(path, changes)
    except InputError as error:
        raise Skipped(str(error)) from error
    changes += [
        f"seed={cell.seed}",
        "model.threads=1",
        "training.clock=cpu",
        "training.max_seconds=1000000000",
        "training.save_every=10",
        f"evaluation.every={LONG}",
        f"evaluation.handwritten={json.dumps(text)}",
    ]
    if recipe.evaluation.texts:
        changes.append("evaluation.texts=[]")
    if recipe.search is not None:
        changes += [f"search.max_calls={cell.calls}", f"training.steps={LONG}"]
    else:
        steps, queries, group = shape(cell.calls)
        changes += [
            f"training.steps={steps}",
            f"training.queries_per_step={queries}",
            f"algorithm.group_size={group}",
        ]
    if cell.method == "gepa-hand":
        proposals = json.loads((places.recipes / "data" / "proposals.json").read_text("utf-8"))
        changes += ["search.writer=null", f"search.proposals={json.dumps(proposals[cell.target])}"]
    return path, changes


def command_of(path: Path, changes: Sequence[str]) -> list[str]:
    """What a person would type."""
    inside = path.is_relative_to(ROOT)
    return ["rlprompt", "train", str(path.relative_to(ROOT) if inside else path), *changes]


def texts_of(target: str, model: str, places: Places) -> list[str]:
    """The hand-written texts of a target, those for this model among them."""
    found: dict[str, None] = {}
    for name in ("handwritten.json", f"handwritten_{model}.json"):
        path = places.recipes / "data" / name
        if path.is_file():
            texts = json.loads(path.read_text("utf-8")).get(target, ())
            found |= dict.fromkeys(texts)
    if len(found) < FEWEST_TEXTS:
        raise Skipped(f"{target} has {len(found)} hand-written texts, {FEWEST_TEXTS} are wanted")
    return list(found)


def best_text(cell: Cell, places: Places) -> str:
    """The best hand-written text on the validation queries; measured where it is not known."""
    known = _known_texts(places)
    wanted = texts_of(cell.target, cell.model, places)
    rows = known.get(cell.target, {}).get(cell.model, [])
    if {row["text"] for row in rows} != set(wanted):
        path, changes = recipe_of(Cell(cell.target, cell.model, "grpo-soft", 0, 0), places)
        rows = _measured(load_recipe(path, [*changes, "model.threads=1"]), path.parent, wanted)
        known = _known_texts(places)
        known.setdefault(cell.target, {})[cell.model] = rows
        places.picked.parent.mkdir(parents=True, exist_ok=True)
        places.picked.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return str(rows[0]["text"])


def _known_texts(places: Places) -> dict[str, Any]:
    found = places.picked
    known: dict[str, Any] = json.loads(found.read_text("utf-8")) if found.is_file() else {}
    return known


def _measured(recipe: Recipe, folder: Path, texts: Sequence[str]) -> list[dict[str, Any]]:
    """The texts with their mean reward on the validation queries, best first."""
    shared = build_shared(recipe, folder)
    rewards = build_rewards(recipe.rewards, folder, needs_score=True)
    rewards.bind_policy(shared.policy)
    evaluator = HeldoutEvaluator(
        shared.engine,
        rewards,
        shared.data.heldout[: recipe.evaluation.max_queries],
        recipe.sampling,
        completions_per_query=recipe.evaluation.completions_per_query,
        seed=recipe.seed,
        measures={},
    )
    rows = []
    for text in texts:
        metrics = evaluator.evaluate(TextPrompt(text), 0).metrics
        rows.append({"text": text, **{key: metrics[key] for key in ("reward", "reward_sem")}})
        print(f"  {metrics['reward']:.3f}  {text[:70]!r}", flush=True)
    rewards.close()
    return sorted(rows, key=lambda row: -float(row["reward"]))


def is_finished(folder: Path) -> bool:
    """Whether a run needs no more steps."""
    path = folder / "summary.json"
    if not path.is_file():
        return False
    reason = StopReason.parse(json.loads(path.read_bytes())["stopped_because"])
    return reason is not None and reason.is_complete


def row_of(cell: Cell, folder: Path, command: Sequence[str]) -> dict[str, Any]:
    """The row of a finished run, from its own record.

    Raises:
        ValueError: it did not meet test queries.
    """
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    verdict = summary["verdict"]
    if verdict["split"] != "test":
        raise ValueError(f"{folder} has no result on test queries; its data need a test split")
    interval = verdict["differences"]["handwritten"]["interval"]
    progress = load_checkpoint(folder / "checkpoints").state["progress"]
    rewards = {who: summary["test"][who]["reward"] for who in ("learned", "base", "handwritten")}
    values = (
        cell.target,
        cell.model,
        cell.method,
        cell.calls,
        round(float(progress["budget_seconds"]), 2),
        cell.seed,
        rewards["learned"],
        interval["value"],
        interval["low"],
        interval["high"],
        rewards["base"],
        rewards["handwritten"],
        shlex.join(command),
    )
    return dict(zip(KEYS, values, strict=True))


def rows_in(places: Places) -> list[dict[str, Any]]:
    """All rows that there are."""
    return list(read_jsonl(places.rows)) if places.rows.is_file() else []


def done_in(places: Places) -> set[tuple[Any, ...]]:
    """Keys of the cells that have a row."""
    names = ("target", "model", "method", "calls", "seed")
    return {tuple(row[name] for name in names) for row in rows_in(places)}


def put_row(row: dict[str, Any], places: Places) -> None:
    """Add a row; several processes may."""
    places.rows.parent.mkdir(parents=True, exist_ok=True)
    with places.rows.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(row) + "\n")


def run(cell: Cell, places: Places) -> None:
    """Run one cell where it is missing, and record it.

    Raises:
        Skipped: it cannot be run.
        subprocess.CalledProcessError: it failed.
    """
    recipe_of(cell, places)
    path, changes = overrides_of(cell, places, best_text(cell, places))
    command = command_of(path, changes)
    folder = places.runs / cell.name
    if not is_finished(folder):
        resume = ["--resume"] if (folder / "recipe.resolved.yaml").is_file() else []
        start = [sys.executable, "-m", *command, "--output", str(folder), *resume]
        subprocess.run(start, cwd=ROOT, check=True)
    put_row(row_of(cell, folder, command), places)


def cells_of(only: dict[str, set[str]], options: argparse.Namespace) -> Iterator[Cell]:
    """All cells that were asked for: small budgets first, so that something is there early."""
    for calls, seed, target, model, method in product(
        options.calls, options.seeds, TARGETS, options.models, METHODS
    ):
        cell = Cell(target, model, method, calls, seed)
        if all(str(getattr(cell, name)) in values for name, values in only.items()):
            yield cell


def filters(words: Sequence[str]) -> dict[str, set[str]]:
    """`--only` as a mapping.

    Raises:
        SystemExit: a word is no filter.
    """
    found: dict[str, set[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if name not in Cell.__dataclass_fields__ or not values:
            known = ", ".join(Cell.__dataclass_fields__)
            sys.exit(f"error: --only {word!r} is no filter; write KEY=VALUE,VALUE with {known}")
        found[name] = set(values.split(","))
    return found


def show(cells: Sequence[Cell], places: Places) -> None:
    """Print every command, and how many cells are done, to be run and skipped."""
    done = done_in(places)
    counts: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in cells:
        count = counts[cell.target, cell.model, cell.method]
        if cell.key in done:
            count[0] += 1
            continue
        rows = _known_texts(places).get(cell.target, {}).get(cell.model)
        text = rows[0]["text"] if rows else f"BEST TEXT OF {cell.target}, {cell.model}"
        try:
            print(shlex.join(command_of(*overrides_of(cell, places, text))))
            count[1] += 1
        except Skipped as why:
            print(f"# skipped {cell.name}: {why}")
            count[2] += 1
    print(f"\n{'target':10}{'model':10}{'method':18}{'done':>6}{'to run':>8}{'skipped':>9}")
    for (target, model, method), (ended, left, skipped) in counts.items():
        print(f"{target:10}{model:10}{method:18}{ended:6}{left:8}{skipped:9}")


def crossings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which method passes which between two budgets, by the mean over seeds."""
    means: dict[tuple[str, str], dict[str, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    grouped: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        key = (row["target"], row["model"], row["method"], row["calls"])
        grouped[key].append(float(row["test_reward"]))
    for (target, model, method, calls), rewards in grouped.items():
        means[target, model][method][calls] = statistics.fmean(rewards)
    found = []
    for (target, model), methods in means.items():
        for one, two in combinations(methods, 2):
            shared = sorted(methods[one].keys() & methods[two].keys())
            for before, after in pairwise(shared):
                gaps = [methods[one][calls] - methods[two][calls] for calls in (before, after)]
                if gaps[0] * gaps[1] < 0:
                    first, second = (one, two) if gaps[1] > 0 else (two, one)
                    where = f"between {before} and {after} calls"
                    found.append(f"{target}, {model}: {first} passes {second} {where}")
    return found


def draw(target: str, rows: Sequence[dict[str, Any]]) -> Figure:
    """Test reward over calls and over CPU seconds, one row of panels per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(10.0, 3.6 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False, sharey="row")
    for place, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        for column, (key, label) in enumerate(
            (("calls", "scored completions"), ("cpu_seconds", "CPU seconds of training"))
        ):
            panel = panels[place][column]
            for number, method in enumerate(METHODS):
                points = _points([row for row in own if row["method"] == method], key)
                if points:
                    x, low, mean, high = zip(*points, strict=True)
                    color = f"C{number}"
                    panel.plot(x, mean, marker="o", markersize=4, color=color, label=method)
                    panel.vlines(x, low, high, color=color, linewidth=1.0)
            for name, style in (("base_reward", ":"), ("best_text_reward", "--")):
                level = statistics.fmean(row[name] for row in own)
                label_of = name.removesuffix("_reward").replace("_", " ")
                panel.axhline(level, color="#555555", linestyle=style, label=label_of)
            panel.set_xscale("log")
            panel.set_xlabel(label)
            panel.set_title(f"{target}, {model}", fontsize=10)
            panel.grid(alpha=0.25)
        panels[place][0].set_ylabel("test reward")
        panels[place][1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _points(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float, float, float]]:
    """Per budget: where it stands, and lowest, mean and highest reward of its seeds."""
    points = []
    for calls in sorted({row["calls"] for row in rows}):
        own = [row for row in rows if row["calls"] == calls]
        rewards = [float(row["test_reward"]) for row in own]
        at = statistics.fmean(float(row[key]) for row in own)
        points.append((max(at, 0.01), min(rewards), statistics.fmean(rewards), max(rewards)))
    return points


def plot(places: Places) -> None:
    """Draw every target that has rows, and say who passes whom."""
    rows = rows_in(places)
    for target in dict.fromkeys(row["target"] for row in rows):
        path = _picture(target, places)
        figure = draw(target, [row for row in rows if row["target"] == target])
        with rc_context({"svg.hashsalt": "equal_calls"}):
            figure.savefig(path, metadata={"Date": None})
        print(path)
    for line in crossings(rows):
        print(line)


def page_section(places: Places | None = None) -> list[str]:
    """The lines of docs/results.md about these rows; none where there are none."""
    places = places or Places()
    rows = rows_in(places)
    if not rows:
        return []
    lines = [
        "## At equal calls",
        "",
        "A call is one scored completion in training. All methods of a row's target and model "
        "begin with the same text. Each prompt meets the 120 test queries once; the gain is that "
        "over the best of the written texts, which were picked on validation queries, with a 95% "
        "interval over test queries. Made by `python experiments/equal_calls.py`; the command of "
        "each row stands in [equal_calls.jsonl](results/equal_calls.jsonl), the written texts in "
        "[equal_calls_texts.json](results/equal_calls_texts.json). What has no row was not run.",
        "",
        "| target | model | calls | method | seed | test reward | base | best text | "
        "gain over the best text | CPU seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["target"], r["model"], r["calls"], -r["test_reward"])):
        gain = (
            f"{row['gain_over_best_text']:+.3f} ({row['gain_low']:.3f} to {row['gain_high']:.3f})"
        )
        cells = (
            *(row[name] for name in ("target", "model", "calls", "method", "seed")),
            *(f"{row[name]:.3f}" for name in ("test_reward", "base_reward", "best_text_reward")),
            gain,
            f"{row['cpu_seconds']:.0f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines.append("")
    for target in dict.fromkeys(row["target"] for row in rows):
        if _picture(target, places).is_file():
            lines += [f"![{target} at equal calls](results/{_picture(target, places).name})", ""]
    return lines


def _picture(target: str, places: Places) -> Path:
    return places.results / f"equal_calls_{target}.svg"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what was asked for; 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--calls", nargs="+", type=int, default=list(CALLS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--dry-run", action="store_true", help="print commands and the matrix")
    parser.add_argument("--plot", action="store_true", help="draw what there is")
    parser.add_argument("--recipes", type=Path, default=Places.recipes)
    parser.add_argument("--results", type=Path, default=Places.results)
    parser.add_argument("--runs", type=Path, default=Places.runs)
    options = parser.parse_args(arguments)
    places = Places(options.recipes.resolve(), options.results.resolve(), options.runs.resolve())
    if options.plot:
        plot(places)
        return 0
    cells = list(cells_of(filters(options.only), options))
    if not cells:
        sys.exit("error: no cell is left; --only names a value that there is not")
    if options.dry_run:
        show(cells, places)
        return 0
    failed = 0
    for cell in cells:
        if cell.key in done_in(places):
            continue
        try:
            run(cell, places)
        except Skipped as why:
            print(f"skipped {cell.name}: {why}", flush=True)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"failed {cell.name}: exit code {error.returncode}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
