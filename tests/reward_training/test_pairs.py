"""How judged answers become pairs and sides."""

from __future__ import annotations

from rlprompt.reward_training.pairs import (
    Judged,
    divide,
    pairs_across_queries,
    pairs_within_queries,
)


def judged(query: str, answer: str, score: float) -> Judged:
    turns = ({"role": "user", "content": query}, {"role": "assistant", "content": answer})
    return Judged(turns, score)


ROWS = [
    judged(f"question {q}", f"answer {q} {a}", (a * 0.5 + q * 0.01) % 1.2)
    for q in range(200)
    for a in range(3)
]
SCORES = {row.messages[-1]["content"]: row.score for row in ROWS}


def test_a_query_is_on_one_side_and_the_shares_are_about_right() -> None:
    train, calibration, heldout = divide(ROWS, 0.1, 0.3, seed=0)
    queries = [{row.query for row in side} for side in (train, calibration, heldout)]
    assert not queries[0] & queries[1] | queries[0] & queries[2] | queries[1] & queries[2]
    assert len(train) + len(calibration) + len(heldout) == len(ROWS)
    assert 0.2 < len(queries[2]) / 200 < 0.4
    assert 0.04 < len(queries[1]) / 200 < 0.17


def test_sides_depend_on_seed_and_text_alone() -> None:
    forward = divide(ROWS, 0.1, 0.3, seed=0)
    backward = divide([*ROWS[::-1], judged("another", "one", 1.0)], 0.1, 0.3, seed=0)
    for one, other in zip(forward, backward, strict=True):
        assert {r.query for r in one} == {r.query for r in other} - {"another"}
    assert {r.query for r in divide(ROWS, 0.1, 0.3, 1).heldout} != {
        r.query for r in forward.heldout
    }
    spaced = judged("Question  5\n", "x", 0.0)
    assert divide([spaced], 0.1, 0.3, 0).index([spaced]) == [
        any(r.query == "question 5" for r in side) for side in forward
    ].index(True)


def test_pairs_within_queries_are_ordered_and_far_enough_apart() -> None:
    pairs = pairs_within_queries(ROWS, 0.4, 10_000, seed=0)
    assert len(pairs) > 200
    for pair in pairs:
        better, worse = pair.chosen[-1]["content"], pair.rejected[-1]["content"]
        assert SCORES[better] - SCORES[worse] >= 0.4
        assert pair.chosen[:-1] == pair.rejected[:-1]
    assert len(pairs_within_queries(ROWS, 0.4, 50, seed=0)) == 50


def test_pairs_across_queries_use_every_answer() -> None:
    pairs = pairs_across_queries(ROWS, 0.3, 4, seed=0)
    assert len(pairs) == 4 * len(ROWS)
    same = 0
    for pair in pairs:
        better, worse = pair.chosen[-1]["content"], pair.rejected[-1]["content"]
        assert SCORES[better] - SCORES[worse] >= 0.3
        same += pair.chosen[:-1] == pair.rejected[:-1]
    assert 0.3 < same / len(pairs) <= 0.55
    assert pairs == pairs_across_queries(ROWS, 0.3, 4, seed=0)
    assert pairs_across_queries([judged("q", "a", 1.0)], 0.3, 4, seed=0) == []
