"""The prompts that a server answers under: loaded, named, swapped and taken away while it runs.

A prompt is known by its content: `artifacts.certificate.prompt_hash`. What is computed of it, its
prefix, belongs to that hash and never to a name, so a name with new content can meet no old keys
and values.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlprompt.artifacts.certificate import Certificate, read_certificate
from rlprompt.artifacts.format import load_artifact, read_artifact_info
from rlprompt.artifacts.identity import prompt_hash
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError, choices
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from rlprompt.registry.records import Target, check_name
from rlprompt.registry.store import chosen
from rlprompt.serving.loaded import parsed_section, recipe_section
from rlprompt.serving.scheduler import Answerer
from rlprompt.serving.sources import ArtifactSource, Found, Source, source_of
from rlprompt.types import Adapter, PrefixKV

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
BetweenSteps = Callable[[Callable[[], Any]], Any]
"""Runs work in the thread that decodes, and gives its result."""

NO_PROMPT = "none"
"""The hash of no prompt at all."""
_MOST_TEXTS = 32
"""System texts of clients whose prefix is kept; the one that was used least lately goes."""


class UnknownModelError(InputError):
    """A request names a model that is not served."""


@dataclass(frozen=True, eq=False)
class ServedPrompt:
    """A prompt that was loaded, and its prefix."""

    hash: str
    """Of its content."""
    prompt: Prompt
    prefix: PrefixKV
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How it was trained to be drawn from; the length of answers is the client's affair."""
    verdict: str | None = None
    """What its run says of it."""
    certificate: Certificate | None = None


@dataclass(frozen=True)
class _Placed:
    """A name, and what it stands for."""

    source: Source
    state: str
    versions: tuple[ServedPrompt, ...]
    shares: tuple[Target, ...]
    """The share of each version, which `Target.version` counts from 1."""
    labels: tuple[str, ...]


class LoadingPolicy(Policy):
    """A policy that prompts are loaded with while another thread decodes on the same base."""

    def __init__(self, policy: Policy, between_steps: BetweenSteps, rendering: threading.Lock):
        """Share everything with a policy.

        Args:
            policy: the policy that decodes.
            between_steps: runs a forward where no other is running.
            rendering: the lock of the chat template.
        """
        self.__dict__.update(policy.sibling().__dict__)
        self._between_steps = between_steps
        self._rendering = rendering

    def prefill(
        self, embeddings: Tensor, after: PrefixKV | None = None, adapter: Adapter | None = None
    ) -> PrefixKV:
        """See `Policy.prefill`; without gradients, between two steps."""

        def run() -> PrefixKV:
            with torch.no_grad():
                return self.forward.prefill(embeddings.detach(), after, adapter)

        made: PrefixKV = self._between_steps(run)
        return made

    def slot_ids(self, text: str) -> list[int]:
        """A text as tokens of the slot."""
        with self._rendering:
            return super().slot_ids(text)


class Shelf:
    """All prompts of a server, by name."""

    def __init__(
        self,
        policy: Policy,
        answerer: Answerer,
        *,
        force: bool = False,
        kinds: Sequence[type[Prompt]] = (),
    ) -> None:
        """Hold no prompt but none.

        Args:
            policy: the policy over the base.
            answerer: what answers under the prompts, and makes their prefixes.
            force: whether prompts of another base or template are loaded too.
            kinds: classes of the user's own that prompts may be of.
        """
        self.rendering = threading.Lock()
        """Held by who asks the chat template, which speaks to one at a time."""
        self.base = base_name(policy.id)
        """What clients call the base."""
        self.swaps = 0
        """Times that a name has got other content."""
        self._answerer = answerer
        self._policy = LoadingPolicy(policy, answerer.between_steps, self.rendering)
        self._force, self._kinds = force, tuple(kinds)
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._placed: dict[str, _Placed] = {}
        self._aliases: dict[str, str] = {}
        self._texts: OrderedDict[str, ServedPrompt] = OrderedDict()
        none = NonePrompt()
        self._none = ServedPrompt(NO_PROMPT, none, self._prefix(none))

    # What requests ask.

    def models(self) -> list[str]:
        """What requests may name as their model."""
        with self._lock:
            names = sorted([*self._placed, *self._aliases])
        return [self.base, *(f"{self.base}@{name}" for name in names)]

    def find(self, model: str, key: str) -> tuple[str, ServedPrompt]:
        """What a request is answered under.

        Args:
            model: the base, `BASE@NAME`, or NAME alone; an alias is a name too.
            key: what an alias of a registry with shares decides by.

        Returns:
            The model as it is told to the client, and the prompt.

        Raises:
            UnknownModelError: there is no such model.
        """
        if model in (self.base, self._policy.id, "base"):
            return self.base, self._none
        name = model
        for base in (self.base, self._policy.id, "base"):
            name = model.removeprefix(f"{base}@") if model.startswith(f"{base}@") else name
        with self._lock:
            placed = self._placed.get(self._aliases.get(name, name))
            if placed is None:
                raise UnknownModelError(
                    f"there is no model {model[:80]!r} here; {choices(model[:80], self.models())}"
                )
        version = chosen(placed.shares, key).version if len(placed.shares) > 1 else 1
        return f"{self.base}@{name}", placed.versions[version - 1]

    def under_text(self, text: str) -> ServedPrompt:
        """The base under a system text that a client sends.

        Args:
            text: the text; a blank one is no system message.

        Raises:
            InputError: it cannot be encoded.
        """
        if not text.strip():
            return self._none
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if digest in self._texts:
                self._texts.move_to_end(digest)
                return self._texts[digest]
        prompt = TextPrompt(text)
        made = ServedPrompt(f"text-{digest}", prompt, self._prefix(prompt))
        with self._lock:
            self._texts[digest] = made
            while len(self._texts) > _MOST_TEXTS:
                self._texts.popitem(last=False)
        return made

    def query_ids(self, served: ServedPrompt, messages: Sequence[dict[str, str]]) -> list[int]:
        """The tokens between a prompt and the answer; user text never becomes a control token.

        Raises:
            InputError: the messages are no turns of user and assistant.
        """
        with self.rendering:
            return served.prompt.query_ids(self._policy, messages)

    # What administrators do.

    def place(self, name: str, source: Source | str) -> str:
        """Serve a prompt under a name; what was there before answers those who began with it.

        Args:
            name: the name.
            source: where it comes from, or the text that says so (`sources.source_of`).

        Returns:
            The hash of what is served now; of the first version, where an alias has shares.

        Raises:
            InputError: it cannot be loaded; the name then stands for what it stood for.
        """
        check_name(name, "the name")
        with self._loading:
            given = source_of(name, source) if isinstance(source, str) else source
            with self._lock:
                if name in self._aliases:
                    raise InputError(
                        f"'{name}' is an alias of '{self._aliases[name]}'; remove the alias first, "
                        "or take another name"
                    )
            return self._place(name, given)

    def follow(self) -> list[str]:
        """Load anew what registries have pointed elsewhere; returns the names that have changed."""
        changed = []
        with self._lock:
            known = dict(self._placed)
        for name, placed in known.items():
            try:
                if placed.source.state() == placed.state:
                    continue
                with self._loading:
                    if self._placed.get(name) is placed:
                        self._place(name, placed.source)
                        changed.append(name)
            except InputError as error:
                logger.warning("'%s' goes on as it was: %s", name, error)
        return changed

    def take_away(self, name: str) -> None:
        """Serve a name no longer; requests in progress are answered.

        Raises:
            InputError: there is no such name, or an alias points to it.
        """
        with self._lock:
            if name not in self._placed:
                raise InputError(f"there is no prompt '{name}'; {choices(name, self._placed)}")
            users = [alias for alias, to in self._aliases.items() if to == name]
            if users:
                raise InputError(
                    f"the alias '{users[0]}' points to '{name}'; let it point elsewhere first"
                )
            del self._placed[name]

    def remove(self, name: str) -> None:
        """Serve a name and its aliases no longer."""
        with self._lock:
            self._aliases = {alias: to for alias, to in self._aliases.items() if to != name}
            self._placed.pop(name, None)

    def point(self, alias: str, to: str | None) -> None:
        """Let an alias stand for a name, from the next request on.

        Args:
            alias: the alias.
            to: the name; None = the alias is removed.

        Raises:
            InputError: there is no such name or alias, or the alias is itself a prompt's name.
        """
        check_name(alias, "the alias")
        with self._lock:
            if to is None:
                if alias not in self._aliases:
                    raise InputError(f"there is no alias '{alias}'; nothing is removed")
                del self._aliases[alias]
                return
            if alias in self._placed:
                raise InputError(f"'{alias}' is a prompt of its own; take another name")
            if to not in self._placed:
                raise InputError(f"there is no prompt '{to}'; {choices(to, self._placed)}")
            self._aliases[alias] = to
            self.swaps += 1

    def roll_back(self, name: str, why: str) -> str:
        """Go back to what a name stood for before, or take it away; returns what was done.

        Args:
            name: the name.
            why: the reason.
        """
        with self._lock:
            placed = self._placed.get(name)
        if placed is None:
            return "it is not served any more"
        if placed.source.roll_back(why):
            with self._loading:
                self._place(name, placed.source)
            return "its alias points to what it pointed to before"
        self.remove(name)
        return "it is taken away, as there is nothing to go back to"

    def described(self) -> list[dict[str, Any]]:
        """All prompts for administrators; learned numbers are not among it."""
        with self._lock:
            placed, aliases = dict(self._placed), dict(self._aliases)
        return [
            {
                "name": name,
                "hash": version.hash,
                "kind": version.prompt.kind,
                "share": share.share,
                "source": label,
                "aliases": sorted(alias for alias, to in aliases.items() if to == name),
                "verdict": version.verdict,
                "certificate": _certificate(version),
                "history": each.source.history(),
            }
            for name, each in sorted(placed.items())
            for version, share, label in zip(each.versions, each.shares, each.labels, strict=True)
        ]

    def name_of(self, name: str) -> str:
        """The prompt's own name, where the given one is an alias of it."""
        with self._lock:
            return self._aliases.get(name, name)

    def served(self, name: str) -> tuple[ServedPrompt, ...]:
        """The versions that a name stands for; none where there is no such name."""
        with self._lock:
            placed = self._placed.get(self._aliases.get(name, name))
        return () if placed is None else placed.versions

    def _place(self, name: str, source: Source) -> str:
        state = source.state()
        found = source.find()
        versions = tuple(self._loaded(each) for each in found)
        if isinstance(source, ArtifactSource):
            source.note()
        shares = tuple(Target(version=i + 1, share=f.share) for i, f in enumerate(found))
        placed = _Placed(source, state, versions, shares, tuple(f.label for f in found))
        with self._lock:
            before = self._placed.get(name)
            self._placed[name] = placed
        hashes = [version.hash for version in versions]
        if before is not None and hashes != [version.hash for version in before.versions]:
            self.swaps += 1
        logger.info("'%s' is %s", name, ", ".join(each[:12] for each in hashes))
        return hashes[0]

    def _loaded(self, found: Found) -> ServedPrompt:
        """A prompt; one of the same content that is served already is the same object."""
        content = prompt_hash(found.folder)
        info = read_artifact_info(found.folder)
        certificate = read_certificate(found.folder)
        verdict = info.metrics.get("verdict")
        sampling = parsed_section(
            SamplingSettings, recipe_section(info, "sampling"), "sampling", found.folder
        )
        with self._lock:
            placed = [version for each in self._placed.values() for version in each.versions]
        same = next((version for version in placed if version.hash == content), None)
        if same is None:
            prompt = load_artifact(found.folder, self._policy, force=self._force, own=self._kinds)
            prefix = self._prefix(prompt)
        else:
            prompt, prefix = same.prompt, same.prefix
        if prompt_hash(found.folder) != content:
            raise InputError(f"'{found.folder}' has changed while it was read; load it again")
        said = verdict if isinstance(verdict, str) else None
        return ServedPrompt(content, prompt, prefix, sampling, said, certificate)

    def _prefix(self, prompt: Prompt) -> PrefixKV:
        return self._answerer.prefix_of(prompt, self._policy)


def base_name(model: str) -> str:
    """What clients call a base: its id, or the last part of a folder's path.

    Args:
        model: id of the base.
    """
    return model.rstrip("/").rsplit("/", 1)[-1] if model.startswith("/") else model


def _certificate(served: ServedPrompt) -> dict[str, Any] | None:
    certificate = served.certificate
    if certificate is None:
        return None
    return {
        "statement": certificate.statement,
        "alpha": certificate.alpha,
        "delta": certificate.delta,
        "rewards": [risk.name for risk in certificate.risks],
        "created": certificate.created,
    }
