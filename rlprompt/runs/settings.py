"""How long a run goes on, what it keeps, and the members of a population."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rlprompt.settings import Settings


class RunSettings(Settings):
    """The course of a run, whatever learns in it."""

    steps: int = Field(default=30, ge=1)
    """Rollout batches."""
    queries_per_step: int = Field(default=6, ge=1)
    """Queries per rollout batch; each gets `algorithm.group_size` completions, in a search
    `search.completions_per_query` under each candidate."""
    save_every: int = Field(default=10, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that stay on disk."""
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after this many held-out evaluations without a better one; null = never."""
    max_seconds: float | None = Field(default=None, gt=0.0)
    """Stop after the step that brings the time of all steps to this; evaluations do not count. A
    linear or cosine schedule then follows steps or time, whichever is further; null = no limit."""
    clock: Literal["wall", "cpu"] = "wall"
    """What `max_seconds` counts: the time that passes, or the CPU time of this process, which other
    programs on the machine do not change."""

    @model_validator(mode="after")
    def _clock_has_effect(self) -> RunSettings:
        if self.max_seconds is None and self.clock != "wall":
            raise ValueError("clock has no effect without max_seconds; set it or remove clock")
        return self


class MemberSettings(Settings):
    """One prompt of a population: the recipe with some keys changed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Its folder under `members/`."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Dotted keys of the recipe and their values in this member: `seed`, `prompt`, `search` or keys
    below them, and keys below `training.optimizer`."""

    @field_validator("changes")
    @classmethod
    def _may_change(cls, changes: dict[str, Any]) -> dict[str, Any]:
        for key in changes:
            if key not in ("seed", "prompt", "search") and not key.startswith(
                ("prompt.", "search.", "training.optimizer.")
            ):
                raise ValueError(
                    "members of a population may change seed, prompt, search and "
                    f"training.optimizer, not {key}; make it a recipe of its own"
                )
        return changes
