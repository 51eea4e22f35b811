"""A preference model in shards over two real processes: the same run as with the model whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlprompt.errors import InputError
from rlprompt.rewards.models.classifier import Classifier, ClassifierSettings
from tests.cli.runs import rlprompt
from tests.distributed.test_ranks import assert_close_runs, recipe_of
from tests.fixtures.classifiers import save_decoder, save_encoder
from tests.fixtures.ranks import run_ranks
from tests.fixtures.tiny import save_tiny


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_two_ranks_with_a_sharded_preference_model_are_one_with_it_whole(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    base = save_tiny(tmp_path / "base")
    if kind == "encoder":
        judge = save_encoder(tmp_path / "judge", template=True)
    else:
        judge = save_decoder(tmp_path / "judge")
    options = {"path": str(judge), "device": "cpu", "dtype": "float32"}
    reward = {"path": "builtin:preference", "timeout": None, "options": options}
    recipe = recipe_of(tmp_path, base, rewards=[reward])
    one, two = tmp_path / "one", tmp_path / "two"
    done = rlprompt("train", recipe, "-o", one)
    assert done.code == 0, done.err
    ended = run_ranks(
        2, tmp_path / "logs", "train", recipe, "-o", two, "rewards.0.options.sharded=true"
    )
    assert ended.codes == [0, 0], ended.logs
    assert_close_runs(one, two)
    told = re.search(
        r"in shards: (\d+) bytes on this rank, (\d+) in all", " ".join(ended.logs[0].split())
    )
    assert told is not None, ended.logs[0]
    assert int(told[1]) == pytest.approx(int(told[2]) / 2, rel=0.02)


def test_shards_need_ranks(tmp_path: Path) -> None:
    judge = save_encoder(tmp_path / "judge", template=True)
    with pytest.raises(InputError, match="sharded has no effect in a process of its own"):
        Classifier.load(ClassifierSettings(path=str(judge), device="cpu", sharded=True))
