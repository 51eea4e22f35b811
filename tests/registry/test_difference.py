"""What two artifacts differ in."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlprompt.artifacts.format import save_artifact
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.registry.difference import difference
from tests.fixtures.prompts import make
from tests.fixtures.runs import tiny_policy


def saved(folder: Path, prompt: Prompt, rate: float = 0.1, **metrics: float) -> Path:
    recipe = {"training": {"optimizer": {"lr": rate}}, "rewards": [{"path": "a"}]}
    save_artifact(folder, tiny_policy(), prompt, name="n", recipe=recipe, metrics=metrics)
    return folder


def test_texts_numbers_and_recipes(tmp_path: Path) -> None:
    one = saved(tmp_path / "1", TextPrompt("Be brief.\nBe kind."), reward=0.5)
    two = saved(tmp_path / "2", TextPrompt("Be brief.\nBe clear."), rate=0.2, reward=0.7)
    found = difference(one, two)
    assert "-Be kind." in found.text and "+Be clear." in found.text
    assert found.metrics == {"reward": (0.5, 0.7)}
    assert found.recipe == {"training.optimizer.lr": (0.1, 0.2)}
    assert found.tensors == ()
    same = difference(one, one)
    assert not (same.text or same.metrics or same.recipe or same.fields)


def test_tensors_by_angle_and_size(tmp_path: Path) -> None:
    policy = tiny_policy()
    first = make("soft", policy)
    second = first.copy()
    second.load_state_dict({name: 2.0 * t for name, t in first.state_dict().items()})
    found = difference(saved(tmp_path / "1", first), saved(tmp_path / "2", second))
    (tensor,) = found.tensors
    assert tensor.cosine == pytest.approx(1.0)
    assert tensor.relative == pytest.approx(1.0)


def test_prompts_of_two_kinds(tmp_path: Path) -> None:
    policy = tiny_policy()
    one = saved(tmp_path / "1", make("soft", policy))
    two = saved(tmp_path / "2", TextPrompt("Be brief."))
    found = difference(one, two)
    assert found.fields["representation"] == ("soft", "text")
    assert [(t.cosine, t.shapes[1]) for t in found.tensors] == [(None, None)]
    (one / "prompt.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="cannot be read"):
        difference(one, two)
