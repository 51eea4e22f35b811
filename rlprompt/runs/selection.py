"""Which prompt a run keeps where a later one must be shown to be better (`evaluation.keep`).

The tests are those of `rlprompt.certify.succession`; here they meet a run's progress, which carries
them through checkpoints, and are put in words for the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlprompt.certify.comparison import Scores
from rlprompt.certify.succession import (
    Challenge,
    Member,
    MemberChallenge,
    Succession,
    compete,
    fewest_queries,
    planned_evaluations,
)
from rlprompt.errors import InputError
from rlprompt.evaluation.heldout import AcceptedSettings, EvaluationSettings
from rlprompt.runs.state import PlainScores, Progress


def begin_succession(
    progress: Progress, evaluation: EvaluationSettings, steps: int, num_queries: int
) -> None:
    """Announce the evaluations of a run whose later prompts must be shown to be better.

    Nothing happens where the highest mean is kept, or where a run goes on.

    Args:
        progress: counters of the run, which take the tests up.
        evaluation: settings of how prompts are evaluated and kept.
        steps: number of steps of the run.
        num_queries: number of validation queries.

    Raises:
        InputError: so few queries are held out that nothing could be accepted.
    """
    accepted = evaluation.acceptance
    if accepted is None or progress.succession:
        return
    planned = planned_evaluations(steps, evaluation.every)
    succession = Succession.announced(planned, accepted.alpha, accepted.spread, accepted.against)
    needed = fewest_queries(succession.acceptance.next_level, accepted.spread)
    if needed > num_queries:
        raise InputError(
            f"evaluation.keep is accepted, but {num_queries} validation queries can never show "
            f"that a prompt is better: at alpha {accepted.alpha:g} over {planned} evaluations it "
            f"takes {needed}, were it better on every one; hold out more, evaluate less often "
            "(evaluation.every), or remove keep"
        )
    progress.succession = succession.state_dict()


def challenge_kept(progress: Progress, scores: PlainScores) -> Challenge | None:
    """Test the present prompt; None = it is the one that the run begins with.

    Args:
        progress: counters of the run, with the first prompt's values as `start` and the kept one's
            as `learned`.
        scores: what each completion of the present prompt got.

    Raises:
        InputError: no completion of the first prompt could be scored, or two values of a query
            differ by more than `evaluation.evidence.spread`.
    """
    if progress.best_reward is None:
        if not _is_known(scores):
            raise InputError(
                "evaluation.keep is accepted, but no validation completion of the prompt that the "
                "run begins with could be scored, so nothing can be compared with it; choose "
                "another evaluation.select_by, or remove keep"
            )
        return None
    succession = Succession.from_state(progress.succession)
    opponent = progress.scores["learned" if succession.against == "kept" else "start"]
    try:
        made = succession.challenge(progress.step, _table(scores), _table(opponent))
    except ValueError as error:
        raise _beyond_spread(error) from error
    progress.succession = succession.state_dict()
    return made


def selection_sentence(progress: Progress) -> str:
    """How the kept prompt was chosen, in words; empty where the highest mean was kept.

    Args:
        progress: counters of a run that has evaluated its first prompt.
    """
    if not progress.succession or progress.best_reward is None:
        return progress.chosen
    succession = Succession.from_state(progress.succession)
    at = f"at {100 * succession.acceptance.alpha:.3g}% over the run"
    won = [each for each in succession.challenges if each.accepted]
    if won:
        kept = next(each for each in won if each.step == succession.kept)
        how = "accepted"
        if succession.against == "start" and len(won) > 1:
            how = f"the highest mean of {len(won)} that were accepted"
        against = _prompt_of(kept.against)
        told = f"The prompt of step {kept.step} was kept: {how} against {against}, {at}."
    else:
        told = (
            "No later prompt was shown to be better than the one it began with, so that was kept "
            f"({at}{_highest(succession.challenges)})."
        )
    return f"{told} {progress.chosen}".rstrip()


def chosen_member(
    kept: Mapping[str, Progress], accepted: AcceptedSettings, num_members: int
) -> tuple[str, list[MemberChallenge]]:
    """The member whose prompt is the population's, and the tests that say so.

    Args:
        kept: counters of every member that has come to an end by name, in the recipe's order.
        accepted: settings of the whole population.
        num_members: number of members, those that failed included.

    Raises:
        InputError: two values of a query differ by more than `evaluation.evidence.spread`.
    """
    members = [
        Member(
            name,
            _table(progress.scores["learned"]),
            Succession.from_state(progress.succession).weight,
        )
        for name, progress in kept.items()
    ]
    try:
        challenges = compete(members, accepted.alpha, accepted.spread, num_members)
    except ValueError as error:
        raise _beyond_spread(error) from error
    won = [each.member for each in challenges if each.accepted]
    return (won[-1] if won else members[0].name), challenges


def member_sentence(
    name: str, challenges: Sequence[MemberChallenge], accepted: AcceptedSettings
) -> str:
    """How the member was chosen, in words.

    Args:
        name: name of the member.
        challenges: tests between the members.
        accepted: settings of the whole population.
    """
    at = f"at {100 * accepted.alpha:.3g}% over the population"
    if not challenges:
        return f"Member {name} was chosen by its mean; the tests of all members hold {at}."
    won = [each for each in challenges if each.accepted]
    if won:
        return (
            f"Member {won[-1].member} was chosen: its prompt was accepted against that of member "
            f"{won[-1].against}, {at}."
        )
    return (
        f"No later member was shown to be better than the first, {challenges[0].against}, which "
        f"was chosen ({at})."
    )


def _prompt_of(step: int) -> str:
    return f"that of step {step}" if step else "the one it began with"


def _highest(challenges: Sequence[Challenge]) -> str:
    """The highest mean that was not accepted, as the end of a clause; empty where none is above."""
    known = [each for each in challenges if each.difference is not None]
    if not known:
        return ""
    best = max(known, key=lambda each: each.difference or 0.0)
    if not best.difference or best.difference <= 0.0:
        return ""
    return f"; the highest mean was that of step {best.step}, {best.difference:+.2g}"


def _beyond_spread(error: ValueError) -> InputError:
    return InputError(
        f"evaluation.evidence.spread does not hold: {error}, in a run of its own, or leave spread "
        "out"
    )


def _is_known(scores: PlainScores) -> bool:
    return any(value is not None for row in scores for value in row)


def _table(scores: PlainScores) -> Scores:
    return np.array([[math.nan if value is None else value for value in row] for row in scores])
