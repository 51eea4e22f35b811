"""The recipe of a preference model: what is learned, from what, and what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from rlprompt.data.base import DataSettings
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.model.base import ModelSettings
from rlprompt.recipe.secrets import secret_in
from rlprompt.recipe.yaml_file import apply_override, explain, read_tree
from rlprompt.rewards.base import RewardSettings
from rlprompt.rewards.models.conversation import PAIR, Keep
from rlprompt.settings import Name, Settings


class StartSettings(Settings):
    """The model that learning starts from: an encoder, a language model, or a classifier."""

    path: str
    """A folder (relative to the recipe's folder, then to the working directory), or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto = CUDA when there is a GPU."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""
    template: str | None = None
    """How a conversation is written: null = the model's own chat template; `plain`; the path of a
    .jinja file; or Jinja. It is stored with the trained model as its chat template."""
    max_tokens: PositiveInt = 512
    """Longest conversation; its longest text is shortened to fit."""
    keep: Keep = "start"
    """Which end of a text that is too long stays."""

    @model_validator(mode="after")
    def _check(self) -> StartSettings:
        if self.template == PAIR:
            raise ValueError(
                "template: pair is for scoring only, because TRL's trainer knows no segments; give "
                "a Jinja template with the model's separator"
            )
        return self


class PairData(Settings):
    """Preferences as they are published: a chosen and a rejected answer per row."""

    type: Literal["pairs"] = "pairs"
    """Kind of data."""
    path: str
    """A .jsonl, .json, .csv or .parquet file, or a hub dataset `owner/name`."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    query_column: str | None = "query"
    """Column with the query (text or messages); null when chosen and rejected are whole
    conversations."""
    chosen_column: str = "chosen"
    """Column with the better answer (text or messages)."""
    rejected_column: str = "rejected"
    """Column with the worse one."""


class LabelData(Settings):
    """Single answers that people have judged by a number."""

    type: Literal["labels"] = "labels"
    """Kind of data."""
    path: str
    """A .jsonl, .json, .csv or .parquet file, or a hub dataset `owner/name`."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    query_column: str = "query"
    """Column with the query."""
    completion_column: str = "completion"
    """Column with the answer."""
    score_column: str = "score"
    """Column with the judgement, a number; higher is better."""
    good_above: float = 0.5
    """An answer is good when its score lies above this: what sensitivity and specificity are of."""
    min_gap: float = Field(default=0.25, gt=0)
    """Least difference of two scores that makes a preference."""
    pairing: Literal["query", "any"] = "any"
    """Pair answers to one `query` only, or `any` answers: see `pairs`."""
    pairs_per_row: PositiveInt = 4
    """For pairing `any`: pairs that each answer begins."""


class SampledData(Settings):
    """Completions of a base, judged by rewards: a preference model of a rule."""

    type: Literal["sampled"] = "sampled"
    """Kind of data."""
    queries: DataSettings
    """What is asked; the division into train and held-out is ours, by query."""
    base: ModelSettings = ModelSettings()
    """What answers."""
    system: str | None = None
    """System message for it; null = none."""
    sampling: SamplingSettings = SamplingSettings()
    """How completions are drawn."""
    completions_per_query: int = Field(default=4, ge=2)
    """Completions drawn per query."""
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    """Whose total is the judgement."""
    good_above: float = 0.5
    """A completion is good when its total lies above this."""
    min_gap: float = Field(default=0.1, gt=0)
    """Least difference of two totals that makes a preference."""
    max_pairs: PositiveInt = 20_000
    """At most this many pairs."""

    @field_validator("queries")
    @classmethod
    def _starts_no_prompt(cls, queries: DataSettings) -> DataSettings:
        if queries.system == "init":
            raise ValueError(
                "system: init starts a prompt, and none is trained here; write drop, and the text "
                "as data.system"
            )
        return queries

    @model_validator(mode="after")
    def _settings_have_effect(self) -> SampledData:
        if self.queries.too_long != "refuse":
            raise ValueError(
                "queries.too_long has no effect here, where a query that is too long is always "
                "refused; remove it"
            )
        return self


AnyData = Annotated[PairData | LabelData | SampledData, Field(discriminator="type")]


class LearningSettings(Settings):
    """How TRL's RewardTrainer learns."""

    epochs: float = Field(default=2.0, gt=0)
    """Passes over the training pairs."""
    batch_size: PositiveInt = 16
    """Pairs per update."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak of a linear schedule with warm-up."""
    warmup_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the updates that warm up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's."""
    center_coef: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of both scores, which keeps scores around zero (Eisenstein et al.
    2023, arXiv 2312.09244)."""
    bf16: bool = False
    """Compute in bfloat16 where the hardware can; weights stay in float32."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null = torch's choice."""


class TestSettings(Settings):
    """What the model is tested on."""

    heldout: float = Field(default=0.25, gt=0, lt=1)
    """Share of the queries that are only tested on."""
    calibration: float = Field(default=0.1, gt=0, lt=1)
    """Share of the queries on which threshold and temperature are fitted."""

    @model_validator(mode="after")
    def _check(self) -> TestSettings:
        if self.heldout + self.calibration > 0.9:
            raise ValueError("heldout and calibration leave less than a tenth to learn from")
        return self


class RuleSettings(Settings):
    """A reward that the model is compared with on the same held-out answers."""

    reward: RewardSettings
    """The rule."""
    threshold: float = 0.5
    """It calls an answer good when its value is at least this."""


class RewardRecipe(Settings):
    """One preference model in full."""

    name: Name
    """What the model is called."""
    description: str = ""
    """What a high score means, and where the judgements come from; stands in the model's card."""
    model: StartSettings
    """What learning starts from."""
    data: AnyData
    """The preferences."""
    learning: LearningSettings = LearningSettings()
    """How it learns."""
    test: TestSettings = TestSettings()
    """What is held out."""
    compare: tuple[RuleSettings, ...] = ()
    """Rules to compare with, on data with judged answers."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Of everything drawn at random."""

    @model_validator(mode="after")
    def _holds_no_secret(self) -> RewardRecipe:
        found = secret_in(self.model_dump(mode="json"))
        if found is not None:
            raise ValueError(f"'{found[0]}' {found[1]}")
        return self

    @model_validator(mode="after")
    def _check(self) -> RewardRecipe:
        if self.compare and self.data.type == "pairs":
            raise ValueError(
                "compare has no effect on data of type pairs, which has no judged answers; remove "
                "it"
            )
        return self


def load_reward_recipe(path: Path, overrides: Sequence[str] = ()) -> RewardRecipe:
    """Read the recipe of a preference model.

    Raises:
        InputError: the file is not there or not YAML, or a key or value is wrong; the sentence
            names file and YAML path.
    """
    tree: dict[str, Any] = read_tree(path)
    for override in overrides:
        apply_override(tree, override)
    try:
        return RewardRecipe.model_validate(tree)
    except ValidationError as error:
        _, sentence = explain(error, RewardRecipe.model_json_schema())
        raise InputError(f"{path}: {sentence}") from error
