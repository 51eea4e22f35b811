"""A model, and a system prompt on it, ready to answer."""

from __future__ import annotations

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt


class LoadedPrompt:
    """A system prompt on its frozen base, ready to answer."""

    def __init__(self, policy: Policy, prompt: Prompt, sampling: SamplingSettings) -> None:
        """Join the parts.

        Args:
            policy: the policy over the base; its own prompt is not used.
            prompt: what stands in the system turn.
            sampling: how answers are drawn where the caller does not say.
        """
        self.policy = policy
        self.prompt = prompt
        self.sampling = sampling
