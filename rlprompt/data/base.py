"""The data section of a recipe, and the two values its readers pass on: a table and a split.

A dataset is read into a `Table` (rows as they stand, each with its place for error messages),
turned into queries, and divided into a `QuerySplit`: train, validation, test. Validation queries
are called held-out in names (`heldout`): whatever chooses among prompts looks at them. Test queries
are for the one number at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from rlprompt.settings import Settings
from rlprompt.types import Query

DEFAULT_SPLIT = "train"
DEFAULT_HELDOUT = 0.2


class TestSettings(Settings):
    """Test queries in a file of their own."""

    __test__ = False  # not a test of pytest's

    path: str
    """A local `.jsonl`, `.json`, `.csv` or `.parquet` file with the test queries, relative to the
    recipe's folder, with the columns of the dataset."""


class DataSettings(Settings):
    """Where the queries come from, and which are for training, validation and the final test."""

    path: str | None = None
    """A `.jsonl`, `.json`, `.csv` or `.parquet` file, relative to the recipe's folder, or the id
    `owner/name` of a dataset on the Hugging Face hub. Give this or `rows`."""
    name: str | None = None
    """Configuration of a hub dataset that has several."""
    split: str = DEFAULT_SPLIT
    """Split of a hub dataset that is read; it is then divided into train, validation and test."""
    rows: list[Any] | None = None
    """The dataset itself: strings, or mappings with the query column and any others. Give this or
    `path`."""
    query_column: str = "query"
    """Column with the query: a plain string, or a list of messages `{role, content}` that ends
    with the user's turn. All other columns are handed to the rewards by name."""
    heldout: int | float = DEFAULT_HELDOUT
    """Queries held out from training for validation, by which prompts are chosen: a count (integer,
    0 for none) or a share between 0 and 1."""
    heldout_path: str | None = None
    """A separate local file with the validation queries, instead of `heldout`."""
    test: int | float | TestSettings | None = None
    """Queries that nothing is chosen by, for the result at the end: a count (integer, 0 for none),
    a share between 0 and 1, or `{path: FILE}`. Null = what `split_column` marks, else none."""
    split_column: str | None = None
    """Column that says `train`, `validation` or `test` for each row, instead of `heldout` and a
    count or share of `test`. `heldout`, `val`, `valid` and `dev` mean `validation`; no row need be
    `test`."""
    max_queries: int | None = Field(default=None, ge=2)
    """Keep at most this many of the queries in `path` or `rows`, drawn with `shuffle_seed` before
    they are divided; under `split_column` train and validation keep their shares. `heldout_path`,
    a test file and rows marked `test` are kept whole."""
    shuffle_seed: int = 0
    """Decides the order of the queries, hence which are held out or kept."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _heldout_is_count_or_share(cls, value: Any) -> Any:
        return _count_or_share("heldout", value, "a count such as 40 or a share like 0.2")

    @field_validator("test", mode="before")
    @classmethod
    def _test_is_count_share_or_file(cls, value: Any) -> Any:
        if value is None or isinstance(value, TestSettings):
            return value
        if isinstance(value, Mapping):
            # Here, because what a union objects to names all its members.
            if (
                value.keys() != {"path"}
                or not isinstance(value["path"], str)
                or not value["path"].strip()
            ):
                raise ValueError(
                    f"test is {dict(value)!r}; write {{path: FILE}}, a count, or a share like 0.2"
                )
            return value
        return _count_or_share("test", value, "a count, a share like 0.2, or {path: FILE}")

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if (self.path is None) == (self.rows is None):
            found = "neither is" if self.path is None else "both are"
            raise ValueError(f"exactly one of path and rows must be given, {found}; keep one")
        if self.path is not None and not self.path.strip():
            raise ValueError("path is empty; name a file or a hub dataset")
        if not self.query_column:
            raise ValueError("query_column is empty; name the column that holds the query")
        if self.heldout_path is not None and self.split_column is not None:
            raise ValueError(
                "heldout_path and split_column both say what is held out; remove one of them"
            )
        own_split = "heldout_path" if self.heldout_path is not None else "split_column"
        if getattr(self, own_split) is not None and self.heldout != DEFAULT_HELDOUT:
            raise ValueError(f"heldout has no effect beside {own_split}; remove one of them")
        if self.split_column is not None and isinstance(self.test, int | float):
            raise ValueError(
                "test has no effect beside split_column, which marks the test queries; remove one "
                "of them, or name a file as test: {path: FILE}"
            )
        if self.split_column == self.query_column:
            raise ValueError(
                f"split_column and query_column are both '{self.query_column}'; name two columns"
            )
        return self


def _count_or_share(name: str, value: Any, wanted: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; write {wanted}")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} is {value}; write 0 or a positive count, or a share")
    if isinstance(value, float) and not 0.0 < value < 1.0:
        raise ValueError(
            f"{name} is the share {value}; write a share between 0 and 1, or an integer count"
        )
    return value


@dataclass(frozen=True)
class Table:
    """Rows of one source, unchecked but for being mappings with string keys."""

    label: str
    """What error messages call the source, such as `queries.jsonl`."""
    rows: Sequence[dict[str, Any]]
    """Column name to value, in the order of the source."""
    unit: str = "row"
    """What `numbers` counts: `row` or `line`."""
    numbers: Sequence[int] | None = None
    """Number of each row in the source, counted from 1; None when that is its position."""

    def where(self, position: int) -> str:
        """Name the place of the row at `position` (from 0), for an error message."""
        number = position + 1 if self.numbers is None else self.numbers[position]
        return f"{self.label} {self.unit} {number}"


@dataclass(frozen=True)
class QuerySplit:
    """Queries to train on, to choose by and to test on, with no query in two of them.

    Each is in an order drawn with `shuffle_seed`, so that any first k of it are a fair sample.
    """

    train: tuple[Query, ...]
    """At least one."""
    heldout: tuple[Query, ...]
    """The validation queries. Empty only when the recipe says `heldout: 0`."""
    fingerprint: str
    """sha256 (hex) over all splits: messages, columns and order; a checkpoint can compare it."""
    test: tuple[Query, ...] = ()
    """Queries for one look at the end; nothing may be chosen by them. Empty where the data has
    none."""
