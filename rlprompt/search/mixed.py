"""One budget on texts and numbers: the best text is found, then a soft prompt that starts from it.

    search.text_search        finds a text, on its share of `max_calls`
      -> handing over         a soft prompt of the text's own embeddings
    search.number_search      moves its numbers, with all calls that are left

**When it hands over.** When the text search has nothing more to try, when `text_share` of the calls
leave it no query for each of its candidates, or, with `min_gain`, when it can hardly gain any more
(`rlprompt.search.expected_gain`). What it leaves is spent on the numbers.

**What is believed best.** The text, until a soft prompt is shown to be better than it: from then on
the text itself is tried beside the number search's candidates, in the place of the soft prompt that
would say the same. So with `evidence` numbers replace the text only by a paired test on queries
that the text was not chosen by, and the training queries are divided for it once. The rules by
which texts replace each other and numbers the text have error rates of their own, which add up.

Both searches are those that a recipe can name alone; here is only what stands between them.

Letters: C candidates, n completions per query.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rlprompt.engines.base import Engine
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.soft import SoftPrompt, SoftSettings
from rlprompt.prompts.text import TextPrompt
from rlprompt.runs.learner import LearnerState, named_under
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.search.cmaes import CMAES, CMAESSettings
from rlprompt.search.continuous import Continuous, ContinuousSettings
from rlprompt.search.division import Division
from rlprompt.search.es import ES
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.evolution import Evolution
from rlprompt.search.expected_gain import ExpectedGain
from rlprompt.search.texts import Texts
from rlprompt.settings import OneOf
from rlprompt.types import Query

logger = logging.getLogger(__name__)

TEXT_SEARCHERS: Mapping[str, type[Searcher]] = {"texts": Texts, "evolution": Evolution}
"""The searchers that can find the text."""
NUMBER_SEARCHERS: Mapping[str, type[Continuous]] = {"cmaes": CMAES, "es": ES}
"""The searchers that can move the numbers."""
_TEXTS, _NUMBERS = "text_search", "number_search"

AnyTextSearch = Annotated[
    SearchSettings,
    OneOf(
        {name: each.Settings for name, each in TEXT_SEARCHERS.items()},
        default="texts",
        is_extensible=False,
    ),
]
AnyNumberSearch = Annotated[
    ContinuousSettings,
    OneOf(
        {name: each.Settings for name, each in NUMBER_SEARCHERS.items()},
        default="cmaes",
        is_extensible=False,
    ),
]


class MixedSettings(SearchSettings):
    """A text first, then the numbers of a soft prompt that starts from it, on one budget."""

    type: Literal["mixed"] = "mixed"
    """Searcher."""
    text_search: AnyTextSearch
    """What finds the text: `texts` or `evolution`, with settings of its own."""
    number_search: AnyNumberSearch = CMAESSettings()
    """What moves the numbers: `cmaes` or `es`, with settings of its own."""
    text_share: float = Field(default=0.4, gt=0.0, lt=1.0)
    """The most of `max_calls` that is spent on texts; the numbers get all that is left."""
    min_gain: float | None = Field(default=None, gt=0.0)
    """Hand over before that, as soon as knowing which of its texts is best is expected to gain less
    than this much reward; null = never for that reason."""
    num_virtual_tokens: int | None = Field(default=None, ge=1, le=4096)
    """Embeddings of the soft prompt; null = as many as the text has tokens, so that it starts as
    the text. With fewer the text loses its end, with more it is repeated."""
    max_norm_ratio: float | None = Field(default=1.5, gt=0.0)
    """Trust region of the soft prompt, as of a prompt of type `soft`; null = no limit."""
    evidence: EvidenceSettings | None = EvidenceSettings()
    """When numbers count as better than the text, or than numbers before them. Null = the mean of
    the last generation is the incumbent, which says nothing of whether it is better."""
    number_query_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the training queries that is set apart for the numbers, so that the text was not
    chosen by them; null = half of them with `evidence`, and without it both meet all."""

    @property
    def reward_names(self) -> Sequence[str]:
        """Rewards that the text search names."""
        return self.text_search.reward_names

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.max_calls is None:
            raise ValueError("max_calls is what texts and numbers share; set it")
        for name, part in ((_TEXTS, self.text_search), (_NUMBERS, self.number_search)):
            if part.max_calls is not None:
                raise ValueError(f"{name}.max_calls has no effect; set text_share")
            if part.completions_per_query not in (1, self.completions_per_query):
                raise ValueError(
                    f"{name}.completions_per_query has no effect, since both parts draw alike; set "
                    "search.completions_per_query"
                )
        if self.number_search.evidence is not None:
            raise ValueError("number_search.evidence has no effect; set search.evidence")
        if self.number_query_share is not None and self.evidence is None:
            raise ValueError("number_query_share has no effect without evidence; remove one")
        return self

    @property
    def text_calls(self) -> int:
        """The most completions that are spent on texts."""
        return int(self.text_share * (self.max_calls or 0))

    @property
    def texts(self) -> SearchSettings:
        """What the text search is told."""
        drawn = {"completions_per_query": self.completions_per_query}
        return self.text_search.model_copy(update=drawn)

    @property
    def numbers(self) -> ContinuousSettings:
        """What the number search is told."""
        drawn = {"completions_per_query": self.completions_per_query, "evidence": self.evidence}
        return self.number_search.model_copy(update=drawn)

    def soft(self, text: str) -> SoftSettings:
        """The soft prompt that starts from a text.

        Args:
            text: text that was found.
        """
        return SoftSettings(
            init_text=text,
            num_virtual_tokens=self.num_virtual_tokens,
            max_norm_ratio=self.max_norm_ratio,
        )


@dataclass(frozen=True)
class _Handed:
    """What the number search began with."""

    text: Candidate
    """The text that was found."""
    first: int
    """Id of the number search's candidate 1; its candidate 0 is the text."""
    searcher: Continuous
    means: set[int]
    """Ids, in the number search, of the means that were tried."""

    def own(self, inner: Candidate) -> Candidate:
        """A candidate of the number search as one of the whole search."""
        if inner.id == 0:
            return self.text
        parents = tuple(self._id(self._tried(parent)) for parent in inner.parents)
        return Candidate(self._id(inner.id), inner.prompt, parents, inner.origin)

    def asked(self) -> Sequence[Candidate]:
        """What the number search asks for, and a note of its means."""
        found = self.searcher.ask()
        self.means.update(inner.id for inner in found if inner.id % self._size == 0)
        return found

    @property
    def _size(self) -> int:
        return self.searcher.population + 1

    def _tried(self, mean: int) -> int:
        """A mean, or the last one before it that was tried: with evidence, some never are."""
        while mean not in self.means and mean > 0:
            mean -= self._size
        return mean

    def _id(self, inner: int) -> int:
        return self.text.id if inner == 0 else self.first + inner - 1


class Mixed(Searcher):
    """Searches texts, then numbers; see the module.

    Texts keep the ids that the text search gives them, numbers have those after them.
    """

    Settings: ClassVar[type[SearchSettings]] = MixedSettings
    starts_from: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        settings: MixedSettings,
        given: SearchStart,
        policy: Policy,
        texts: Searcher,
        division: Division,
    ) -> None:
        """Nothing is tried yet.

        Args:
            settings: settings of the search.
            given: start of the search.
            policy: policy over the base, whose embeddings a soft prompt starts from.
            texts: searcher that finds the text.
            division: division of the training queries; its tests are those for the numbers.
        """
        self.settings = settings
        self._given, self._policy, self._texts = given, policy, texts
        numbers = division.for_tests or division.for_fitness
        step = given.queries_per_step
        self._of_texts = Division(division.for_fitness, (), step, given.seed)
        self._of_numbers = Division(numbers, (), step, given.seed + 1)
        self._handed: _Handed | None = None
        self._gain = ExpectedGain()
        self._steps = self._spent = 0
        """Steps of the present part; completions that were spent on texts."""
        self._highest = 0
        """The highest id of a text that was tried."""
        self._asked: Sequence[Candidate] = ()
        """As the present part asked for them."""
        self._wanted: Sequence[Query] | None = None

    @classmethod
    def make(cls, settings: MixedSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        if given.engine is None or given.policy is None:
            raise InputError(
                "search.type: mixed moves the numbers of a soft prompt, and there is no base here, "
                "only outputs; use search.type: texts or evolution"
            )
        share = 0.0 if settings.evidence is None else settings.number_query_share or 0.5
        division = Division.of(given, share)
        if not division.for_fitness:  # nothing is set apart
            division = Division(given.queries, ())
        with _placed(_TEXTS):
            texts = TEXT_SEARCHERS[settings.text_search.type].make(
                settings.texts, replace(given, queries=division.for_fitness)
            )
        searcher = cls(settings, given, given.policy, texts, division)
        searcher._check(given.engine, given.policy)
        return searcher

    def _check(self, engine: Engine, policy: Policy) -> None:
        """Refuse now what would fail when the numbers begin.

        Raises:
            InputError: a part has too few calls, or no number search can be made of the settings.
        """
        settings = self.settings
        tokens = settings.num_virtual_tokens or 1  # a text that is found may be as short
        number_search = settings.number_search
        each = number_search.components or policy.hidden_size
        if settings.num_virtual_tokens is None and number_search.dim > each:
            raise InputError(
                f"search.number_search.dim is {number_search.dim}, but the text that is found may "
                f"have one token, which can move in {each} directions; choose {each} or less, or "
                "set search.num_virtual_tokens"
            )
        smallest = SoftPrompt(policy.embed([0] * tokens), self._given.prompt.init_text)
        if not engine.supports(smallest):
            raise InputError(
                "the engine cannot apply a soft prompt, which search.type: mixed ends with; choose "
                "another engine, or search.type: texts or evolution"
            )
        numbers = self._numbers_from(smallest)
        total = settings.max_calls or 0
        for part, calls, candidates in (
            ("texts", settings.text_calls, self._texts.num_next),
            ("numbers", total - settings.text_calls, numbers.num_next),
        ):
            self._require_calls(part, calls, candidates)

    def _require_calls(self, part: str, calls: int, candidates: int) -> None:
        fewest = candidates * self.settings.completions_per_query
        if calls < fewest:
            raise InputError(
                f"search.text_share leaves {calls} of search.max_calls, {self.settings.max_calls}, "
                f"for {part}, but one query takes {fewest} completions ({candidates} candidates, "
                f"{self.settings.completions_per_query} of each); raise search.max_calls, or "
                f"{'raise' if part == 'texts' else 'lower'} search.text_share"
            )

    def ask(self) -> Sequence[Candidate]:
        """The candidates of the present part; in that of numbers, the text for their start."""
        if self._handed is None:
            asked = self._ask_texts()
            if asked is not None:
                return asked
            self._hand_over("its share of the calls is spent")
        return self._ask_numbers()

    def _ask_texts(self) -> Sequence[Candidate] | None:
        """The next texts; None where their share leaves no query for each of them."""
        self._asked = self._texts.ask()
        wanted = self._texts.wanted_queries
        wanted = self._of_texts.fitness(self._steps) if wanted is None else wanted
        left = self.settings.text_calls - self._spent
        most = left // (len(self._asked) * self.settings.completions_per_query)
        if most <= 0:
            if not self._spent:
                self._require_calls("texts", left, len(self._asked))
            return None
        self._wanted = None if wanted is None else wanted[:most]
        return self._asked

    def _ask_numbers(self) -> Sequence[Candidate]:
        handed = self._handed_over
        self._asked = handed.asked()
        self._wanted = self._of_numbers.fitness(self._steps)
        return [handed.own(inner) for inner in self._asked]

    @property
    def wanted_queries(self) -> Sequence[Query] | None:
        """Queries of the present part, and no more than its calls suffice for."""
        return self._wanted

    def tell(self, trials: Sequence[Trial]) -> None:
        """Tell the present part, and hand over where that is due."""
        self._steps += 1
        told = [
            replace(trial, candidate=inner)
            for trial, inner in zip(trials, self._asked, strict=True)
        ]
        if self._handed is not None:
            with _placed(_NUMBERS):
                self._handed.searcher.tell(told)
            return
        is_test = isinstance(self._texts, Evolution) and self._texts.is_testing
        with _placed(_TEXTS):
            self._texts.tell(told)
        self._spent += sum(trial.rewards.numel() for trial in trials)
        self._highest = max(self._highest, *(trial.candidate.id for trial in trials))
        self._gain.add(trials, are_rivals=not is_test)
        reason = self._reason_to_hand_over()
        if reason:
            self._hand_over(reason)

    def _reason_to_hand_over(self) -> str:
        """Why the text search is over; empty while it is not."""
        if self._texts.is_over:
            return "it has nothing more to try"
        fewest = self._texts.num_next * self.settings.completions_per_query
        if self.settings.text_calls - self._spent < fewest:
            return "its share of the calls is spent"
        least = self.settings.min_gain
        gain = self._expected_gain
        if least is not None and gain is not None and gain < least:
            return f"it is expected to gain {gain:.2g}, less than search.min_gain"
        return ""

    @property
    def _expected_gain(self) -> float | None:
        """What the text search can be expected to gain; None where that is not known."""
        return self._gain.of(self._texts.incumbent.id)

    def _hand_over(self, reason: str) -> None:
        """Begin with the numbers."""
        text = self._texts.incumbent
        logger.info(
            "the text search ends after %d calls, since %s: numbers start from candidate %d, %r",
            self._spent,
            reason,
            text.id,
            text.prompt.init_text[:200],
        )
        self._begin(text)

    def _begin(self, text: Candidate) -> None:
        settings = self.settings.soft(text.prompt.init_text)
        soft = SoftPrompt.create(settings, self._policy, self._given.seed)
        self._handed = _Handed(text, self._highest + 1, self._numbers_from(soft), set())
        self._steps = 0

    def _numbers_from(self, soft: SoftPrompt) -> Continuous:
        given = replace(self._given, prompt=soft, scale=soft.scale(self._policy))
        kind = NUMBER_SEARCHERS[self.settings.number_search.type]
        with _placed(_NUMBERS):
            return kind.make(self.settings.numbers, given)

    @property
    def _handed_over(self) -> _Handed:
        if self._handed is None:
            raise RuntimeError("the number search has not begun")
        return self._handed

    @property
    def incumbent(self) -> Candidate:
        """The best text, until numbers replace it; see the module."""
        if self._handed is None:
            return self._texts.incumbent
        return self._handed.own(self._handed.searcher.incumbent)

    @property
    def is_over(self) -> bool:
        """Whether the number search is over; a text search that is over was followed by it."""
        return self._handed is not None and self._handed.searcher.is_over

    @property
    def num_next(self) -> int:
        """As the present part says."""
        return (self._texts if self._handed is None else self._handed.searcher).num_next

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the present part, whether it is that of numbers, and what texts have cost."""
        searcher = self._texts if self._handed is None else self._handed.searcher
        found = {
            **searcher.metrics,
            "numbers": float(self._handed is not None),
            "text_calls": float(self._spent),
        }
        gain = self._expected_gain if self._handed is None else None
        return found if gain is None else {**found, "expected_gain": gain}

    def state(self) -> LearnerState:
        """That of the present part, and what stands between the two."""
        part = self._texts if self._handed is None else self._handed.searcher
        inner = part.state()
        gain = self._gain.state()
        tensors = {f"part/{name}": tensor for name, tensor in inner.tensors.items()}
        tensors |= {f"gain/{name}": tensor for name, tensor in gain.tensors.items()}
        text = None if self._handed is None else self._handed.text
        plain = {
            "part": dict(inner.plain),
            "gain": dict(gain.plain),
            "settings": self._of_the_numbers,
            "steps": self._steps,
            "spent": self._spent,
            "highest": self._highest,
            "means": [] if self._handed is None else sorted(self._handed.means),
            "text": None
            if text is None
            else [text.id, text.prompt.init_text, list(text.parents), text.origin],
        }
        return LearnerState(tensors, plain)

    @property
    def _of_the_numbers(self) -> dict[str, Any]:
        """Settings that say what the numbers are."""
        keys = {_NUMBERS, "num_virtual_tokens", "max_norm_ratio", "evidence", "number_query_share"}
        return self.settings.model_dump(mode="json", include=keys)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        plain = state.plain
        if plain["settings"] != self._of_the_numbers:
            raise ValueError("its numbers were searched with other settings")
        self._spent, self._highest = int(plain["spent"]), int(plain["highest"])
        self._gain.restore(LearnerState(named_under(state.tensors, "gain"), plain["gain"]))
        self._handed = None
        inner = LearnerState(named_under(state.tensors, "part"), plain["part"])
        if plain["text"] is None:
            self._texts.restore(inner)
        else:
            number, text, parents, origin = plain["text"]
            ids = tuple(int(parent) for parent in parents)
            self._begin(Candidate(int(number), TextPrompt(text), ids, origin))
            self._handed_over.searcher.restore(inner)
            self._handed_over.means.update(int(mean) for mean in plain["means"])
        self._steps = int(plain["steps"])
        self._asked, self._wanted = (), None


@contextmanager
def _placed(part: str) -> Iterator[None]:
    """Have errors of a part name its settings by where they stand in the recipe.

    Args:
        part: key of the part's settings.

    Raises:
        InputError: the part's, with other names.
    """
    try:
        yield
    except InputError as error:
        own = r"(?!max_calls|text_search|number_search)"
        shared = "(?!evidence)" if part == _NUMBERS else ""
        sentence = re.sub(rf"\bsearch\.{own}{shared}(?=[a-z_])", f"search.{part}.", str(error))
        raise InputError(sentence) from error
