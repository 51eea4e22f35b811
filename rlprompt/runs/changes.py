"""What may change in the recipe of a run that goes on, and what a change does.

A run that goes on is the run that began: what decides its results stays. What says how long it goes
on, how often it looks, where it reports and how it uses the machine may change, and `CHANGEABLE` is
the whole list.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from rlprompt.errors import InputError
from rlprompt.runs.guards import GuardWatch, stopped_by
from rlprompt.runs.settings import RunSettings

CHANGEABLE: Mapping[str, str] = {
    "training.steps": "a run may be made longer, or end sooner",
    "training.max_seconds": "a run may be given more time",
    "search.max_calls": "a search may be given more calls, or end sooner",
    "training.early_stopping": "a run that it ended may go on",
    "training.save_every": "a checkpoint changes no result",
    "training.keep_checkpoints": "a checkpoint changes no result",
    "training.token_budget": "bounds memory; changes the order of sums only",
    "training.gradient_checkpointing": "takes memory or time, and changes no result",
    "evaluation.every": "how often it is looked; on what stays",
    "guards": "a guard watches, and never touches the prompt",
    "tracking": "where a run reports to changes no result",
    "distributed": "how the work is divided changes the order of sums only",
    "budget": "how long a run may go on; what it has spent is kept",
    "engine.base_url": "a server may have moved; the model's name stays",
    "engine.urls": "servers may have moved, or be more; they must have the same base",
    "engine.start_timeout": "how servers are reached, not what they say",
    "engine.adapter_folder": "how adapters reach the servers, not what they are",
    "engine.api_key": "how a server is reached, not what it says",
    "engine.concurrency": "how a server is reached, not what it says",
    "engine.request_timeout": "how a server is reached, not what it says",
    "engine.deadline": "how a server is reached, not what it says",
    "engine.retries": "how a server is reached, not what it says",
    "engine.backoff": "how a server is reached, not what it says",
    "engine.requests_per_minute": "how a server is reached, not what it says",
    "engine.tokens_per_minute": "how a server is reached, not what it says",
    "engine.template_tokens": "bounds what a request may cost",
    "engine.price_in": "prices may change; what was paid stays",
    "engine.price_out": "prices may change; what was paid stays",
    "engine.plain_http_key": "how a server is reached, not what it says",
    "engine.ca_file": "how a server is reached, not what it says",
    "engine.max_response_mb": "how a server is reached, not what it says",
    "search.writer.base_url": "a server may have moved; the model's name stays",
    "search.writer.api_key": "how a server is reached, not what it says",
    "search.writer.concurrency": "how a server is reached, not what it says",
    "search.writer.request_timeout": "how a server is reached, not what it says",
    "search.writer.deadline": "how a server is reached, not what it says",
    "search.writer.retries": "how a server is reached, not what it says",
    "search.writer.backoff": "how a server is reached, not what it says",
    "search.writer.requests_per_minute": "how a server is reached, not what it says",
    "search.writer.tokens_per_minute": "how a server is reached, not what it says",
    "search.writer.template_tokens": "bounds what a request may cost",
    "search.writer.price_in": "prices may change; what was paid stays",
    "search.writer.price_out": "prices may change; what was paid stays",
    "search.writer.plain_http_key": "how a server is reached, not what it says",
    "search.writer.ca_file": "how a server is reached, not what it says",
    "search.writer.max_response_mb": "how a server is reached, not what it says",
    "engine.max_rows": "bounds memory; changes the order of sums only",
    "engine.reuse_mib": "bounds memory; the results are the same bits",
    "engine.cpp_decode": "the results are the same bits",
    "model.path": "the same weights may lie elsewhere; their fingerprint is compared",
    "model.device": "a run may go on elsewhere; changes rounding only",
    "model.threads": "changes the order of sums only",
    "model.cpu_kernels": "changes rounding only",
    "engine.cuda_graphs": "changes rounding only",
    "data.path": "the same queries may lie elsewhere; their fingerprint is compared",
    "data.heldout_path": "the same queries may lie elsewhere; their fingerprint is compared",
    "data.test.path": "the same queries may lie elsewhere; their fingerprint is compared",
    "rewards.*.timeout": "how long it is waited for, not what comes",
    "rewards.*.on_error": "what happens when a reward fails, not what it gives",
    "rewards.*.isolation": "where a reward runs, not what it gives",
    "rewards.*.ranks": "where a reward runs, not what it gives",
    "rewards.*.options.url": "a server may have moved",
    "rewards.*.options.request_timeout": "how a server is reached, not what it says",
    "rewards.*.options.retries": "how a server is reached, not what it says",
    "rewards.*.options.backoff": "how a server is reached, not what it says",
    "rewards.*.options.concurrency": "how a server is reached, not what it says",
    "rewards.*.options.token_env": "how a server is reached, not what it says",
    "rewards.*.options.ca_file": "how a server is reached, not what it says",
}
"""Keys of the recipe, and those below them, that may differ when a run goes on, with the reason;
`*` stands for any entry of a list."""

ABSENT = object()
"""The value of a key that one of two recipes does not have."""


class Change(NamedTuple):
    """A key of the recipe whose value differs from when the run was begun."""

    key: str
    """Dotted, such as `rewards.0.timeout`."""
    before: Any
    """`ABSENT` where the key is new."""
    now: Any
    """`ABSENT` where the key is gone."""

    @property
    def is_allowed(self) -> bool:
        """Whether a run can go on with it; user code may lie in another folder than it did."""
        return may_change(self.key) or _is_moved(self.before, self.now)


def is_of_server(change: Change, address: str | None) -> bool:
    """Whether a value differs only by the address of the job's own server, which has moved.

    Args:
        change: the change.
        address: the address now; None where there is no such server.
    """
    before, now = change.before, change.now
    if not address or not isinstance(before, str) or not isinstance(now, str):
        return False
    pattern = r"(?:\[[\w.:%]+\]|[\w.:%-]+)".join(re.escape(part) for part in now.split(address))
    return address in now and re.fullmatch(pattern, before) is not None


def may_change(key: str) -> bool:
    """Whether a run can go on with another value of a dotted key."""
    parts = key.split(".")
    return any(_begins(parts, pattern.split(".")) for pattern in CHANGEABLE)


def _is_moved(before: Any, now: Any) -> bool:
    """Whether both are paths of the same object in a file of the same name."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    names = [PurePath(text).name for text in (before, now)]
    return names[0] == names[1] and names[0].partition(":")[0].endswith(".py")


def _begins(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    pairs = zip(parts, pattern, strict=False)
    return len(parts) >= len(pattern) and all(own in (part, "*") for part, own in pairs)


def changes_between(before: Any, now: Any) -> list[Change]:
    """The keys of which two recipes have different values.

    Args:
        before: plain values that the run was begun with.
        now: plain values that it is to go on with.
    """
    old, new = _flat(before), _flat(now)
    return [
        Change(key, old.get(key, ABSENT), new.get(key, ABSENT))
        for key in dict.fromkeys([*new, *old])
        if old.get(key, ABSENT) != new.get(key, ABSENT)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to plain values; entries of lists by their index."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    if not items:
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def effects_of(changes: Sequence[Change], recipe: Mapping[str, Any]) -> list[str]:
    """Sentences about what allowed changes do that their keys do not say.

    Args:
        changes: the changes.
        recipe: plain values that the run goes on with.
    """
    training = recipe.get("training")
    optimizer = training.get("optimizer") if isinstance(training, dict) else None
    schedule = optimizer.get("schedule") if isinstance(optimizer, dict) else None
    longer = [c for c in changes if c.key in ("training.steps", "training.max_seconds")]
    if not longer or recipe.get("search") is not None or schedule not in ("linear", "cosine"):
        return []
    return [
        f"the {schedule} learning rate follows the new {longer[0].key} from here on, as if it had "
        "been so from the start: in a longer run it is higher again than where it had fallen to"
    ]


def require_progress(
    progress: Mapping[str, Any],
    changes: Sequence[Change],
    settings: RunSettings,
    guards: GuardWatch,
) -> None:
    """Refuse another number of steps that would leave a run where it is.

    Args:
        progress: counters of the run's newest checkpoint, as `Progress` has them.
        changes: what changed since it was begun.
        settings: how long it is to go on.
        guards: what is to watch it.

    Raises:
        InputError: fewer steps are asked for than were made, or more while something else has ended
            the run; the sentence says what to change.
    """
    steps = next((change for change in changes if change.key == "training.steps"), None)
    if steps is None:
        return
    done, asked = int(progress.get("step", 0)), settings.steps
    if asked < done:
        raise InputError(
            f"training.steps is {asked}, but the run has made {done} steps (it was to make "
            f"{steps.before}); give {done} to end it there, or more to go on"
        )
    if asked == done:
        return
    seen = copy.deepcopy(dict(progress.get("guards", {})))
    guards.adopt(seen)
    stopped = stopped_by(seen)
    if stopped is not None:
        raise InputError(
            f"training.steps is {asked}, but the guard '{stopped}' has ended the run at step "
            f"{done}; change the guard too, such as guards.{guards.place_of(stopped)}.action=warn"
        )
    limit, spent = settings.max_seconds, float(progress.get("budget_seconds", 0.0))
    if limit is not None and spent >= limit:
        raise InputError(
            f"training.steps is {asked}, but the run has spent its training.max_seconds "
            f"({spent:.3g} of {limit:g} s); raise that too, or set it to null"
        )


def extent(settings: RunSettings) -> list[int | None]:
    """How far a run is to go: what must change for early stopping to count anew."""
    return [settings.steps, settings.early_stopping]
