"""Learn the system prompt of a frozen language model with reinforcement learning.

    import rlprompt

    run = rlprompt.train(rewards=my_reward, data=["How do I ...?", ...], prompt="Be brief.")
    run.prompt.generate("How do I sharpen a knife?")

Public is what `__all__` names (docs/python.md), and what it documents of their methods. Everything
else may change with any release. Names are loaded when they are asked for: `import rlprompt` alone
imports no deep learning framework.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC: dict[str, str] = {
    # learn, load, compare
    "train": "rlprompt.api",
    "load_prompt": "rlprompt.api",
    "open_model": "rlprompt.api",
    "evaluate": "rlprompt.api",
    "export": "rlprompt.api",
    "load_recipe": "rlprompt.recipe.schema",
    # what they give
    "Run": "rlprompt.runs.run",
    "Population": "rlprompt.runs.population",
    "RunMetrics": "rlprompt.runs.outcome",
    "Report": "rlprompt.runs.outcome",
    "StopReason": "rlprompt.runs.stop_reason",
    "LoadedPrompt": "rlprompt.serving.loaded",
    "Model": "rlprompt.serving.loaded",
    "Comparison": "rlprompt.evaluation.compare",
    "PromptScores": "rlprompt.evaluation.compare",
    "Recipe": "rlprompt.recipe.schema",
    # what goes wrong
    "InputError": "rlprompt.errors",
    "NotFiniteError": "rlprompt.runs.learner",
    # pieces for a loop of your own
    "Policy": "rlprompt.policy",
    "NativeEngine": "rlprompt.engines.native",
    "SamplingSettings": "rlprompt.engines.sampling",
    "GradientStep": "rlprompt.training.step",
    "StepParts": "rlprompt.training.step",
    "GRPOSettings": "rlprompt.algorithms.grpo",
    "SoftSettings": "rlprompt.prompts.soft",
    "SoftPrompt": "rlprompt.prompts.soft",
    "TextPrompt": "rlprompt.prompts.text",
    "NonePrompt": "rlprompt.prompts.text",
    "QuerySampler": "rlprompt.data",
    "load_queries": "rlprompt.data",
    "build_rewards": "rlprompt.rewards",
    "Query": "rlprompt.types",
    "Completion": "rlprompt.types",
}
"""Every public name and the module that defines it."""

__all__ = ["__version__", *_PUBLIC]  # names of a literal dict

if TYPE_CHECKING:
    from rlprompt.algorithms.grpo import GRPOSettings as GRPOSettings
    from rlprompt.api import evaluate as evaluate
    from rlprompt.api import export as export
    from rlprompt.api import load_prompt as load_prompt
    from rlprompt.api import open_model as open_model
    from rlprompt.api import train as train
    from rlprompt.data import QuerySampler as QuerySampler
    from rlprompt.data import load_queries as load_queries
    from rlprompt.engines.native import NativeEngine as NativeEngine
    from rlprompt.engines.sampling import SamplingSettings as SamplingSettings
    from rlprompt.errors import InputError as InputError
    from rlprompt.evaluation.compare import Comparison as Comparison
    from rlprompt.evaluation.compare import PromptScores as PromptScores
    from rlprompt.policy import Policy as Policy
    from rlprompt.prompts.soft import SoftPrompt as SoftPrompt
    from rlprompt.prompts.soft import SoftSettings as SoftSettings
    from rlprompt.prompts.text import NonePrompt as NonePrompt
    from rlprompt.prompts.text import TextPrompt as TextPrompt
    from rlprompt.recipe.schema import Recipe as Recipe
    from rlprompt.recipe.schema import load_recipe as load_recipe
    from rlprompt.rewards import build_rewards as build_rewards
    from rlprompt.runs.learner import NotFiniteError as NotFiniteError
    from rlprompt.runs.outcome import Report as Report
    from rlprompt.runs.outcome import RunMetrics as RunMetrics
    from rlprompt.runs.population import Population as Population
    from rlprompt.runs.run import Run as Run
    from rlprompt.runs.stop_reason import StopReason as StopReason
    from rlprompt.serving.loaded import LoadedPrompt as LoadedPrompt
    from rlprompt.serving.loaded import Model as Model
    from rlprompt.training.step import GradientStep as GradientStep
    from rlprompt.training.step import StepParts as StepParts
    from rlprompt.types import Completion as Completion
    from rlprompt.types import Query as Query


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlprompt' has no attribute {name!r}")
    import_module("rlprompt.cpu_share").bound_waiting()
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
