"""Near-duplicates between two splits, against every pair compared one by one."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from rlprompt.data.near_duplicates import find_near_duplicates


def near(one: str, other: str) -> bool:
    a, b = set(one.split()), set(other.split())
    return 10 * len(a & b) > 8 * len(a | b)


def test_equals_the_comparison_of_all_pairs() -> None:
    draw = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30)]

    def text() -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(1, 25)))

    others = [text() for _ in range(300)]
    texts = [text() for _ in range(60)]
    for other in others[:80]:
        words = other.split()
        words[draw.randrange(len(words))] = "new"
        texts.append(" ".join(words))
    found = find_near_duplicates(texts, others)
    assert found.is_complete
    expected = [i for i, one in enumerate(texts) if any(near(one, other) for other in others)]
    assert [one for one, _ in found.pairs] == expected
    assert 10 < len(expected) < len(texts)
    assert all(near(texts[one], others[other]) for one, other in found.pairs)


@pytest.mark.parametrize(
    ("one", "other", "is_near"),
    [
        ("how do i boil an egg", "how do i boil an egg please", True),
        ("an egg how do i boil", "how do i boil an egg", True),
        ("a b c d", "a b c d e", False),
        ("a b c d e", "a b c d e f", True),
        (
            "what is the difference between a frog and a toad",
            "what is the difference between a violin and a viola",
            False,
        ),
        ("what is 3 + 4", "what is 3 * 4", False),
        (
            "\u4eca\u65e5\u306f\u3068\u3066\u3082\u6691\u3044\u65e5\u3067\u3059\u306d",
            "\u4eca\u65e5\u306f\u3068\u3066\u3082\u6691\u3044\u65e5\u3067\u3059\u3088\u306d",
            True,
        ),
        ("yes", "no", False),
        ("???", "???", True),
    ],
    ids=[f"pair{i}" for i in range(9)],
)
def test_what_counts_as_nearly_the_same(one: str, other: str, is_near: bool) -> None:
    assert bool(find_near_duplicates([one], [other]).pairs) == is_near
    assert bool(find_near_duplicates([other], [one]).pairs) == is_near


def test_without_texts_there_is_nothing() -> None:
    assert find_near_duplicates([], ["a"]).pairs == find_near_duplicates(["a"], []).pairs == ()


def test_texts_of_one_template_end_at_the_bound_and_say_so() -> None:
    texts = [f"what is number {i} plus number {j} here" for i in range(40) for j in range(40)]
    found = find_near_duplicates(texts, ["what is it plus that here number"], max_comparisons=7)
    assert not found.is_complete or found.pairs == ()
    numbers = [" ".join(f"{(i * k) % 101}" for k in range(1, 12)) for i in range(101)]
    assert not find_near_duplicates(numbers, numbers[::-1], max_comparisons=3).is_complete


def test_a_hundred_thousand_queries_take_seconds() -> None:
    draw = random.Random(1)
    vocabulary = [f"w{rank}" for rank in range(5_000)]
    often = list(itertools.accumulate(1 / (rank + 1) for rank in range(5_000)))
    texts = [" ".join(draw.choices(vocabulary, cum_weights=often, k=12)) for _ in range(100_000)]
    start = time.process_time()
    found = find_near_duplicates(texts[:1_000], texts[1_000:])
    assert time.process_time() - start < 15
    assert found.is_complete
