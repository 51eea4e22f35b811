"""How a prompt is trained by gradients: optimizer, schedule, memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlprompt.runs.settings import RunSettings
from rlprompt.settings import Settings

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerSettings(Settings):
    """AdamW on the prompt's parameters (Loshchilov and Hutter, 2019)."""

    lr: float | None = Field(default=None, gt=0.0)
    """Learning rate. Give this or `lr_relative`."""
    lr_relative: float | None = Field(default=None, gt=0.0)
    """Learning rate as a share of the natural size of what is trained (for a soft prompt, the root
    mean square of the base's embedding entries), so that one value serves bases of any scale and
    every representation. 0.05 when neither is given."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = Field(default=1e-8, gt=0.0)
    """AdamW's epsilon."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises linearly from 0; a step has `num_epochs` times
    `num_minibatches` of them."""
    min_lr_ratio: float = Field(default=0.1, ge=0.0, le=1.0)
    """Where linear and cosine schedules end, as a share of the learning rate."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm; null = never."""

    @model_validator(mode="after")
    def _one_rate(self) -> OptimizerSettings:
        if self.lr is not None and self.lr_relative is not None:
            raise ValueError("lr and lr_relative are both given; keep one")
        default = OptimizerSettings.model_fields["min_lr_ratio"].default
        if self.schedule == "constant" and self.min_lr_ratio != default:
            raise ValueError("min_lr_ratio has no effect with schedule: constant; remove it")
        return self


class TrainingSettings(RunSettings):
    """The course of a run that learns by gradients."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer and learning rate."""
    token_budget: int = Field(default=1024, ge=64)
    """Most packed tokens per micro-batch: bounds activation memory, changes no result."""
    overlap_rollouts: bool = False
    """Draw and score the next batch while this one is learned from, under the prompt as it was
    before the update. From the second step on, batches are one step old, and the probability ratio
    of the policy gradient is taken against the prompt that drew them."""
    gradient_checkpointing: bool = False
    """Recompute activations layer by layer in the backward: less memory, a third more compute."""

    @model_validator(mode="after")
    def _overlap_has_effect(self) -> TrainingSettings:
        if self.overlap_rollouts and self.steps == 1:
            raise ValueError("overlap_rollouts has no effect with steps: 1; remove it")
        return self
