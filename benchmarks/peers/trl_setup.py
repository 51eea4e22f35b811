"""TRL's GRPOTrainer with a PEFT method, configured for speed and equal work on CPU.

Everything that TRL lets one choose is chosen here: weights loaded in bfloat16 and computed in
bfloat16, no autocast, no gradient checkpointing, one micro-batch per update, one update per
rollout, KV cache in generation, no logging, no saving. TRL itself is not patched unless
`compact_head` asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if importlib.util.find_spec("trl") is None:
    sys.exit("error: TRL is not installed; run `pip install 'rlprompt[trl]'`")

import torch
import trl.trainer.utils
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from transformers import AutoTokenizer, PrinterCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.peers.worker import (
    CHATML_WITHOUT_DEFAULT,
    LORA_RANK,
    METHODS,
    GrpoWork,
    conversation,
    environment,
    load_queries,
    setting,
    versions,
)

Trainer = Any
"""A `GRPOTrainer`; its model and methods have no types that a checker could follow."""

RewardFunction = Callable[..., list[float | None]]
TRL_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "generation_batch_size",
    "num_generations",
    "num_iterations",
    "steps_per_generation",
    "beta",
    "epsilon",
    "epsilon_high",
    "loss_type",
    "scale_rewards",
    "importance_sampling_level",
    "use_bias_correction_kl",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "gradient_checkpointing",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "max_completion_length",
    "generation_kwargs",
    "seed",
)
"""What is reported of the configuration that TRL ended up with."""
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


@dataclass(frozen=True)
class TrlSettings(GrpoWork):
    """Everything that decides what one step does; stated in every JSON."""

    weight_decay: float = setting(0.0, "Of AdamW.")
    epsilon: float = setting(0.2, "Clip range of the ratio, both sides.")
    loss_type: str = setting("grpo", "TRL's loss_type.")
    default_system: bool = setting(False, "Keep the system message that the template adds.")
    system_text: str = setting("", "System message of every query, in front of the user turn.")
    autocast: bool = setting(False, "TRL's bf16=True: autocast around the bfloat16 model.")
    compact_head: bool = setting(
        False, "Patch TRL to score completion positions only, as it does on GPUs; off = as shipped."
    )
    eval_batch: int = setting(32, "Rows per generate call in evaluation.")


def load_reward(name: str) -> RewardFunction:
    """Import `FILE.py:NAME` or `package.module:NAME`.

    Raises:
        ValueError: The name has no `:` or the module has no such callable.
    """
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        if spec is None or spec.loader is None:
            raise ValueError(f"Reward file {place} cannot be imported.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif place:
        module = importlib.import_module(place)
    else:
        raise ValueError(f"Reward {name!r} must be FILE.py:NAME or module:NAME.")
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"Reward {name!r}: {place} has no callable {attribute!r}.")
    found: RewardFunction = function
    return found


def as_rows(queries: Iterable[dict[str, Any]], system_text: str) -> list[dict[str, Any]]:
    """Turn queries into TRL rows: `prompt` (chat messages) and every other column unchanged."""
    return [
        {
            **{k: v for k, v in row.items() if k != "query"},
            "prompt": conversation(row["query"], system_text),
        }
        for row in queries
    ]


def trl_arguments(settings: TrlSettings, output_dir: str) -> GRPOConfig:
    """Translate the settings into TRL's own configuration."""
    rows = settings.num_queries * settings.group_size
    return GRPOConfig(
        output_dir=output_dir,
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "sdpa"},
        use_cpu=True,
        bf16=settings.autocast,
        gradient_checkpointing=False,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=settings.group_size,
        num_iterations=1,
        max_completion_length=settings.max_new_tokens,
        generation_kwargs={"min_new_tokens": settings.min_new_tokens or None, "use_cache": True},
        temperature=settings.temperature,
        beta=settings.beta,
        epsilon=settings.epsilon,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        max_steps=settings.steps or 1_000_000,
        seed=settings.seed,
        report_to="none",
        logging_strategy="no",
        log_completions=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )


def peft_config(settings: TrlSettings) -> PeftConfig:
    """What PEFT trains.

    Raises:
        ValueError: the method is none of METHODS.
    """
    if settings.method not in METHODS:
        raise ValueError(f"--method {settings.method} is none of {', '.join(METHODS)}.")
    if settings.method == "lora":
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=LORA_RANK, lora_alpha=16, target_modules="all-linear"
        )
    if settings.method == "prefix":
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=settings.num_virtual_tokens
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=settings.num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=settings.init_text,
        tokenizer_name_or_path=settings.model,
    )


def build_trainer(settings: TrlSettings) -> Trainer:
    """Load the base in bfloat16, wrap it in what PEFT trains and construct the trainer."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.compact_head:
        # TRL 1.16 sends every position through the LM head where there is no Triton.
        vars(trl.trainer.utils)["_use_triton"] = lambda device: True
    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    if not settings.default_system:
        tokenizer.chat_template = CHATML_WITHOUT_DEFAULT
    rows = as_rows(load_queries(settings.queries), settings.system_text)
    with tempfile.TemporaryDirectory(prefix="trl_grpo_") as unused:  # nothing is ever saved
        trainer: Trainer = GRPOTrainer(
            model=settings.model,
            reward_funcs=load_reward(settings.reward),
            args=trl_arguments(settings, unused),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config(settings),
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def compute_dtypes(trainer: Trainer) -> dict[str, str]:
    """Watch the first decoder projection of the next forward; the dict is filled when it runs."""
    seen: dict[str, str] = {}
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj

    def note(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            seen.update(
                weight=str(module.weight.dtype),
                input=str(inputs[0].dtype),
                output=str(output.dtype),
                autocast=str(torch.is_autocast_enabled("cpu")),
            )
            handle.remove()

    handle = layer.register_forward_hook(note)
    return seen


def describe(settings: TrlSettings, trainer: Trainer, dtypes: dict[str, str]) -> dict[str, Any]:
    """State every setting, version and what TRL made of them."""
    return {
        "peer": f"TRL GRPOTrainer + PEFT {PeftType(peft_config(settings).peft_type).value}",
        "settings": asdict(settings),
        "trl_arguments": {name: _plain(getattr(trainer.args, name)) for name in TRL_ARGUMENTS},
        "compute_dtypes": dtypes,
        "trained_dtype": str(next(p for p in trainer.model.parameters() if p.requires_grad).dtype),
        "attention": trainer.model.config._attn_implementation,
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "threads": torch.get_num_threads(),
        "environment": environment(),
        "versions": versions(*PACKAGES),
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, bool, dict, type(None))) else str(value)
