"""How new system texts come about: which operator, from which parents, and what is refused.

    delete, swap, repeat, substitute, word     edits of a parent, with words of the others
    exchange, add, compose                     from the library of components
    cross                                      phrases of two parents
    rephrase, blend, reflect                   a writer, a language model

All but the last three need no model. What was refused is counted by reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from rlprompt.engines.sampling import SamplingSettings
from rlprompt.search import components, edits, rewriting
from rlprompt.search.admission import Admission, Refusal, text_key
from rlprompt.search.components import Library
from rlprompt.search.operators import OperatorChoice
from rlprompt.search.rewriting import Failure
from rlprompt.search.writer import Writer
from rlprompt.types import Query

Operator = Literal[
    "delete", "swap", "repeat", "substitute", "word",
    "exchange", "add", "compose",
    "cross",
    "rephrase", "blend", "reflect",
]  # fmt: skip
OF_LIBRARY: Sequence[Operator] = ("exchange", "add", "compose")
OF_WRITER: Sequence[Operator] = ("rephrase", "blend", "reflect")
OTHERS: Sequence[Operator] = ("delete", "swap", "repeat", "substitute", "word", "cross")

_ATTEMPTS = 20
"""Edits that are tried for each text that is wanted; most texts have fewer neighbours than that
only where nearly all were tried."""


class Parent(NamedTuple):
    """A candidate that others may be made from."""

    id: int
    text: str


class Proposal(NamedTuple):
    """A text that may be tried."""

    text: str
    parents: tuple[int, ...]
    origin: str


class Hand(NamedTuple):
    """What writes for the operators that need a writer."""

    writer: Writer
    sampling: SamplingSettings


class _Job(NamedTuple):
    operator: str
    parents: tuple[int, ...]
    request: Query


class Breeder:
    """Makes new texts of old ones."""

    def __init__(
        self, choice: OperatorChoice, library: Library, admission: Admission, hand: Hand | None
    ) -> None:
        """Keep the parts.

        Args:
            choice: what chooses among operators; those of a writer only where there is a hand.
            library: components.
            admission: what says which texts may be tried.
            hand: writer, and how it draws; None = no writer.
        """
        self.choice = choice
        self._library = library
        self._admission = admission
        self._hand = hand
        self.library_digest = components.digest(library)
        """A short name of the components."""
        self.refused: dict[Refusal, int] = {}
        """Texts that were made and not tried, by reason."""
        self.written = 0
        """Answers of the writer."""

    def breed(
        self,
        parents: Sequence[Parent],
        count: int,
        draw: random.Random,
        is_known: Callable[[str], bool],
        failures: Mapping[int, Sequence[Failure]],
    ) -> list[Proposal]:
        """New texts, each different from the others and from what is known.

        Args:
            parents: parents, best first, at least one.
            count: number of texts that are wanted.
            draw: generator.
            is_known: function that says whether a text was tried.
            failures: bad completions by candidate, the worst first.

        Returns:
            At most `count`; fewer where a writer gave nothing usable and no edit is left.

        Raises:
            InputError: the writer cannot be asked.
        """
        made: dict[str, Proposal] = {}
        jobs: list[_Job] = []
        for _ in range(count):
            operator = self.choice.draw(draw)
            if operator in OF_WRITER:
                job = self._job(operator, parents, draw, failures)
                jobs += [job] if job is not None else []
        for proposal in self._written(jobs, draw):
            helped = self._take(proposal, made, is_known)
            if not helped:
                self.choice.credit(proposal.origin, helped=False)
        for _ in range(_ATTEMPTS * (count - len(made))):
            if len(made) == count:
                break
            operator = self.choice.draw(draw)
            if operator not in OF_WRITER:
                edited = self._edited(operator, parents, draw)
                if edited is not None:
                    self._take(edited, made, is_known)
        return list(made.values())

    def _take(
        self, proposal: Proposal, made: dict[str, Proposal], is_known: Callable[[str], bool]
    ) -> bool:
        key = text_key(proposal.text)
        refusal: Refusal | None = "known" if is_known(proposal.text) or key in made else None
        refusal = refusal or self._admission.refusal(proposal.text)
        if refusal is not None:
            self.refused[refusal] = self.refused.get(refusal, 0) + 1
            return False
        made[key] = proposal
        return True

    def _edited(
        self, operator: str, parents: Sequence[Parent], draw: random.Random
    ) -> Proposal | None:
        """What an operator that needs no model makes; None where it has nothing to work on."""
        if operator == "compose":
            text = components.compose(self._library, draw)
            return None if text is None else Proposal(text, (), operator)
        parent = _chosen(parents, draw)
        others = [each.text for each in parents if each.id != parent.id]
        used: tuple[int, ...] = (parent.id,)
        if operator == "cross":
            if not others:
                return None
            other = _chosen([each for each in parents if each.id != parent.id], draw)
            text, used = edits.cross(parent.text, other.text, draw), (parent.id, other.id)
        elif operator in ("substitute", "word"):
            pool = [*others, parent.text]
            pool += [each for every in self._library.values() for each in every]
            change = edits.substitute if operator == "substitute" else edits.change_word
            text = change(parent.text, pool, draw)
        elif operator in OF_LIBRARY:
            change_by = components.exchange if operator == "exchange" else components.add
            text = change_by(parent.text, self._library, draw)
        else:
            plain = {"delete": edits.delete, "swap": edits.swap, "repeat": edits.repeat}
            text = plain[operator](parent.text, draw)
        return None if text is None else Proposal(text, used, operator)

    def _job(
        self,
        operator: str,
        parents: Sequence[Parent],
        draw: random.Random,
        failures: Mapping[int, Sequence[Failure]],
    ) -> _Job | None:
        parent = _chosen(parents, draw)
        if operator == "reflect":
            found = failures.get(parent.id)
            if not found:
                return None
            return _Job(operator, (parent.id,), rewriting.reflection(parent.text, found))
        others = [each for each in parents if each.id != parent.id]
        if operator == "blend":
            if not others:
                return None
            other = _chosen(others, draw)
            request = rewriting.blending(parent.text, other.text)
            return _Job(operator, (parent.id, other.id), request)
        return _Job(operator, (parent.id,), rewriting.rephrasing(parent.text))

    def _written(self, jobs: Sequence[_Job], draw: random.Random) -> list[Proposal]:
        """What the writer proposes, one per job."""
        if not jobs or self._hand is None:
            return []
        asked = [job.request for job in jobs]
        seed = draw.getrandbits(31)
        answers = self._hand.writer.write(asked, self._hand.sampling, seed, rewriting.SYSTEM)
        self.written += len(answers)
        return [
            Proposal(rewriting.proposed(answer), job.parents, job.operator)
            for job, answer in zip(jobs, answers, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values for `load_state_dict`."""
        return {
            "choice": self.choice.state_dict(),
            "refused": dict(self.refused),
            "written": self.written,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it had other operators.
        """
        self.choice.load_state_dict(state["choice"])
        self.refused = {reason: int(count) for reason, count in state["refused"].items()}
        self.written = int(state["written"])


def _chosen(parents: Sequence[Parent], draw: random.Random) -> Parent:
    """The better of two drawn ones."""
    return parents[min(draw.randrange(len(parents)), draw.randrange(len(parents)))]
