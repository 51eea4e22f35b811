"""Settings that several representations share: where a prompt starts from."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from rlprompt.prompts.base import PromptSettings

DEFAULT_TEXT = "You are a helpful assistant."


class StartSettings(PromptSettings):
    """A start from a text, from drawn tokens, or from an artifact."""

    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """m, the number of trained positions; null = as many as `init_text` or the artifact has."""
    init_text: str | None = DEFAULT_TEXT
    """Text that the prompt starts from, repeated or cut to m tokens; null = random tokens of the
    vocabulary."""
    from_artifact: str | None = None
    """Artifact to start from in place of a text, relative to the recipe's folder."""

    @model_validator(mode="before")
    @classmethod
    def _artifact_replaces_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("from_artifact") is not None:
            return {"init_text": None, "num_virtual_tokens": None, **values}
        return values

    @model_validator(mode="after")
    def _start_is_known(self) -> StartSettings:
        if self.from_artifact is not None:
            if self.init_text is not None:
                raise ValueError("from_artifact and init_text are both given; keep one")
        elif self.num_virtual_tokens is None and not (self.init_text or "").strip():
            raise ValueError("num_virtual_tokens is null, which needs an init_text to count")
        return self
