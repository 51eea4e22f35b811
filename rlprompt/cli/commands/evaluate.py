"""`rlprompt eval`: held-out rewards of an artifact, or of a prompt that was never trained."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlprompt.artifacts.format import load_artifact, load_text_artifact, save_artifact
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.endpoints.ledger import BudgetSpentError
from rlprompt.engines.make import require_support
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.files import to_json, write_atomic
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.target import Target
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.recipe.build import build_prompt, build_shared, started_from_data
from rlprompt.recipe.schema import Recipe
from rlprompt.serving.loaded import artifact_folder
from rlprompt.standard_streams import outlive_output
from rlprompt.suites.ground import recipe_of
from rlprompt.tracking.console import PlainConsole


def run(
    artifact: Path | None,
    recipe_path: Path | None,
    overrides: Sequence[str],
    output: Path | None,
    *,
    force: bool = False,
    verbose: bool = False,
) -> None:
    """Evaluate base, hand-written text (where the recipe has one) and the prompt; JSON to stdout.

    All prompts meet the same queries and the same random draws, those of the recipe's own held-out
    evaluation.

    Args:
        artifact: folder of an artifact or a run; None = the recipe's prompt before training.
        recipe_path: a YAML file; None = the recipe of the artifact's run, or the one that it
            carries.
        overrides: `key.path=value` strings.
        output: a folder for `evaluation.json`, and for the prompt where there is no artifact.
        force: whether an artifact of another base is loaded.
        verbose: whether to log more.

    Raises:
        InputError: recipe or artifact is wrong, or the folder cannot be written.
    """
    if output is not None:
        outlive_output()
    notes = PlainConsole(stderr=True)
    setup_logging(notes, logging.WARNING, verbose)
    artifact = None if artifact is None else artifact_folder(artifact)
    recipe, base_dir = recipe_of(artifact, recipe_path, overrides)
    with notes.status("loading data, rewards and model"):
        shared = build_shared(recipe, base_dir)
        if not shared.data.heldout:
            raise InputError(
                "the recipe holds no queries out (data.heldout is 0), so there is nothing to "
                "evaluate on; set data.heldout as it was in training"
            )
        target, evaluator = shared.target, shared.evaluator
        prompt: Prompt
        if artifact is None:
            fresh = started_from_data(recipe, shared.data)
            prompt = build_prompt(fresh, target, base_dir)
        elif isinstance(target, Policy):
            own = recipe.own_prompts.values()
            prompt = load_artifact(artifact, target, force=force, own=own)
        else:
            prompt = load_text_artifact(artifact, target, force=force)
        require_support(shared.engine, (prompt,))
    with notes.status("evaluating"):
        try:
            results = _evaluate(evaluator, recipe, prompt)
        except BudgetSpentError as error:
            raise InputError(f"{error}; raise budget, or lower evaluation.max_queries") from error
    report = {
        "recipe": recipe.name,
        "artifact": None if artifact is None else str(artifact),
        "representation": prompt.kind,
        "base": target.id,
        "base_fingerprint": target.fingerprint,
        "heldout": results,
    }
    if shared.ledger is not None:
        report["endpoint"] = shared.ledger.report()
    text = to_json(report, indent=2) + "\n"
    sys.stdout.write(text)
    if output is not None:
        _write(output, text, target, recipe, prompt if artifact is None else None, results)


def _evaluate(
    evaluator: HeldoutEvaluator, recipe: Recipe, prompt: Prompt
) -> dict[str, dict[str, object]]:
    prompts: dict[str, Prompt] = {"base": NonePrompt()}
    if recipe.evaluation.handwritten is not None:
        prompts["handwritten"] = TextPrompt(recipe.evaluation.handwritten)
    prompts["prompt"] = prompt
    return {who: evaluator.evaluate(each, 0).metrics for who, each in prompts.items()}


def _write(
    output: Path,
    text: str,
    target: Target,
    recipe: Recipe,
    prompt: Prompt | None,
    results: dict[str, Any],
) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "evaluation.json", text)
        if prompt is not None:
            rewards = {f"heldout_reward_{who}": row["reward"] for who, row in results.items()}
            save_artifact(
                output / "artifact",
                target,
                prompt,
                name=recipe.name,
                recipe=recipe.plain(),
                metrics=rewards,
            )
    except OSError as error:
        raise InputError(
            f"'{output}' cannot be written ({error.strerror}); name a folder that can"
        ) from error
