"""The public surface: its names, its signatures, and that importing it costs nothing.

A change here is a change for users: it needs a line in CHANGELOG.md and in docs/python.md.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rlprompt

ROOT = Path(__file__).parent.parent

FUNCTIONS = {
    "train": (
        "(recipe=None, *, model=None, tokenizer=None, rewards=None, data=None, heldout=None, "
        "test=None, prompt=None, output=None, resume=False, progress=True, **sections)"
    ),
    "load_prompt": (
        "(artifact, *, model=None, tokenizer=None, force=False, trust_remote_code=False, "
        "prompt_classes=())"
    ),
    "open_model": "(model='smollm2-135m', *, tokenizer=None, **settings)",
    "evaluate": (
        "(prompts, *, data, rewards, model=None, tokenizer=None, completions_per_query=2, seed=0, "
        "**sampling)"
    ),
    "export": (
        "(artifact, to, output, *, model=None, tokenizer=None, force=False, "
        "trust_remote_code=False, prompt_classes=())"
    ),
    "load_recipe": "(path, overrides=(), remembered=None)",
    "load_queries": "(settings, base_dir, given=None, answers=())",
    "build_rewards": "(settings, base_dir, *, needs_score=True, given=None, ranks=None)",
}

MEMBERS = {
    "Run": "folder metrics prompt report run summary",
    "Population": "folder metrics prompt report run summary",
    "RunMetrics": (
        "base best_step evaluations folder handwritten heldout history learned of seconds steps "
        "stop_reason"
    ),
    "Report": "path",
    "StopReason": "exit_code is_complete kind name parse",
    "LoadedPrompt": "complete generate generate_many kind num_tokens save stream text",
    "Model": "id load prompt",
    "Comparison": "get items keys rows scores values",
    "PromptScores": "completions metrics name reward rewards",
}
"""Public attributes of what the functions give; a class may have others, which are private."""

PIECES = {
    "GRPOSettings", "GradientStep", "NativeEngine", "NonePrompt", "Policy", "Query", "QuerySampler",
    "Completion", "SamplingSettings", "SoftPrompt", "SoftSettings", "StepParts", "TextPrompt",
}  # fmt: skip
OTHERS = {"InputError", "NotFiniteError", "Recipe", "__version__"}


def test_the_public_names() -> None:
    assert set(rlprompt.__all__) == {*FUNCTIONS, *MEMBERS, *PIECES, *OTHERS}
    assert len(rlprompt.__all__) == len(set(rlprompt.__all__))
    assert dir(rlprompt) == sorted(rlprompt.__all__)


@pytest.mark.parametrize("name", rlprompt.__all__)
def test_a_public_name_can_be_had_and_says_what_it_is(name: str) -> None:
    value = getattr(rlprompt, name)
    assert name == "__version__" or inspect.getdoc(value)


def bare(signature: inspect.Signature) -> str:
    """A signature without annotations."""
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    shown = inspect.Signature(parameters)
    return str(shown)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_of_a_public_function(name: str) -> None:
    assert bare(inspect.signature(getattr(rlprompt, name))) == FUNCTIONS[name]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_members_of_a_public_class(name: str) -> None:
    kind = getattr(rlprompt, name)
    fields = getattr(kind, "__dataclass_fields__", {})
    present = {*dir(kind), *fields, *(("folder",) if name in ("Run", "Population") else ())}
    assert set(MEMBERS[name].split()) <= present


def test_every_public_name_is_in_the_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    missing = [name for name in rlprompt.__all__ if not re.search(rf"\b{name}\b", page)]
    assert missing == []


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rlprompt.trian  # noqa: B018


def test_importing_loads_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import rlprompt\n"
        "print(time.perf_counter() - start)\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        took, heavy = done.stdout.splitlines()
        assert heavy == "[]"
        seconds.append(float(took))
    assert min(seconds) < 0.2
