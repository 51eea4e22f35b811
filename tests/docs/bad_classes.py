"""Wrong classes of the user's own, each named in a recipe that is right otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.docs.bad_inputs import Project

SOURCE = """
import rlprompt.extend as rl

class MineSettings(rl.AlgorithmSettings):
    strength: float = 1.0

class Mine(rl.PolicyGradient):
    class Settings(rl.PolicyGradientSettings):
        strength: float = 1.0

    def signal(self, view):
        return rl.Signal(view.rewards, view.lengths)

    def token_weights(self, counted_lengths):
        return rl.row_weights(counted_lengths, "token", self.max_tokens)

class Unfinished(rl.Algorithm):
    Settings = MineSettings

class Bare(Mine):
    Settings = rl.AlgorithmSettings

def make_mine():
    return Mine

class Dots(rl.NativeEngine):
    class Settings(rl.NativeSettings):
        pass

    def supports(self, prompt):
        return prompt.kind != "soft"

class Copy(rl.SlotPrompt):
    class Settings(rl.PromptSettings):
        pass

    kind = "soft"

    @classmethod
    def create(cls, *args, **kwargs): ...

    @classmethod
    def restore(cls, saved): ...

    def extend(self, conditioner, before): ...

class Whole(rl.Prompt):
    class Settings(rl.PromptSettings):
        pass

    kind = "whole"

    @classmethod
    def create(cls, *args, **kwargs): ...

    @classmethod
    def restore(cls, saved): ...

    def prefix(self, conditioner): ...

class Log(rl.Tracker):
    class Settings(rl.TrackerSettings):
        url: str
"""


def own(source: str = SOURCE, **changes: Any) -> Callable[[Project], Sequence[str]]:
    """Write mine.py, and change the recipe; `__` in a name stands for a dot."""

    def arguments(project: Project) -> Sequence[str]:
        project.write("mine.py", source)
        return project.recipe(**changes)

    return arguments


def algorithm(name: str, **settings: Any) -> Callable[[Project], Sequence[str]]:
    return own(algorithm={"type": f"mine.py:{name}", **settings})


WHOLE_PART = {
    "type": "sequence",
    "parts": [{"type": "text", "text": "a"}, {"type": "mine.py:Whole"}],
}
OWN = [
    ("a file that is not there", own(algorithm={"type": "main.py:Mine"})),
    ("a path that names no object", own(algorithm={"type": "mine.py"})),
    ("a path of another form", own(algorithm={"type": "my/algorithms:Mine"})),
    ("a name that the file does not have", algorithm("Mien")),
    ("a module that is not installed", own(engine={"type": "absent_package.engines:Mine"})),
    ("a file that cannot be imported", own("import numpyy\n", algorithm={"type": "mine.py:Mine"})),
    ("a function in place of a class", algorithm("make_mine")),
    ("a tracker in place of an algorithm", algorithm("Log")),
    ("a class that leaves something out", algorithm("Unfinished")),
    ("a class without settings of its own", algorithm("Bare")),
    ("a misspelt key of its settings", algorithm("Mine", strenght=2.0)),
    ("a wrong value of its settings", algorithm("Mine", strength="much")),
    ("a prompt with the name of a built-in one", own(prompt={"type": "mine.py:Copy"})),
    ("a prompt that cannot be part of a sequence", own(prompt=WHOLE_PART)),
    ("an engine that cannot apply the prompt", own(engine={"type": "mine.py:Dots"})),
    (
        "a tracker without a setting that it needs",
        own(tracking={"trackers": ["console", "mine.py:Log"]}),
    ),
    ("an artifact whose class nobody names", lambda p: p.artifact(representation="low_rank")),
]
