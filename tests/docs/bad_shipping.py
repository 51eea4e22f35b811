"""Wrong use of suites, inspections, exports and the server, made to order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SERVE = ("serve", "mine=run", "--model", "model")


def suite(p: Any, text: str) -> Sequence[str]:
    """Evaluate the run by a suite of one's own."""
    p.write("suite.yaml", text)
    return ("eval", "run", "--suite", "suite.yaml", "--output", "out")


def gate(p: Any, text: str) -> Sequence[str]:
    """Evaluate the run by a gate of one's own."""
    p.write("gate.yaml", text)
    return ("eval", "run", "--suite", "quick", "--gate", "gate.yaml", "--output", "out")


def inspecting(*arguments: str) -> Sequence[str]:
    """Inspect the run."""
    return ("inspect", "run/artifact", "--output", "out", *arguments)


def exporting(p: Any, form: str, output: str = "out") -> Sequence[str]:
    """Export the run."""
    del p
    return ("export", "run", "--to", form, "--output", output)


def serving(*arguments: str) -> Sequence[str]:
    """Serve the run."""
    return (*SERVE, *arguments)


def keys(p: Any, text: str) -> Sequence[str]:
    """Serve the run with a file of keys."""
    p.write("keys.json", text)
    return serving("--keys", "keys.json")


SUITES: list[tuple[str, Callable[[Any], Sequence[str]]]] = [
    (
        "no suite of that name",
        lambda p: ("eval", "run", "--suite", "nightly", "--output", "out"),
    ),
    ("a suite that is no mapping", lambda p: suite(p, "quick\n")),
    ("a suite that is no YAML", lambda p: suite(p, "measures: [\n")),
    (
        "an unknown measure",
        lambda p: suite(p, "name: mine\nmeasures:\n  - {type: charm}\n"),
    ),
    (
        "an unknown key of a situation",
        lambda p: suite(p, "name: mine\nsituations:\n  - {type: frame, frame: override}\n"),
    ),
    ("a gate without a limit", lambda p: gate(p, "{}\n")),
    (
        "an unknown key of a limit",
        lambda p: gate(p, "limits:\n  - {value: reward, at_least: 0.5}\n"),
    ),
    ("a suite without a folder for it", lambda p: ("eval", "run", "--suite", "quick")),
    (
        "a file as the folder of a suite",
        lambda p: ("eval", "run", "--suite", "quick", "--output", "recipe.yaml"),
    ),
]
INSPECTIONS: list[tuple[str, Callable[[Any], Sequence[str]]]] = [
    ("too few queries to inspect on", lambda p: inspecting()),
    ("queries of no type that is read", lambda p: inspecting("--queries", "reward.py")),
    ("too few sets for a worth in reward", lambda p: inspecting("--reward-sets", "1")),
    ("no prompt to inspect", lambda p: ("inspect", "model", "--output", "out")),
]
EXPORTS: list[tuple[str, Callable[[Any], Sequence[str]]]] = [
    ("no such format", lambda p: exporting(p, "onnx")),
    ("a format that a soft prompt has no place in", lambda p: exporting(p, "merged")),
    ("a GGUF control vector", lambda p: exporting(p, "gguf-control")),
    ("a folder that is not empty", lambda p: exporting(p, "kv", "model")),
    ("no prompt to export", lambda p: ("export", "model", "--to", "kv", "--output", "out")),
]
SERVING: list[tuple[str, Callable[[Any], Sequence[str]]]] = [
    ("a prompt without a name", lambda p: ("serve", "run", "--model", "model")),
    ("two prompts of one name", lambda p: (*SERVE, "mine=run")),
    ("a name that no client can write", lambda p: ("serve", "a/b=run", "--model", "model")),
    (
        "no registry and no artifact",
        lambda p: ("serve", "mine=registry@prod", "--model", "model"),
    ),
    ("keys that are no JSON", lambda p: keys(p, "secret\n")),
    ("no file of keys", lambda p: serving("--keys", "keys.json")),
    ("every address without keys", lambda p: serving("--host", "0.0.0.0")),
    ("vLLM without an address", lambda p: serving("--engine", "vllm")),
    ("an address without vLLM", lambda p: serving("--vllm-url", "http://127.0.0.1:8001")),
    (
        "an address of vLLM that is none",
        lambda p: serving("--engine", "vllm", "--vllm-url", "ftp://127.0.0.1"),
    ),
    (
        "a monitor without its reward",
        lambda p: serving("--monitor", "toxicity", "--monitor-limit", "0.1"),
    ),
]
