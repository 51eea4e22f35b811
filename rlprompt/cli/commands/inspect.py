"""`rlprompt inspect`: what a learned prompt means and does, with a number for every claim."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.status import Status
from rich.text import Text

from rlprompt.artifacts.format import ArtifactInfo, read_artifact_info
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic, writing_to
from rlprompt.interpret.inspection import Plan, inspect
from rlprompt.interpret.page import write_inspection_page
from rlprompt.interpret.reward_importance import FEWEST_SETS
from rlprompt.interpret.subject import Sides, Subject, divided
from rlprompt.policy import open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.reading.files import read_text, reason
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.recipe.stored import carried_recipe
from rlprompt.rewards import RewardRunner, RewardSettings, build_rewards
from rlprompt.runs.claim_folder import RECIPE_FILE, recipe_folder
from rlprompt.search.components import read_library
from rlprompt.serving.loaded import LoadedPrompt, Model, artifact_folder, base_of_artifact
from rlprompt.standard_streams import outlive_output
from rlprompt.tracking.console import PlainConsole
from rlprompt.types import Query

JSON_FILE, PAGE_FILE = "inspection.json", "inspection.html"
_LONGEST_SENTENCE = 2000


@dataclass(frozen=True)
class InspectOptions:
    """What a caller may say; the fields are the options of the command."""

    output: Path
    model: str | None = None
    queries: Path | None = None
    rewards: Sequence[str] = ()
    against: Sequence[Path] = ()
    sentences: Path | None = None
    library: bool = True
    triggers: bool = True
    words: Sequence[str] = ()
    reward_sets: int = 16
    minutes: float = 4.5
    max_queries: int = 36
    seed: int = 0
    force: bool = False
    trust_remote_code: bool = False
    prompt_classes: Sequence[str] = ()
    as_json: bool = False


@dataclass(frozen=True)
class _Asked:
    """Queries and rewards, and what is to be known of where they come from."""

    queries: Sequence[Query]
    rewards: Sequence[RewardSettings]
    base_dir: Path
    notes: Sequence[str]


def run(artifact: Path, options: InspectOptions, *, verbose: bool = False) -> None:
    """Inspect an artifact's prompt, and write `inspection.json` and `inspection.html`.

    Args:
        artifact: folder of an artifact, or of a run.
        options: what is looked at.
        verbose: whether to log more.

    Raises:
        InputError: something named is wrong or cannot be loaded, or the folder cannot be written.
    """
    outlive_output()
    notes, console = PlainConsole(stderr=True), PlainConsole()
    setup_logging(notes, logging.WARNING, verbose)
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise InputError(f"--minutes is {options.minutes:g}; give a number above 0")
    plan = Plan(
        minutes=options.minutes,
        library=read_library(None, built_in=True) if options.library else None,
        sentences=_sentences(options.sentences),
        triggers=options.triggers,
        suspects=_words(options),
        reward_sets=_reward_sets(options),
    )
    folder = artifact_folder(artifact)
    info = read_artifact_info(folder)
    asked = _asked(folder, options)
    sides = divided(asked.queries, options.max_queries)
    with writing_to(options.output):
        pass  # before anything takes minutes
    runner = build_rewards(asked.rewards, asked.base_dir) if asked.rewards else None
    try:
        with notes.status("loading the model"):
            loaded, given = _loaded(folder, info, options)
        subject = _subject(loaded, given, sides, runner, options.seed)
        with notes.status("inspecting") as shown:
            found = inspect(subject, plan, lambda said: _say(shown, notes, said))
    finally:
        if runner is not None:
            runner.close()
    _finish(found, loaded, folder, sides, asked, options, console)


def _finish(
    found: Mapping[str, Any],
    loaded: LoadedPrompt,
    folder: Path,
    sides: Sides,
    asked: _Asked,
    options: InspectOptions,
    console: PlainConsole,
) -> None:
    """Write both files, and say what was found."""
    report = {
        "name": loaded.name,
        "artifact": str(folder),
        "kind": loaded.kind,
        "positions": loaded.num_tokens,
        "base": loaded.policy.base.id,
        "base_fingerprint": loaded.policy.base.fingerprint,
        "num_selection": len(sides.selection),
        "num_test": len(sides.test),
        "rewards": [each.path for each in asked.rewards],
        "seed": options.seed,
        "notes": list(asked.notes),
        **found,
    }
    with writing_to(options.output):
        write_atomic(options.output / JSON_FILE, to_json(report, indent=1) + "\n")
        write_inspection_page(report, options.output / PAGE_FILE)
    if options.as_json:
        sys.stdout.write(to_json(report, indent=1) + "\n")
        return
    for line in [*report["notes"], *report["summary"]]:
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"{options.output / PAGE_FILE}"), soft_wrap=True)


def _say(shown: Status, notes: PlainConsole, said: str) -> None:
    """Tell a terminal what is done; elsewhere it is a line."""
    if notes.is_terminal:
        shown.update(said)
    else:
        notes.print(Text(said), soft_wrap=True)


def _asked(folder: Path, options: InspectOptions) -> _Asked:
    """Queries and rewards: those that are named, else those of the artifact's recipe."""
    notes: list[str] = []
    recipe: Recipe | None = None
    base_dir = Path.cwd()
    needs_recipe = options.queries is None or not options.rewards
    stored = folder.parent / RECIPE_FILE
    if needs_recipe and stored.is_file():
        recipe, base_dir = load_recipe(stored), recipe_folder(stored)
    elif needs_recipe:
        try:
            recipe, base_dir = carried_recipe(folder), Path()
        except InputError as error:
            if options.queries is None:
                raise InputError(f"{error}; or name the queries with --queries FILE") from error
            notes.append(f"No reward was measured: {error}. Name one with --reward.")
    queries = _queries(options, recipe, base_dir)
    if options.rewards:
        settings = [RewardSettings(path=_absolute(path)) for path in options.rewards]
        return _Asked(queries, settings, Path.cwd(), notes)
    settings = [] if recipe is None else [r for r in recipe.rewards if r.role == "score"]
    if recipe is not None and not settings:
        notes.append("The recipe has no reward with the role score; name one with --reward.")
    return _Asked(queries, settings, base_dir, notes)


def _queries(options: InspectOptions, recipe: Recipe | None, base_dir: Path) -> Sequence[Query]:
    """The queries of the file, or those of the recipe that nothing was trained on."""
    if options.queries is not None:
        return load_queries(DataSettings(path=str(options.queries), heldout=0), Path.cwd()).train
    assert recipe is not None
    split = load_queries(recipe.data, base_dir)
    held = [*split.test, *split.heldout]
    if not held:
        raise InputError(
            "the recipe holds no queries out (data.heldout is 0), so there is nothing to inspect "
            "the prompt on; name queries with --queries FILE"
        )
    return held


def _absolute(name: str) -> str:
    """A reward's path from the working directory."""
    path = f"{name}:reward" if name.endswith(".py") else name
    file, _, attribute = path.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if Path(file).is_file() else path


def _sentences(path: Path | None) -> list[str]:
    """The lines of a file of sentences to try."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except OSError as error:
        raise InputError(
            f"--sentences '{path}' cannot be read ({reason(error)}); name a file with a sentence "
            "in each line"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"--sentences '{path}' is not UTF-8; save it as UTF-8") from error
    found = [line for line in lines if line]
    if not found:
        raise InputError(f"--sentences '{path}' has no line with text; write a sentence in each")
    long = next((n for n, line in enumerate(lines, 1) if len(line) > _LONGEST_SENTENCE), None)
    if long is not None:
        raise InputError(
            f"--sentences '{path}' line {long} has more than {_LONGEST_SENTENCE} characters; write "
            "a sentence in each line"
        )
    return found


def _words(options: InspectOptions) -> list[str]:
    """The suspected words."""
    if options.words and not options.triggers:
        raise InputError(
            "--word has no effect with --no-triggers, which searches for none; leave one of them "
            "out"
        )
    if any(not word.strip() for word in options.words):
        raise InputError("--word is blank; give a word or a phrase")
    return list(dict.fromkeys(word.strip() for word in options.words))


def _reward_sets(options: InspectOptions) -> int:
    """The budget of sets."""
    if options.reward_sets and options.reward_sets < FEWEST_SETS:
        raise InputError(
            f"--reward-sets is {options.reward_sets}; give at least {FEWEST_SETS}, or 0 for none"
        )
    return options.reward_sets


def _loaded(
    folder: Path, info: ArtifactInfo, options: InspectOptions
) -> tuple[LoadedPrompt, dict[str, Prompt]]:
    """The prompt on its base, and the other artifacts' prompts by name."""
    policy = open_policy(base_of_artifact(info, folder, options.model, options.trust_remote_code))
    model = Model(policy)
    classes = list(options.prompt_classes)
    loaded = model.load(folder, force=options.force, prompt_classes=classes)
    given: dict[str, Prompt] = {}
    for path in options.against:
        other = artifact_folder(path)
        if other.resolve() == folder.resolve():
            raise InputError(f"--against names '{path}', which is the inspected one; name another")
        name = str(path)
        if name in given:
            raise InputError(f"--against names '{path}' twice; name each artifact once")
        given[name] = model.load(other, force=options.force, prompt_classes=classes).prompt
    return loaded, given


def _subject(
    loaded: LoadedPrompt,
    given: Mapping[str, Prompt],
    sides: Sides,
    runner: RewardRunner | None,
    seed: int,
) -> Subject:
    policy = loaded.policy
    policy.prompt = loaded.prompt
    if runner is not None:
        runner.bind_policy(policy)
    return Subject(policy, loaded.prompt, sides, loaded.sampling, runner, seed, dict(given))
