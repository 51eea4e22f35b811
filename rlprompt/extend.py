"""What a class of your own may build on: the contracts of docs/extend.md, in one place to import.

    from rlprompt.extend import Algorithm, AlgorithmSettings

Names here stay as they are within a version; where else in the package they are defined does not.
"""

from __future__ import annotations

from rlprompt.algorithms.advantages import group_advantages, groups_with_spread, row_weights
from rlprompt.algorithms.base import (
    Algorithm,
    AlgorithmSettings,
    BatchView,
    MicroSignal,
    Need,
    OwnParameters,
    Signal,
    TokenLosses,
)
from rlprompt.algorithms.policy_gradient import PolicyGradient, PolicyGradientSettings
from rlprompt.engines.base import Engine, EngineSettings, Generation
from rlprompt.engines.native import NativeEngine, NativeSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy, TokenScores
from rlprompt.prompts.base import (
    Conditioner,
    EmbeddedPrompt,
    Loader,
    Prompt,
    PromptSettings,
    SavedPrompt,
    SlotPrompt,
    check_state,
    load_nothing,
)
from rlprompt.prompts.settings import Start, fresh_start, start_ids
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.runs.learner import LearnerState
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.settings import Settings
from rlprompt.tracking.tracker import Histogram, RunInfo, Tracker, TrackerSettings, TrackingSettings
from rlprompt.types import Completion, Group, Message, PrefixKV, Query

__all__ = [
    "Algorithm",
    "AlgorithmSettings",
    "BatchView",
    "Candidate",
    "Completion",
    "Conditioner",
    "EmbeddedPrompt",
    "Engine",
    "EngineSettings",
    "Generation",
    "Group",
    "Histogram",
    "InputError",
    "LearnerState",
    "Loader",
    "Message",
    "MicroSignal",
    "NativeEngine",
    "NativeSettings",
    "Need",
    "NonePrompt",
    "OwnParameters",
    "Policy",
    "PolicyGradient",
    "PolicyGradientSettings",
    "PrefixKV",
    "Prompt",
    "PromptSettings",
    "Query",
    "RunInfo",
    "SamplingSettings",
    "SavedPrompt",
    "SearchSettings",
    "SearchStart",
    "Searcher",
    "Settings",
    "Signal",
    "SlotPrompt",
    "Start",
    "TextPrompt",
    "TokenLosses",
    "TokenScores",
    "Tracker",
    "TrackerSettings",
    "TrackingSettings",
    "Trial",
    "check_state",
    "fresh_start",
    "group_advantages",
    "groups_with_spread",
    "load_nothing",
    "row_weights",
    "start_ids",
]
