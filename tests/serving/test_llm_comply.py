"""The checks of llm-comply against `rlprompt serve`, where that program is installed.

It may be installed in an environment of its own: name that environment's Python as
RLPROMPT_COMPLY_PYTHON. docs/serving.md says which checks do not apply, and why.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from rlprompt.serving.chat_requests import RequestLimits
from tests.fixtures.server import BASE, serving, tiny_policy

PYTHON = os.environ.get("RLPROMPT_COMPLY_PYTHON")
PASSES = {
    "openai-chat": {
        "chat-basic-response", "chat-system-prompt", "chat-multi-turn", "chat-streaming-response",
        "chat-streaming-usage", "chat-error-handling",
    },
    "open-responses": {
        "basic-response", "system-prompt", "multi-turn", "streaming-response", "streaming-usage",
        "response-output-phase-schema", "compact-response", "compact-missing-model",
        "error-handling",
    },
}  # fmt: skip
REFUSED = {
    "openai-chat": {"chat-tool-calling", "chat-image-input"},
    "open-responses": {"tool-calling", "image-input"},
}
"""Tools and pictures: refused with 400, as an answer that knows of neither would be wrong."""


@pytest.mark.slow
@pytest.mark.skipif(
    PYTHON is None and importlib.util.find_spec("llm_comply") is None,
    reason="llm-comply is not installed; install it, or set RLPROMPT_COMPLY_PYTHON",
)
@pytest.mark.parametrize("form", list(PASSES))
def test_all_checks_pass_that_apply(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy()
    # A tiny base ends no answer by itself: let every ninth token do it, and draw the same always.
    policy.slot.stop_ids = frozenset({*policy.slot.stop_ids, *range(3, 300, 9)})
    monkeypatch.setattr(secrets, "randbits", lambda bits: 7)
    with serving(policy, {}, requests=RequestLimits(tokens=200)) as server:
        done = subprocess.run(
            [
                PYTHON or sys.executable, "-m", "llm_comply.cli", "--base-url",
                f"{server.origin}/v1", "--api-key", "unused", "--model", BASE, "--format", form,
                "--json", "--timeout", "200",
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
    told = json.loads(done.stdout)["results"]
    by_status: dict[str, set[str]] = {}
    for each in told:
        by_status.setdefault(each["status"], set()).add(each["id"])
    assert by_status["passed"] == PASSES[form], told
    assert by_status["failed"] == REFUSED[form], told
    for each in told:
        refused = each["id"] in REFUSED[form]
        assert not refused or any("HTTP 400" in error for error in each["errors"]), each
