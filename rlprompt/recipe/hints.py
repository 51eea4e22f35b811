"""What an unknown key of a recipe was meant to be: a name of TRL or PEFT, or a key elsewhere.

`FOREIGN_NAMES` is the table of docs/from_trl.md, by the part of a run that the names are about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Ours(NamedTuple):
    """What a setting of another library is here."""

    keys: tuple[str, ...]
    """Keys of a recipe by their YAML path; empty where nothing corresponds."""
    note: str = ""
    """What differs, or why nothing corresponds: a clause."""


FOREIGN_NAMES: Mapping[str, Mapping[str, Ours]] = {
    "Model and run": {
        "model_name_or_path": Ours(("model.path",)),
        "model": Ours(("model.path",)),
        "trust_remote_code": Ours(("model.trust_remote_code",)),
        "bf16": Ours(("model.dtype",), "dtype: bfloat16"),
        "fp16": Ours(("model.dtype",), "dtype: float16"),
        "use_cpu": Ours(("model.device",), "device: cpu"),
        "output_dir": Ours((), "name the folder with --output, or output= of rlprompt.train"),
        "resume_from_checkpoint": Ours((), "go on with --resume, or resume= of rlprompt.train"),
        "run_name": Ours(("name", "tracking.run_name"), "the run's, and the one that W&B shows"),
        "project": Ours(("tracking.project",)),
        "report_to": Ours(("tracking.trackers",), "a list such as [console, jsonl, wandb]"),
        "seed": Ours(("seed",)),
        "data_seed": Ours(("data.shuffle_seed",), "the order in which queries come follows seed"),
    },
    "Data": {
        "train_dataset": Ours(("data.path", "data.rows")),
        "eval_dataset": Ours(("data.heldout_path",), "or data.heldout or data.split_column"),
        "dataset_name": Ours(("data.path",)),
        "dataset_config": Ours(("data.name",)),
        "dataset_train_split": Ours(("data.split",)),
        "prompt": Ours(("data.query_column",), "the column of the queries is 'query' here"),
        "shuffle_dataset": Ours(("data.shuffle_seed",), "queries are always shuffled"),
        "num_train_epochs": Ours(("training.steps",), "steps x queries_per_step / queries"),
    },
    "Batches": {
        "per_device_train_batch_size": Ours(
            ("training.token_budget",), "memory alone; the batch is training.queries_per_step"
        ),
        "gradient_accumulation_steps": Ours(
            ("training.token_budget",), "follows from it; results do not depend on it"
        ),
        "generation_batch_size": Ours(
            ("training.queries_per_step",), "generation_batch_size / num_generations"
        ),
        "steps_per_generation": Ours(
            ("algorithm.num_minibatches",), "steps_per_generation / gradient_accumulation_steps"
        ),
        "num_iterations": Ours(("algorithm.num_epochs",)),
        "num_ppo_epochs": Ours(("algorithm.num_epochs",)),
        "num_mini_batches": Ours(("algorithm.num_minibatches",)),
        "max_steps": Ours(
            ("training.steps",), "rollout batches, each with num_epochs x num_minibatches updates"
        ),
        "gradient_checkpointing": Ours(("training.gradient_checkpointing",)),
        "num_generations": Ours(("algorithm.group_size",)),
        "num_generations_eval": Ours(("evaluation.completions_per_query",)),
        "per_device_eval_batch_size": Ours((), "held-out batches follow training.token_budget"),
    },
    "Drawing completions": {
        "max_completion_length": Ours(("sampling.max_tokens",)),
        "max_new_tokens": Ours(("sampling.max_tokens",)),
        "min_new_tokens": Ours(("sampling.min_tokens",)),
        "temperature": Ours(("sampling.temperature",)),
        "top_p": Ours(("sampling.top_p",)),
        "top_k": Ours(("sampling.top_k",), "null = all, TRL's 0"),
        "min_p": Ours(("sampling.min_p",), "0 = none, TRL's None"),
        "generation_kwargs": Ours(("sampling.min_tokens", "sampling.stop_token_ids")),
        "repetition_penalty": Ours((), "watch or reward builtin:repetition"),
        "chat_template": Ours(("model.template",)),
        "chat_template_path": Ours(("model.template",)),
        "use_vllm": Ours(("engine.type",), "type: vllm, with addresses as engine.urls"),
        "vllm_mode": Ours(("engine.type",), "a server always; start `vllm serve` beside the run"),
        "vllm_server_base_url": Ours(("engine.urls",), "with /v1 at its end"),
        "vllm_server_host": Ours(("engine.urls",)),
        "vllm_server_port": Ours(("engine.urls",)),
        "vllm_server_timeout": Ours(("engine.start_timeout",)),
        "vllm_importance_sampling_correction": Ours(
            ("engine.importance_cap",), "null = not corrected"
        ),
        "vllm_importance_sampling_clip_max": Ours(("engine.importance_cap",), "3 in TRL"),
        "vllm_importance_sampling_cap": Ours(("engine.importance_cap",)),
        "use_transformers_paged": Ours(("engine.type",)),
        "max_prompt_length": Ours((), "queries are never cut; shorten the data"),
    },
    "Loss": {
        "beta": Ours(("algorithm.kl_coef",)),
        "use_bias_correction_kl": Ours(("algorithm.kl_bias_correction",), "on by default in TRL"),
        "epsilon": Ours(("algorithm.clip_low", "algorithm.clip_high")),
        "epsilon_high": Ours(("algorithm.clip_high",), "for CISPO one less than TRL's"),
        "cliprange": Ours(("algorithm.clip_low", "algorithm.clip_high")),
        "cliprange_value": Ours(("algorithm.clip_value",)),
        "vf_coef": Ours(("algorithm.value_coef",)),
        "lam": Ours(("algorithm.gae_lambda",)),
        "gamma": Ours(("algorithm.gamma",)),
        "whiten_rewards": Ours(("algorithm.whiten_rewards",)),
        "missing_eos_penalty": Ours(("algorithm.missing_eos_penalty",)),
        "kl_estimator": Ours(("algorithm.kl_estimator",)),
        "loss_type": Ours(
            ("algorithm.normalizer", "algorithm.surrogate", "algorithm.loss"),
            "grpo = normalizer: sequence, dapo = token, dr_grpo = constant, cispo = surrogate: "
            "cispo; sigmoid and ipo of type: dpo",
        ),
        "importance_sampling_level": Ours(
            ("algorithm.ratio",), "token = token, sequence = sequence_mean"
        ),
        "scale_rewards": Ours(("algorithm.scale_rewards",), "True = group, False = none"),
        "normalize_advantages": Ours(("algorithm.normalize_advantages",)),
        "mask_truncated_completions": Ours(("algorithm.mask_truncated",)),
        "entropy_coef": Ours(("algorithm.entropy_coef",)),
        "label_smoothing": Ours(("algorithm.label_smoothing",), "of type: dpo"),
        "sync_ref_model": Ours(("reference.type",), "the reference stays as it is"),
        "ref_model_mixup_alpha": Ours((), "the reference stays as it is"),
        "ref_model_sync_steps": Ours((), "the reference stays as it is"),
    },
    "Rewards": {
        "reward_funcs": Ours(("rewards.N.path",), "one entry of rewards per function"),
        "reward_weights": Ours(("rewards.N.weight",), "each reward has its own"),
        "reward_kwargs": Ours(("rewards.N.options",)),
        "reward_model_path": Ours(("rewards.N.path",), "builtin:preference, with options.path"),
    },
    "Optimizer": {
        "learning_rate": Ours(
            ("training.optimizer.lr",), "or lr_relative, a share of the size of what is trained"
        ),
        "lr_scheduler_type": Ours(("training.optimizer.schedule",), "constant, linear or cosine"),
        "warmup_steps": Ours(("training.optimizer.warmup_steps",), "counted in updates"),
        "warmup_ratio": Ours(("training.optimizer.warmup_steps",), "counted in updates"),
        "weight_decay": Ours(("training.optimizer.weight_decay",)),
        "adam_beta1": Ours(("training.optimizer.betas",), "[0.9, 0.95] by default"),
        "adam_beta2": Ours(("training.optimizer.betas",), "[0.9, 0.95] by default"),
        "adam_epsilon": Ours(("training.optimizer.eps",)),
        "max_grad_norm": Ours(("training.optimizer.max_grad_norm",)),
        "optim": Ours((), "the optimizer is AdamW"),
    },
    "Saving, evaluating, logging": {
        "save_steps": Ours(("training.save_every",)),
        "save_total_limit": Ours(("training.keep_checkpoints",)),
        "eval_steps": Ours(("evaluation.every",)),
        "metric_for_best_model": Ours(("evaluation.select_by",)),
        "load_best_model_at_end": Ours(("evaluation.select_by",), "the artifact is the best"),
        "early_stopping_patience": Ours(("training.early_stopping",)),
        "log_completions": Ours(("tracking.completions_every",)),
        "num_completions_to_print": Ours(("tracking.completions_every",)),
        "logging_steps": Ours((), "every step is logged"),
        "deepspeed": Ours(("distributed.base",), "base: sharded"),
        "fsdp": Ours(("distributed.base",), "base: sharded"),
    },
    "PEFT": {
        "peft_type": Ours(
            ("prompt.type",), "PROMPT_TUNING = soft, PREFIX_TUNING = prefix, LORA = adapter"
        ),
        "peft_config": Ours(("prompt.type",), "its settings are keys of prompt"),
        "num_virtual_tokens": Ours(("prompt.num_virtual_tokens",)),
        "prompt_tuning_init": Ours(("prompt.init_text",), "TEXT = a text, RANDOM = null"),
        "prompt_tuning_init_text": Ours(("prompt.init_text",)),
        "init_weights": Ours(("prompt.init_text",), "of type: prefix"),
        "tokenizer_name_or_path": Ours(("model.path",), "the tokenizer is the base's"),
        "base_model_name_or_path": Ours(("model.path",)),
        "prefix_projection": Ours(("prompt.rank",), "of type: prefix: a product of low rank"),
        "encoder_hidden_size": Ours(("prompt.rank",), "of type: prefix: a product of low rank"),
        "r": Ours(("prompt.method.rank",), "of type: adapter"),
        "lora_alpha": Ours(("prompt.method.alpha",), "of type: adapter"),
        "target_modules": Ours(("prompt.method.target_modules",), "of type: adapter"),
        "feedforward_modules": Ours(("prompt.method.feedforward_modules",), "of type: adapter"),
        "lora_dropout": Ours((), "no dropout is trained with"),
    },
}
"""Settings of TRL (with those of transformers' `TrainingArguments`) and of PEFT, by name."""

FOREIGN_KINDS: Mapping[str, tuple[str, str]] = {
    "dapo": ("grpo", "normalizer: token"),
    "dr_grpo": ("grpo", "normalizer: constant and scale_rewards: none"),
    "gspo": ("grpo", "ratio: sequence_mean"),
    "cispo": ("grpo", "surrogate: cispo"),
    "ipo": ("dpo", "loss: ipo"),
    "sft": ("supervised", ""),
    "prompt_tuning": ("soft", ""),
    "prefix_tuning": ("prefix", ""),
    "lora": ("adapter", "method: {type: lora}"),
    "ia3": ("adapter", "method: {type: ia3}"),
}
"""What others call a kind of algorithm or prompt: our `type`, and the settings that go with it."""

_MAX_PLACES = 3
"""A name that more places have says nothing."""


def foreign_hint(name: str, schema: Mapping[str, Any]) -> str:
    """What a setting of TRL or PEFT is here, as the end of a sentence; empty for other names.

    Args:
        name: an unknown key.
        schema: the JSON schema that does not know it.
    """
    for section, names in FOREIGN_NAMES.items():
        if name not in names:
            continue
        ours, known = names[name], set(key_paths(schema))
        owner = "PEFT" if section == "PEFT" else "TRL"
        if not set(ours.keys) <= known:
            continue
        if not ours.keys:
            return f"{owner}'s {name} has no counterpart: {ours.note}"
        note = f" ({ours.note})" if ours.note else ""
        return f"{owner}'s {name} is {' and '.join(ours.keys)} here{note}"
    return ""


def kind_hint(name: object, kinds: Sequence[str]) -> str:
    """What a kind of another library is here, in brackets; empty for other names.

    Args:
        name: an unknown `type`.
        kinds: the types that there are.
    """
    kind, settings = FOREIGN_KINDS.get(str(name).lower().replace("-", "_"), ("", ""))
    if kind not in kinds:
        return ""
    return f" ({name} is {kind} with {settings})" if settings else f" ({name} is {kind})"


def other_type(place: str, schema: Mapping[str, Any]) -> str:
    """The `type` key that decides whether a key is known, where another choice of it would have it.

    Args:
        place: the YAML path of an unknown key.
        schema: the JSON schema.

    Returns:
        Its YAML path, such as `prompt.type`; empty where no choice has the key.
    """
    parts = ["N" if part.isdecimal() else part for part in place.split(".")]
    if ".".join(parts) not in key_paths(schema):
        return ""
    return ".".join([*place.split(".")[:-1], "type"])


def elsewhere(name: str, place: str, schema: Mapping[str, Any]) -> str:
    """Where a key of that name stands, as the end of a sentence; empty where it stands nowhere.

    Args:
        name: an unknown key.
        place: the YAML path that it was given under; keys near it come first.
        schema: the JSON schema.
    """
    found = [path for path in key_paths(schema) if path.rpartition(".")[2] == name]
    around = place.rpartition(".")[0]
    near = [path for path in found if around and path.startswith(f"{around}.")]
    shown = near or found
    if len(shown) > _MAX_PLACES:  # the ones that do not lie deep are meant more often
        least = min(path.count(".") for path in shown)
        shown = [path for path in shown if path.count(".") == least]
    if not shown or len(shown) > _MAX_PLACES:
        return ""
    return f"did you mean {' or '.join(repr(path) for path in shown)}?"


def key_paths(schema: Mapping[str, Any]) -> list[str]:
    """The YAML path of every key that a JSON schema knows, `N` for the index of a list."""
    return list(dict.fromkeys(_walk(schema, schema, "", ())))


def _walk(
    node: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, inside: tuple[str, ...]
) -> Iterator[str]:
    """The paths below a node; `inside` are the definitions that it is in."""
    name = node.get("$ref", "").rpartition("/")[2]
    if name and name not in inside:
        yield from _walk(schema["$defs"][name], schema, prefix, (*inside, name))
    for kind in ("anyOf", "oneOf", "allOf"):
        for each in node.get(kind, ()):
            yield from _walk(each, schema, prefix, inside)
    if isinstance(node.get("items"), dict):
        yield from _walk(node["items"], schema, f"{prefix}N.", inside)
    for key, child in node.get("properties", {}).items():
        yield f"{prefix}{key}"
        yield from _walk(child, schema, f"{prefix}{key}.", inside)
