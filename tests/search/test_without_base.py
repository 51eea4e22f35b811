"""Searchers where completions come from elsewhere, and no base is here to look into."""

from __future__ import annotations

from typing import Any

import pytest

from rlprompt.engines.base import Engine, EngineSettings, Generation
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.search.base import SearchStart
from rlprompt.search.evolution import Evolution, EvolutionSettings
from rlprompt.search.rl import RL, RLSettings
from rlprompt.search.tokens import Tokens, TokensSettings
from tests.fixtures.runs import queries


class Elsewhere(Engine):
    """An engine without a base."""

    def __init__(self) -> None:
        super().__init__(None, EngineSettings(type="elsewhere"))

    def supports(self, prompt: Prompt) -> bool:
        return isinstance(prompt, TextPrompt)

    def sync(self, prompt: Prompt) -> None:
        pass

    def generate(self, *_: Any, **__: Any) -> Generation:
        raise AssertionError("nothing is drawn here")


START = SearchStart(TextPrompt("Be nice."), 0, engine=Elsewhere(), queries=queries(8))


def test_evolution_needs_no_base() -> None:
    assert START.policy is None
    searcher = Evolution.make(EvolutionSettings(texts=("Be brief.",)), START)
    asked = [candidate.prompt.init_text for candidate in searcher.ask()]
    assert asked[:2] == ["Be nice.", "Be brief."] and len(asked) > 2


def test_searchers_that_look_into_a_base_say_so() -> None:
    with pytest.raises(InputError, match="there is no base here"):
        RL.make(RLSettings(), START)
    with pytest.raises(InputError, match="needs the weights of the base"):
        Tokens.make(TokensSettings(), START)
