"""Evolution over system texts from outputs and scores alone; it needs no model that writes.

A step of one kind tries the population and some new texts, made of its members (`search.breeding`)
and let in only if they are no copy of training data (`search.admission`), on *fitness queries*. By
all that was seen (`search.fitness`) the hopeless are dropped, as soon as a paired test says that
they are not worth waiting for, and the best of the rest are kept: those that no other surpasses in
reward and in every objective, then the fittest. What is kept is asked about again in every step,
so the longer a text holds out, the better it is known.

A step of the other kind puts the fittest text that was promoted against the incumbent, on *test
queries* that evolution never sees (`search.promotion`). The incumbent changes only to a text that
is shown to be better, at one error rate for the whole search. Test steps have at most as many
completions as the steps of the first kind. Without `evidence` all training queries are fitness
queries, and the incumbent is the fittest text that was seen on eight of them: what is said of it
then rests on the validation and test queries of the run alone.

Related: Prompt evolution with language models (Guo et al., EvoPrompt, ICLR 2024), edits and
components without one (Prasad et al., GrIPS, EACL 2023; Zhang et al., SPRIG, arXiv 2410.14826),
reflection and Pareto fronts (Agrawal et al., GEPA, arXiv 2507.19457), racing and a penalty on
length (Zehle et al., CAPO, arXiv 2504.16005).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from rlprompt.errors import InputError
from rlprompt.runs.learner import LearnerState, named_under
from rlprompt.search import breeding, components, rewriting
from rlprompt.search.admission import Admission, Copies, sources_of
from rlprompt.search.archive import Answers, Archive, Worth
from rlprompt.search.base import Candidate, Searcher, SearchSettings, SearchStart, Trial
from rlprompt.search.breeding import Breeder, Hand, Operator, Parent
from rlprompt.search.division import Division
from rlprompt.search.evidence import EvidenceSettings
from rlprompt.search.fitness import Array, crowding, front_ranks
from rlprompt.search.make_writer import AnyWriterSettings, make_writer
from rlprompt.search.operators import OperatorChoice
from rlprompt.search.promotion import Promotions, Terms, paired_test
from rlprompt.search.rewriting import Failure
from rlprompt.search.ruler import Ruler
from rlprompt.types import Query

PROMPT_LENGTH = "prompt_length"
"""The objective that is no reward: a shorter prompt is better."""
SEEN = 8
"""Fitness queries that a text was tried on before it is promoted, or believed in."""
AHEAD = 2.0
"""Standard deviations by which it is believed to be better than the one promoted before it. Each
promotion takes from the probability of error of all later ones."""
PATIENCE = 10
"""Fitness steps in a row without a new text after which there is nothing more to find."""
_TRIES = 2
"""Steps after which a text that could not be scored is given up."""
_FAILURES = 3
"""Bad completions of a text that are kept for reflection."""
_SHOWN = 600
"""Characters of them that are kept."""


class EvolutionSettings(SearchSettings):
    """Evolution over system texts, by edits, components and, with `writer`, a language model."""

    type: Literal["evolution"] = "evolution"
    """Searcher."""
    texts: tuple[str, ...] = ()
    """System texts to begin with, beside the text of `prompt`."""
    population: int = Field(default=4, ge=1, le=1000)
    """Texts that a step leaves, and the next one tries again."""
    offspring: int = Field(default=4, ge=1, le=1000)
    """New texts that are tried beside them."""
    operators: dict[Operator, NonNegativeFloat] | None = None
    """How often each operator makes a new text, in any unit; those that are not named never do.
    Null = all that there are, each the more often the more often it has helped."""
    writer: AnyWriterSettings | None = None
    """The language model that rewrites texts; null = edits and components alone."""
    library: bool = True
    """Whether the components that come with rlprompt are used."""
    components: str | dict[str, tuple[str, ...]] | None = None
    """Components of your own: lists of texts by category, or a YAML file of them. A text of one
    category can take the place of another of it."""
    objectives: tuple[str, ...] = ()
    """What a text may be good at beside the total reward: names of rewards, whatever their role,
    of which more is better, and `prompt_length`, of which less is. The population keeps texts that
    no other surpasses in all of them; the incumbent is judged by the total reward."""
    length_penalty: float = Field(default=0.0, ge=0.0)
    """What every unit of length takes off a text's reward."""
    length_unit: Literal["token", "character"] = "token"
    """The unit of `length_penalty` and of the objective `prompt_length`."""
    max_length: int = Field(default=256, ge=1, le=2**20)
    """Longest text that is tried, in tokens; words and marks where no tokenizer is at hand."""
    evidence: EvidenceSettings | None = EvidenceSettings()
    """When a text counts as better than the incumbent. Null = the fittest is the incumbent, which
    says nothing of whether that is luck; for budgets that leave no room for a test."""
    test_share: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Share of the training queries that is set apart to test what replaces the incumbent; null =
    half of them with `evidence`, none without."""

    @property
    def reward_names(self) -> Sequence[str]:
        """Rewards that the objectives name."""
        return tuple(each for each in self.objectives if each != PROMPT_LENGTH)

    @property
    def shares(self) -> Mapping[str, float] | None:
        """How often each operator is taken; None = as often as it helps."""
        if self.operators is None:
            return None
        return {str(name): share for name, share in self.operators.items()}

    @field_validator("texts", "objectives")
    @classmethod
    def _differ(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for place, each in enumerate(given):
            if not each.strip():
                raise ValueError(f"entry {place} is blank; remove it")
            if each in given[:place]:
                raise ValueError(f"entry {place} is there twice; remove one")
        return given

    @field_validator("components")
    @classmethod
    def _is_a_library(cls, given: Any) -> Any:
        if isinstance(given, dict):
            components.checked(given)
        return given

    @model_validator(mode="after")
    def _has_operators(self) -> Self:
        known = [*breeding.OTHERS, *(breeding.OF_WRITER if self.writer is not None else ())]
        known += breeding.OF_LIBRARY if self.library or self.components is not None else ()
        for name in self.operators or ():
            if name not in known:
                missing = "writer" if name in breeding.OF_WRITER else "components"
                raise ValueError(f"operators names '{name}', which needs search.{missing}; give it")
        if self.operators is not None and not any(self.operators.values()):
            raise ValueError("operators has no share above 0; raise one, or leave operators out")
        written = (
            [self.operators.get(each, 0.0) for each in breeding.OF_WRITER]
            if (self.operators is not None)
            else [1.0]
        )
        if self.writer is not None and not any(written):
            raise ValueError(
                f"writer has no effect, for operators names none of "
                f"{', '.join(breeding.OF_WRITER)}; name one, or remove writer"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.test_share is not None and self.evidence is None:
            raise ValueError("test_share has no effect without evidence; remove one of them")
        return self

    @property
    def operator_names(self) -> Sequence[Operator]:
        """The operators that make texts, in one order."""
        if self.operators is not None:
            return [each for each, share in self.operators.items() if share > 0.0]
        of_library = self.library or self.components is not None
        return [
            *breeding.OTHERS,
            *(breeding.OF_LIBRARY if of_library else ()),
            *(breeding.OF_WRITER if self.writer is not None else ()),
        ]


class Evolution(Searcher):
    """Evolves texts; see the module."""

    Settings: ClassVar[type[SearchSettings]] = EvolutionSettings
    starts_from: ClassVar[tuple[str, ...]] = ("text",)

    def __init__(
        self,
        settings: EvolutionSettings,
        texts: Sequence[str],
        breeder: Breeder,
        division: Division,
        ruler: Ruler,
        seed: int,
    ) -> None:
        """Nothing is tried yet.

        Args:
            settings: settings of the search.
            texts: texts to begin with, each once; the first is the incumbent.
            breeder: what makes new texts.
            division: division of the training queries into those for fitness and for tests.
            ruler: what measures texts.
            seed: seed of all that is drawn here.
        """
        self.settings = settings
        self._breeder = breeder
        self._division = division
        self._ruler = ruler
        self._seed = seed
        evidence = settings.evidence or EvidenceSettings()
        self._terms = Terms(
            evidence.alpha, evidence.spread, evidence.min_effect, evidence.miss_rate
        )
        self._archive = Archive(settings.reward_names)
        for text in texts:
            self._archive.add(text)
        self._given = tuple(texts)
        self._promotions = Promotions(self._terms)
        self._members = list(range(len(texts)))
        """The population, the fittest first."""
        self._tries: dict[int, int] = {}
        """Newcomers that have no score yet, with the steps that they were tried in."""
        self._failures: dict[int, list[Failure]] = {}
        self._step = self._barren = 0
        """Fitness steps so far, and those at the end that had no new text."""
        self._stale: set[int] = set()
        """Challengers whose last test met no query that was new to them."""
        self._challenger: int | None = None
        """What the next step tests; None = it is a fitness step."""
        self._asked: list[Candidate] = []
        self._wanted: Sequence[Query] | None = None
        self._lengths: dict[int, float] = {}

    @classmethod
    def make(cls, settings: EvolutionSettings, given: SearchStart) -> Self:
        """The searcher of a recipe; see `Searcher.make`."""
        library = components.read_library(settings.components, built_in=settings.library)
        ruler = Ruler(given)
        texts = given_texts(settings, given, ruler)
        own = [*texts, *(each for every in library.values() for each in every)]
        admission = admission_of(settings, given, ruler, own)
        hand = None
        if settings.writer is not None:
            hand = Hand(make_writer(settings.writer, given), settings.writer.sampling)
        choice = OperatorChoice(settings.operator_names, settings.shares)
        breeder = Breeder(choice, library, admission, hand)
        return cls(settings, texts, breeder, division_of(settings, given), ruler, given.seed)

    def ask(self) -> Sequence[Candidate]:
        """The population and new texts, or the incumbent and what challenges it."""
        if self._asked:
            return self._asked
        if self._challenger is not None:
            pair = (self._promotions.incumbent, self._challenger)
            self._asked = [self._archive.candidates[each] for each in pair]
            self._wanted = self._division.tests(
                self._met(self._challenger, self._archive.test_answers())
            )
            return self._asked
        self._wanted = self._division.fitness(self._step)
        waiting = list(self._tries)
        born = self._breed(max(0, self.settings.offspring - len(waiting)))
        self._barren = 0 if born or waiting else self._barren + 1
        numbers = [*self._members, *waiting, *born]
        self._asked = [self._archive.candidates[each] for each in numbers]
        return self._asked

    def _breed(self, count: int) -> list[int]:
        """The ids of new candidates."""
        draw = random.Random(f"{self._seed}:{self._step}")
        parents = [Parent(each, self._archive.text(each)) for each in self._members]
        archive = self._archive
        made = self._breeder.breed(parents, count, draw, archive.knows, self._failures)
        born = [archive.add(each.text, each.parents, each.origin).id for each in made]
        self._tries |= dict.fromkeys(born, 0)
        return born

    @property
    def wanted_queries(self) -> Sequence[Query] | None:
        """Test queries for a test, fitness queries else; None where the run's own order will do."""
        return self._wanted

    def tell(self, trials: Sequence[Trial]) -> None:
        """Take up the scores, and evolve, or see whether the incumbent is to be replaced."""
        challenger, self._asked = self._challenger, []
        try:
            if challenger is not None:
                self._take_answers(challenger, trials)
            else:
                self._archive.record(trials, is_test=False)
                self._step += 1
                self._evolve(trials)
            self._challenger = self._next_challenger()
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"search.evidence.spread does not hold: {error}") from error

    def _take_answers(self, challenger: int, trials: Sequence[Trial]) -> None:
        before = self._met(challenger, self._archive.test_answers())
        self._archive.record(trials, is_test=True)
        if self._met(challenger, self._archive.test_answers()) == before:
            self._stale.add(challenger)

    def _evolve(self, trials: Sequence[Trial]) -> None:
        """Drop, keep and promote, by fitness alone."""
        for trial in trials:
            self._note_failures(trial)
        worth = self._archive.worth(self._needed)
        fitness = self._fitness(worth)
        for each in list(self._tries):
            self._tries[each] += 1
            if self._archive.seen(each):
                self._credit(each, fitness)
                del self._tries[each]
                self._members.append(each)
            elif self._tries[each] >= _TRIES:
                del self._tries[each]
        self._members = self._survivors(self._members, fitness)
        self._failures = {
            each: found for each, found in self._failures.items() if each in self._members
        }
        best = self._members[0]
        if self.settings.evidence is None:
            self._believe(fitness)
            return
        if self._archive.seen(best) >= SEEN:
            self._promote(best, worth, fitness)

    def _promote(self, best: int, worth: Worth, fitness: Array) -> None:
        """Let the fittest be tested if it is believed to be better than the last one that was."""
        last = self._promotions.promoted[-1]
        if fitness[best] - fitness[last] > AHEAD * worth.deviation(best, last):
            self._promotions.promote(best)

    def _believe(self, fitness: Array) -> None:
        """Without evidence: the fittest that is known well enough is the incumbent."""
        known = [each for each in self._members if self._archive.seen(each) >= SEEN]
        incumbent = self._promotions.incumbent
        best = max([incumbent, *known], key=lambda each: (fitness[each], -each))
        self._promotions.incumbent = best

    def _credit(self, child: int, fitness: Array) -> None:
        candidate = self._archive.candidates[child]
        rivals = candidate.parents or self._members[:1]
        helped = bool(fitness[child] > max(fitness[each] for each in rivals))
        self._breeder.choice.credit(candidate.origin, helped=helped)

    def _survivors(self, pool: Sequence[int], fitness: Array) -> list[int]:
        """Those that stay, the fittest first, then by fronts."""
        ordered = sorted(pool, key=lambda each: (-fitness[each], each))
        leader = ordered[0]
        answers = self._archive.fitness_answers()
        ranks, lonely = self._fronts(ordered, fitness)
        stay = []
        for each in ordered:
            if each != leader and (ranks[each] > 0 or not self.settings.objectives):
                shift = self._worth(each) - self._worth(leader)
                test = paired_test(
                    answers.get(each, ()), answers.get(leader, ()), self._terms, shift=shift
                )
                if test.decision == "reject":
                    continue
            stay.append(each)
        stay.sort(key=lambda each: (each != leader, ranks[each], -lonely[each]))
        return stay[: self.settings.population]

    def _fronts(
        self, pool: Sequence[int], fitness: Array
    ) -> tuple[Mapping[int, int], Mapping[int, float]]:
        """The front of each candidate, and how lonely it is there; without objectives all alike."""
        if not self.settings.objectives:
            return dict.fromkeys(pool, 0), dict.fromkeys(pool, 0.0)
        columns, reward = [fitness], 0
        for name in self.settings.objectives:
            if name == PROMPT_LENGTH:
                columns.append(-np.array([self._length(each) for each in range(len(fitness))]))
            else:
                reward += 1
                columns.append(self._archive.worth(pool, reward).mean)
        points = np.stack(columns, axis=1)[list(pool)]
        ranks = front_ranks(points)
        lonely = np.zeros(len(pool))
        for rank in set(ranks.tolist()):
            inside = ranks == rank
            lonely[inside] = crowding(points[inside])
        return (
            dict(zip(pool, ranks.tolist(), strict=True)),
            dict(zip(pool, lonely.tolist(), strict=True)),
        )

    def _next_challenger(self) -> int | None:
        """The fittest promoted candidate whose test can go on, when it is time for a test."""
        if self.settings.evidence is None:
            return None
        answers = self._archive.test_answers()
        worth = {each: self._worth(each) for each in self._promotions.promoted}
        before = self._promotions.incumbent
        waiting = self._promotions.update(answers, worth)
        if self._promotions.incumbent != before:
            self._stale.clear()
        calls = self._archive.calls
        if calls["test"] >= calls["fitness"] and self._barren < PATIENCE:
            return None
        waiting = [
            each
            for each in waiting
            if each not in self._stale and self._division.tests(self._met(each, answers)) != ()
        ]
        if len(waiting) < 2:
            return waiting[0] if waiting else None
        fitness = self._fitness(self._archive.worth(self._needed))
        return max(waiting, key=lambda each: (fitness[each], -each))

    def _met(self, challenger: int, answers: Answers) -> set[int]:
        """Test queries that a challenger and the incumbent have met together."""
        blocks = {each.block for each in answers.get(self._promotions.incumbent, ())}
        return {each.query for each in answers.get(challenger, ()) if each.block in blocks}

    def _fitness(self, worth: Worth) -> Array:
        """[C] what candidates are worth, less the penalty for length."""
        lengths = [self._worth(each) for each in range(len(worth.mean))]
        fitness: Array = worth.mean + np.array(lengths)
        return fitness

    @property
    def is_testing(self) -> bool:
        """Whether the next step, or the one that was asked for, is a test."""
        return self._challenger is not None

    @property
    def _needed(self) -> set[int]:
        """Candidates whose fitness decides something."""
        promoted = self._promotions.promoted
        return {*self._members, *self._tries, *promoted, self._promotions.incumbent}

    def _worth(self, candidate: int) -> float:
        penalty = self.settings.length_penalty
        return -penalty * self._length(candidate) if penalty else 0.0

    def _length(self, candidate: int) -> float:
        if candidate not in self._lengths:
            text = self._archive.text(candidate)
            by_token = self.settings.length_unit == "token"
            self._lengths[candidate] = float(self._ruler.tokens(text) if by_token else len(text))
        return self._lengths[candidate]

    def _note_failures(self, trial: Trial) -> None:
        """Keep a candidate's worst completions for whoever reflects on them."""
        if "reflect" not in self.settings.operator_names:
            return
        found = list(self._failures.get(trial.candidate.id, ()))
        outputs = [c.text for group in trial.groups for c in group.completions]
        columns = [values for values in trial.notes.values() if len(values) == len(outputs)]
        for place, score in enumerate(trial.rewards.flatten().tolist()):
            if score == score:
                notes = [column[place] for column in columns]
                said = tuple(note[:_SHOWN] for note in notes if isinstance(note, str) and note)
                found.append(Failure(outputs[place][:_SHOWN], score, said))
        found.sort(key=lambda each: each.score)
        self._failures[trial.candidate.id] = found[:_FAILURES]

    @property
    def incumbent(self) -> Candidate:
        """The text shown to be best; without evidence, the fittest."""
        return self._archive.candidates[self._promotions.incumbent]

    @property
    def is_over(self) -> bool:
        """Whether no new text was found for ten steps, and nothing is left to test."""
        return self._barren >= PATIENCE and self._challenger is None

    @property
    def num_next(self) -> int:
        """The population, or the pair of a test; new texts may come beside them."""
        return 2 if self._challenger is not None else len(self._members) + len(self._tries)

    @property
    def metrics(self) -> Mapping[str, float]:
        """Size of the population, what was promoted, written and refused."""
        refused = {f"refused_{reason}": n for reason, n in self._breeder.refused.items()}
        counts = {
            "population": len(self._members),
            "promoted": len(self._promotions.promoted) - 1,
            "written": self._breeder.written,
            "test_calls": self._archive.calls["test"],
            **refused,
        }
        return {name: float(count) for name, count in counts.items()}

    def state(self) -> LearnerState:
        """All that was tried, and where evolution stands."""
        archive = self._archive.state()
        plain = {
            "texts": list(self._given),
            "library": self._breeder.library_digest,
            "archive": dict(archive.plain),
            "breeder": self._breeder.state_dict(),
            "promotions": self._promotions.state_dict(),
            "members": list(self._members),
            "tries": [list(each) for each in self._tries.items()],
            "failures": [
                [each, [[f.output, f.score, list(f.notes)] for f in found]]
                for each, found in self._failures.items()
            ],
            "step": self._step,
            "barren": self._barren,
            "stale": sorted(self._stale),
            "challenger": self._challenger,
        }
        tensors = {f"archive/{name}": tensor for name, tensor in archive.tensors.items()}
        return LearnerState(tensors, plain)

    def restore(self, state: LearnerState) -> None:
        """Go on where `state` was taken; see `Searcher.restore`."""
        plain = state.plain
        if tuple(plain["texts"]) != self._given:
            raise ValueError("it began with other texts")
        if plain["library"] != self._breeder.library_digest:
            raise ValueError("it had other components")
        self._breeder.load_state_dict(plain["breeder"])
        self._archive.restore(LearnerState(named_under(state.tensors, "archive"), plain["archive"]))
        self._promotions.load_state_dict(plain["promotions"])
        self._members = [int(each) for each in plain["members"]]
        self._tries = {int(each): int(tries) for each, tries in plain["tries"]}
        self._failures = {
            int(each): [Failure(output, score, tuple(notes)) for output, score, notes in found]
            for each, found in plain["failures"]
        }
        self._step, self._barren = int(plain["step"]), int(plain["barren"])
        self._stale = {int(each) for each in plain["stale"]}
        challenger = plain["challenger"]
        self._challenger = None if challenger is None else int(challenger)
        self._asked, self._wanted, self._lengths = [], None, {}


def given_texts(settings: EvolutionSettings, given: SearchStart, ruler: Ruler) -> list[str]:
    """The texts that a search begins with, each once, that of the prompt first.

    Args:
        settings: settings of the search.
        given: where it starts.
        ruler: what measures texts.

    Raises:
        InputError: one is longer than the search may try.
    """
    texts = list(dict.fromkeys([given.prompt.init_text, *settings.texts]))
    for place, text in enumerate(texts):
        tokens = ruler.tokens(text)
        if tokens > settings.max_length:
            where = f"search.texts.{place - 1}" if place else "prompt.text"
            raise InputError(
                f"{where} has {tokens} tokens, and search.max_length is "
                f"{settings.max_length}, so nothing could be made of it; raise the latter"
            )
    return texts


def admission_of(
    settings: EvolutionSettings, given: SearchStart, ruler: Ruler, own: Sequence[str]
) -> Admission:
    """What says which texts a search may try.

    Args:
        settings: settings of the search.
        given: where it starts, with the queries that must not be copied.
        ruler: what measures texts.
        own: texts of the user's, whose quotes are no reason to refuse.
    """
    sources = [*sources_of(given.queries), rewriting.SYSTEM, *rewriting.OWN_WORDS]
    return Admission(Copies(sources, own), ruler.tokens, settings.max_length, ruler.control_tokens)


def division_of(settings: EvolutionSettings, given: SearchStart) -> Division:
    """The training queries by what they are for; without evidence none is set apart.

    Args:
        settings: settings of the search.
        given: where it starts.

    Raises:
        InputError: there are too few queries.
    """
    return Division.of(
        given, (settings.test_share or 0.5) if settings.evidence is not None else 0.0
    )
