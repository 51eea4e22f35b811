"""Learns a Bradley-Terry preference model with TRL's RewardTrainer; the one file that imports it.

Conversations are written and cut by the same `ConversationEncoder` that scores them later, so TRL
gets token ids and a trained model is asked exactly as it was taught.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.utils import logging as transformers_logging

from rlprompt.data.hub import to_dataset
from rlprompt.errors import InputError
from rlprompt.model.chat.template import PLAIN, PLAIN_TEMPLATE, read_template
from rlprompt.model.device import choose_device, has_fast_bfloat16
from rlprompt.model.files.folder import check_folder, first_line, locate
from rlprompt.model.load import read_tokenizer
from rlprompt.reward_training.pairs import Pair
from rlprompt.reward_training.settings import RewardRecipe, StartSettings
from rlprompt.rewards.models.conversation import ConversationEncoder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]
"""Called with (updates done, updates in all, loss)."""


def check_trl() -> None:
    """Refuse to begin without TRL.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise InputError("TRL is not installed; run `pip install 'rlprompt[trl]'`")


def read_start(
    settings: StartSettings, base_dir: Path, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to learn with, its one output new unless the checkpoint has one, and the tokenizer.

    The tokenizer carries the template as its chat template from here on.

    Raises:
        InputError: there is no such model, or it has no chat template and none is given.
    """
    path = settings.path
    if (base_dir / path).is_dir():
        path = str((base_dir / path).resolve())
    try:
        folder = locate(path, settings.revision).folder
        check_folder(folder, settings.trust_remote_code)
        tokenizer = read_tokenizer(folder, settings.trust_remote_code)
        if settings.template is not None:
            text = read_template(settings.template, base_dir)
            tokenizer.chat_template = PLAIN_TEMPLATE if text == PLAIN else text
    except InputError as error:
        raise InputError(str(error).replace("model.path", "path")) from error
    torch.manual_seed(seed)  # of the new output
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=settings.trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:
        raise InputError(
            f"the model in {folder} cannot be loaded as a classifier ({first_line(error)}); choose "
            f"another"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def learn(
    recipe: RewardRecipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    folder: Path,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train `model` in place on pairs.

    Args:
        recipe: the recipe, which says how.
        model: a model with one output.
        tokenizer: its tokenizer, with a chat template.
        pairs: the pairs to learn from.
        folder: where TRL may write.
        progress: what is told after each update.

    Returns:
        TRL's log: loss, accuracy, margin and more at some updates.
    """
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    encoder = ConversationEncoder(tokenizer, None, recipe.model.max_tokens, recipe.model.keep)
    columns = {
        "chosen_ids": [encoder.encode(pair.chosen).ids for pair in pairs],
        "rejected_ids": [encoder.encode(pair.rejected).ids for pair in pairs],
    }
    device = choose_device(recipe.model.device)
    learning = recipe.learning
    # As transformers counts: the last batch of a pass is an update, however small.
    updates = math.ceil(learning.epochs * math.ceil(len(pairs) / learning.batch_size))
    config = RewardConfig(
        output_dir=str(folder),
        num_train_epochs=learning.epochs,
        per_device_train_batch_size=learning.batch_size,
        learning_rate=learning.learning_rate,
        warmup_steps=int(learning.warmup_share * updates),
        weight_decay=learning.weight_decay,
        lr_scheduler_type="linear",
        center_rewards_coefficient=learning.center_coef or None,
        bf16=learning.bf16 and has_fast_bfloat16(device),
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        max_length=None,  # they are cut already, and TRL would drop them
        pad_to_multiple_of=None,
        dataloader_pin_memory=device.type == "cuda",
        logging_steps=max(1, updates // 40),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=to_dataset(columns),
        processing_class=tokenizer,
        callbacks=[_Teller(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [
        {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, card: dict[str, Any]
) -> None:
    """Write weights (safetensors), tokenizer with template, and how the model is to be asked."""
    from rlprompt.rewards.models.classifier import CARD_FILE

    model.config.id2label, model.config.label2id = {0: "preference"}, {"preference": 0}
    torch.nn.Module.to(model, "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


class _Teller(TrainerCallback):
    """Passes on how far training is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._progress(state.global_step, state.max_steps, float(logs["loss"]))
