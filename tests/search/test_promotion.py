"""What replaces the incumbent: levels that sum to alpha, and how often a search of equals errs."""

from __future__ import annotations

import math
import random

import pytest

from rlprompt.certify.acceptance import PairedTest
from rlprompt.search.promotion import Answer, Promotions, Terms, pair_level, paired_test

TERMS = Terms(alpha=0.2, spread=None, min_effect=0.1, miss_rate=0.1)


def test_levels_sum_to_alpha_over_all_pairs_that_there_can_be() -> None:
    def of(k: int) -> float:
        pairs = [(k, j) for j in range(k)] + [(j, k) for j in range(1, k)]
        return sum(pair_level(0.05, *pair) for pair in pairs)

    for k in (1, 2, 7):
        assert of(k) == pytest.approx(0.05 / (k * (k + 1)))
    assert sum(of(k) for k in range(1, 400)) == pytest.approx(0.05 * (1 - 1 / 400))


def test_a_pair_is_tested_on_the_blocks_that_both_have_in_their_order() -> None:
    one = [Answer(block, block % 7, 1.0) for block in (0, 2, 3, 9)]
    other = [Answer(block, block % 7, 0.25) for block in (1, 2, 3, 9)]
    found = paired_test(one, other, TERMS)
    expected = PairedTest(0.2, None, 0.1, 0.1)
    expected.update([0.75, 0.75, 0.75], [2, 3, 2])
    assert found == expected and found.num_queries == 2


def test_a_shift_is_part_of_the_difference_and_of_its_range() -> None:
    terms = TERMS._replace(spread=1.0)
    one, other = [Answer(i, i, 1.0) for i in range(3)], [Answer(i, i, 0.0) for i in range(3)]
    assert paired_test(one, other, terms, shift=0.5).mean == pytest.approx(1.5)
    assert paired_test(one, other, terms, shift=0.5).spread == 1.5
    with pytest.raises(ValueError, match="beyond the spread of 1"):
        paired_test([Answer(0, 0, 2.5)], [Answer(0, 0, 0.0)], terms, shift=5.0)


def race(means: list[float], seed: int, looks: int = 5) -> Promotions:
    """Promoted one after the other, thirty queries to a look; all meet the same queries."""
    draw = random.Random(seed)
    promotions = Promotions(TERMS)
    answers: dict[int, list[Answer]] = {0: []}
    block = 0
    for candidate in range(1, len(means)):
        promotions.promote(candidate)
        answers[candidate] = []
        for look in range(looks):
            if candidate not in promotions.update(answers, {}):
                break
            for query in range(30 * look, 30 * (look + 1)):
                for each in (promotions.incumbent, candidate):
                    score = float(draw.random() < means[each])
                    answers[each].append(Answer(block, query, score))
                block += 1
        promotions.update(answers, {})
    return promotions


def test_among_equals_a_replacement_is_as_rare_as_alpha_says() -> None:
    wrong = sum(race([0.5] * 6, seed).incumbent != 0 for seed in range(60))
    assert wrong / 60 <= 0.2 + 2 * math.sqrt(0.2 * 0.8 / 60)


def test_what_is_better_replaces_the_incumbent_and_can_be_replaced() -> None:
    found = [race([0.2, 0.2, 0.6, 0.2, 0.95], seed).incumbent for seed in range(10)]
    assert found.count(4) >= 8 and set(found) <= {0, 2, 4}


def test_promoting_twice_is_promoting_once() -> None:
    promotions = Promotions(TERMS)
    promotions.promote(3)
    promotions.promote(3)
    promotions.promote(0)
    assert promotions.promoted == (0, 3)


def test_it_goes_on_where_its_state_was_taken() -> None:
    promotions = race([0.2, 0.9, 0.1], 1)
    again = Promotions(TERMS)
    again.load_state_dict(promotions.state_dict())
    assert again.state_dict() == promotions.state_dict() and again.incumbent == 1
