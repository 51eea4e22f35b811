"""What a suite is, as YAML: situations, measures, and what they are made on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rlprompt.data.base import DataSettings
from rlprompt.data.situations import AnySituation, require_labels
from rlprompt.errors import InputError, choices
from rlprompt.reading import yaml_text
from rlprompt.reading.files import read_text, reason
from rlprompt.recipe.yaml_file import explain
from rlprompt.rewards.base import RewardSettings
from rlprompt.settings import Name, OneOf, Settings
from rlprompt.suites.attack import Jailbreaks, Suffix
from rlprompt.suites.bench import MeasureSettings
from rlprompt.suites.measures import Answers, Choices, Exact, Leakage, Neutral, Reasoning, Safety
from rlprompt.suites.standard import Standard

MEASURES: dict[str, type[MeasureSettings]] = {
    "neutral": Neutral,
    "choices": Choices,
    "exact": Exact,
    "reasoning": Reasoning,
    "safety": Safety,
    "answers": Answers,
    "leakage": Leakage,
    "jailbreaks": Jailbreaks,
    "suffix": Suffix,
    "standard": Standard,
}
"""By `type`."""

SUITES = ("default", "quick")
"""Suites that ship, by name."""
_SHIPPED = Path(__file__).parent / "data"
"""Where they lie, in a checkout and in a wheel."""

_Read = TypeVar("_Read", bound=Settings)


class SuiteSettings(Settings):
    """An evaluation suite."""

    name: Name
    """What the suite is called in results."""
    seed: int = Field(default=0, ge=0)
    """Seed of all draws, and of what situations draw."""
    split: Literal["auto", "test", "validation"] = "auto"
    """Queries of the recipe that are asked; auto = the test queries where there are any."""
    queries: int = Field(default=24, ge=2)
    """Queries that are asked in every situation, the first ones of the split."""
    completions_per_query: int = Field(default=1, ge=1, le=4096)
    """Answers of each."""
    max_tokens: int | None = Field(default=64, ge=1)
    """Longest answer to a query; null, or where the recipe says less, as in the recipe."""
    slices: str | None = Field(default=None, min_length=1)
    """Column of the data by whose values the rewards are told apart too; null = none."""
    data: DataSettings | None = None
    """Queries in place of the recipe's, all of which may be asked; paths are relative to the
    suite's folder."""
    rewards: list[RewardSettings] | None = Field(default=None, min_length=1)
    """Rewards in place of the recipe's; paths are relative to the suite's folder."""
    situations: list[AnySituation] = Field(default_factory=list)
    """Situations beside the plain one."""
    measures: list[Annotated[MeasureSettings, OneOf(dict(MEASURES), is_extensible=False)]] = Field(
        default_factory=list
    )
    """Side effects and attacks that are measured."""

    @field_validator("situations", "measures")
    @classmethod
    def _labels_differ(cls, value: list[Any]) -> list[Any]:
        require_labels([each.label for each in value])
        return value

    @model_validator(mode="after")
    def _split_has_effect(self) -> Self:
        if self.data is not None and self.split != "auto":
            raise ValueError(
                "split is for the recipe's queries and has no effect beside data; remove one"
            )
        return self


def load_suite(name: str) -> SuiteSettings:
    """A suite that ships, or one in a file; paths in it become absolute or relative to here.

    Args:
        name: `default`, `quick`, or the path of a YAML file.

    Raises:
        InputError: there is no such suite, or a key or value in it is wrong.
    """
    path = suite_path(name)
    suite = read_settings(path, SuiteSettings, "suite")
    measures = [
        each.model_copy(update={"path": str(path.parent / Path(each.path).expanduser())})
        if isinstance(each, Standard)
        else each
        for each in suite.measures
    ]
    return suite.model_copy(update={"measures": measures})


def suite_path(name: str) -> Path:
    """Where a suite is.

    Args:
        name: its name or path.

    Raises:
        InputError: there is none.
    """
    if name in SUITES:
        return _SHIPPED / f"suite_{name}.yaml"
    path = Path(name).expanduser()
    if not path.suffix and not path.exists():
        raise InputError(
            f"there is no suite '{name}'; {choices(name, SUITES)}, or name a YAML file"
        )
    return path


def read_settings(path: Path, kind: type[_Read], what: str) -> _Read:
    """Settings from a YAML file.

    Args:
        path: the file.
        kind: class of the settings.
        what: what the file is, for errors.

    Raises:
        InputError: it is not there, no YAML mapping, or a key or value is wrong; the sentence names
            the YAML path.
    """
    try:
        tree = yaml_text.load(read_text(path))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} '{path}' is not UTF-8 text; save it with that encoding"
        ) from error
    except OSError as error:
        raise InputError(
            f"{what} '{path}' cannot be read ({reason(error)}); check the path"
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{what} '{path}' is not valid YAML: {yaml_text.reason(error)}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{what} '{path}' is not a mapping of keys; see docs/evaluation.md")
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        _, sentence = explain(error, kind.model_json_schema())
        raise InputError(f"{what} '{path}': {sentence}") from error
