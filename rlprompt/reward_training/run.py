"""`rlprompt reward train`: data, learning, calibration, test, and the files that remain.

The output folder holds `model/` (for `builtin:preference`, with its card), `summary.json` (every
number), `reliability.png`, `metrics.jsonl` (loss and accuracy during learning), `heldout.jsonl`
(held-out answers with judgement and score) and `recipe.resolved.yaml`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from rlprompt.errors import InputError
from rlprompt.files import to_json, write_atomic
from rlprompt.reading import yaml_text
from rlprompt.reward_training.card import reward_card
from rlprompt.reward_training.evaluation import (
    Calibration,
    Findings,
    Scorer,
    calibrate,
    examine,
)
from rlprompt.reward_training.learning import (
    Progress,
    check_trl,
    learn,
    read_start,
    save,
)
from rlprompt.reward_training.pairs import Sides
from rlprompt.reward_training.plot import draw_reliability
from rlprompt.reward_training.settings import RewardRecipe
from rlprompt.reward_training.sources import load_sides
from rlprompt.rewards.models.classifier import CARD_FILE, Classifier, ClassifierSettings

logger = logging.getLogger(__name__)


def check_output(output: Path) -> None:
    """Refuse a folder that holds something else.

    Raises:
        InputError: it is a file, or not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"the output '{output}' is not an empty folder; name another")


def train_reward(
    recipe: RewardRecipe, base_dir: Path, output: Path, progress: Progress
) -> dict[str, Any]:
    """Train, calibrate and test a preference model; returns what summary.json holds.

    Args:
        recipe: what to train.
        base_dir: the recipe's folder; its paths are relative to it.
        output: an empty folder, or one to make.
        progress: what is told after each update.

    Raises:
        InputError: anything named by the recipe cannot be had or does not fit together.
    """
    check_trl()
    check_output(output)
    started = time.monotonic()
    if recipe.learning.threads is not None:
        torch.set_num_threads(recipe.learning.threads)
    sides = load_sides(recipe, base_dir)
    model, tokenizer = read_start(recipe.model, base_dir, recipe.seed)
    output.mkdir(parents=True, exist_ok=True)
    plain = recipe.model_dump(mode="json")
    write_atomic(output / "recipe.resolved.yaml", yaml_text.dump(plain))
    scratch = output / "trl"
    log = learn(recipe, model, tokenizer, sides.train, scratch, progress)
    shutil.rmtree(scratch, ignore_errors=True)
    write_atomic(output / "metrics.jsonl", "".join(f"{to_json(row)}\n" for row in log))
    learned = time.monotonic()
    folder = output / "model"
    card = {"max_tokens": recipe.model.max_tokens, "keep": recipe.model.keep}
    save(model, tokenizer, folder, card)
    del model
    # Read back: what is tested is what will be used.
    read = ClassifierSettings(path=str(folder), dtype="float32", device=recipe.model.device)
    scorer = Scorer(Classifier.load(read))
    calibration = _calibration(scorer, sides, recipe)
    write_atomic(folder / CARD_FILE, to_json(card | dataclasses.asdict(calibration), indent=2))
    findings = examine(scorer, sides, calibration, recipe, base_dir)
    summary = _summary(recipe, sides, calibration, findings)
    summary["seconds_learning"] = learned - started
    summary["seconds"] = time.monotonic() - started
    _write(output, summary, findings, scorer, sides)
    return summary


def _calibration(scorer: Scorer, sides: Sides, recipe: RewardRecipe) -> Calibration:
    found = calibrate(scorer, sides, getattr(recipe.data, "good_above", None))
    if math.isinf(found.temperature) or math.isinf(found.pair_temperature):
        logger.warning(
            "scores say nothing, or the opposite, on the calibration side: the model has learned "
            "nothing of use; see its held-out accuracy"
        )
        return Calibration(found.offset, 1.0, 1.0)
    return found


def _summary(
    recipe: RewardRecipe, sides: Sides, calibration: Calibration, findings: Findings
) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "description": recipe.description,
        "start": recipe.model.path,
        "pairs": {
            "train": len(sides.train),
            "calibration": len(sides.calibration),
            "heldout": len(sides.heldout),
        },
        "queries": {
            "train": len({pair.query for pair in sides.train}),
            "heldout": len({pair.query for pair in sides.heldout}),
        },
        "heldout_pairs": findings.pairs,
        "heldout_answers": findings.answers,
        "rules": findings.rules,
        "calibration": dataclasses.asdict(calibration),
        "seed": recipe.seed,
    }


def _write(
    output: Path, summary: dict[str, Any], findings: Findings, scorer: Scorer, sides: Sides
) -> None:
    draw_reliability(findings.curves, output / "reliability.png")
    shutil.copyfile(output / "reliability.png", output / "model" / "reliability.png")
    rows = sides.heldout_rows
    lines = [
        to_json({"messages": list(row.messages), "score": row.score, "value": value})
        for row, value in zip(rows, scorer.scores(rows), strict=True)
    ]
    write_atomic(output / "heldout.jsonl", "".join(f"{line}\n" for line in lines))
    write_atomic(output / "model" / "README.md", reward_card(summary))
    write_atomic(output / "summary.json", to_json(summary, indent=2) + "\n")
