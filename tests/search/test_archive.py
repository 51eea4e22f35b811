"""The archive: fitness and tests apart, and estimates that do not grow with all that was tried."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rlprompt.runs.learner import LearnerState
from rlprompt.search.archive import Archive
from rlprompt.search.fitness import effects
from tests.fixtures.searches import trial


def filled(window: int = 500) -> Archive:
    archive = Archive(window=window)
    for number in range(12):
        archive.add(f"Text {number}.", (number // 2,) if number else (), "swap")
    for step in range(6):
        pair = [archive.candidates[step], archive.candidates[2 * step]][: 1 + bool(step)]
        rows = [[[0.1 * each.id], [0.3 - 0.01 * step]] for each in pair]
        told = [trial(each, row) for each, row in zip(pair, rows, strict=True)]
        archive.record(told, is_test=step % 3 == 2)
    return archive


def test_tests_are_not_in_what_fitness_reads() -> None:
    archive = filled()
    fitness, tests = archive.fitness_answers(), archive.test_answers()
    assert set(fitness) == {0, 1, 2, 3, 6, 4, 8} and set(tests) == {2, 4, 5, 10}
    assert archive.calls == {"fitness": 14, "test": 8}
    assert archive.seen(5) == 0 and archive.seen(3) == 2
    blocks = {a.block for each in fitness.values() for a in each}
    assert not blocks & {a.block for each in tests.values() for a in each}


def test_estimates_look_at_what_is_needed_and_at_the_last() -> None:
    whole, part = filled(), filled(window=3)
    everything = whole.worth(())
    rows = [(c, a.block, a.score) for c, each in whole.fitness_answers().items() for a in each]
    parents = [each.parents for each in whole.candidates]
    who, where, what = ([row[column] for row in rows] for column in range(3))
    assert np.allclose(everything.mean, effects(who, where, what, parents).mean)
    some = part.worth({0, 2})
    assert np.isfinite(some.mean).tolist() == [c in (0, 2, 9, 10, 11) for c in range(12)]
    assert some.deviation(0, 2) > 0


def test_a_text_is_known_whatever_its_white_space() -> None:
    archive = filled()
    assert archive.knows("Text  3.\n") and not archive.knows("text 3.")


def test_it_comes_back_from_its_state() -> None:
    archive = filled()
    state = archive.state()
    again = Archive()
    again.restore(LearnerState(state.tensors, json.loads(json.dumps(state.plain))))
    assert again.state().plain == state.plain
    assert torch.equal(again.state().tensors["scores"], state.tensors["scores"])
    assert again.seen(3) == archive.seen(3) and again.knows("Text 3.")
    with pytest.raises(ValueError, match="other objectives"):
        Archive(["safety"]).restore(state)
