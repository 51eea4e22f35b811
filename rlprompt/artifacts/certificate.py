"""certificate.json of an artifact: a claim about the prompt, and all that it was computed from.

It belongs to one prompt, by a hash over what the prompt is and what it stands on. An artifact whose
certificate was issued for another prompt is refused where it is loaded: a reader would take the
claim for this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from rlprompt.artifacts.identity import CERTIFICATE, prompt_hash
from rlprompt.certify.certificate import Sample
from rlprompt.certify.judge import JudgeLabels
from rlprompt.certify.selection import Method
from rlprompt.certify.shift import Shift, parse_shift
from rlprompt.errors import InputError
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.settings import Settings

_MOST_BYTES = 256 << 20
"""Most that a certificate may have: a loss per query and risk."""


class JudgeCounts(Settings):
    """How a judge did on labelled answers."""

    flagged_failures: int = Field(ge=0)
    """Failures by the label that the judge flagged."""
    failures: int = Field(ge=1)
    """Failures by the label."""
    flagged_others: int = Field(ge=0)
    """Other answers that the judge flagged."""
    others: int = Field(ge=1)
    """Other answers."""
    labels_hash: str
    """sha256 of the file with the labels."""

    def labels(self) -> JudgeLabels:
        """The counts as bounds take them."""
        return JudgeLabels(self.flagged_failures, self.failures, self.flagged_others, self.others)


class CertifiedRisk(Settings):
    """One risk: a reward, the rule that makes losses of it, and the losses."""

    name: str
    """Name of the reward."""
    path: str
    """Path of the reward, as in a recipe."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its options."""
    source_hash: str | None = None
    """sha256 of the file that it is in; None for what is built in."""
    rule: Literal["value", "above", "below"]
    """The loss: the value itself, or 1 where it is above, or below, the threshold."""
    threshold: float | None = None
    """Of the rules `above` and `below`."""
    losses: list[float] = Field(min_length=1)
    """One per query, in the order of the queries."""
    num_unscored: int = Field(default=0, ge=0)
    """Completions that the reward said nothing of; each counts as a loss of 1."""


class CertifiedData(Settings):
    """The queries that the sample was drawn on."""

    source: str
    """Where they were read from."""
    split: str
    """`test`, `validation`, or `all` of a file; and the conditions on columns, after commas."""
    hash: str
    """sha256 over the queries, in order."""
    num_queries: int = Field(ge=1)
    """How many there are: the n of every bound."""


class Certificate(Settings):
    """The content of certificate.json."""

    schema_version: Literal[1] = 1
    """Version of this format."""
    statement: str
    """The claim in words."""
    alpha: float = Field(gt=0, lt=1)
    """The mean loss that is not exceeded."""
    limits: list[float] = Field(default_factory=list)
    """All values of alpha that were tested, from loose to strict; empty = this one alone."""
    delta: float = Field(gt=0, lt=1)
    """Probability over the sample with which the claim may be false."""
    bounds: list[float]
    """Upper bound of each risk at the corrected delta, under the worst distribution meant."""
    method: Method
    """How several prompts were tested together."""
    p_values: list[float] = Field(min_length=1)
    """Of all prompts that were tested together, in the order given."""
    place: int = Field(ge=0)
    """Which of them this is."""
    num_compared: int = Field(ge=1)
    """Prompts that were compared on these queries, those without a p-value included."""
    shift: str | None = None
    """Radius of the distributions meant beside the sampled one, such as `tv:0.05`."""
    groups: list[str] | None = None
    """Group of each query; the claim is about each of them."""
    group_column: str | None = None
    """Column that the groups are of."""
    judge: JudgeCounts | None = None
    """The judge's errors; null = its verdicts are taken for the truth."""
    risks: list[CertifiedRisk] = Field(min_length=1)
    """What is claimed of the prompt, together."""
    data: CertifiedData
    """The queries."""
    completions_per_query: int = Field(ge=1)
    """Completions drawn of each query, averaged into its loss."""
    seed: int
    """Seed of the draws."""
    sampling: dict[str, Any]
    """How completions were drawn: the claim holds for these settings."""
    prompt_hash: str
    """See `prompt_hash`."""
    base: str
    """Id of the base."""
    base_fingerprint: str
    """Hash over the base's weights."""
    template_hash: str
    """Hash over the chat template."""
    code_version: str
    """Version of rlprompt that issued it."""
    created: str
    """UTC time, ISO 8601."""

    def samples(self) -> list[Sample]:
        """The losses of each risk, as bounds take them.

        Raises:
            ValueError: they do not fit together.
        """
        judge = None if self.judge is None else self.judge.labels()
        groups = None if self.groups is None else tuple(self.groups)
        return [
            Sample(
                tuple(risk.losses),
                exact=risk.rule != "value" and self.completions_per_query == 1,
                groups=groups,
                judge=judge,
            )
            for risk in self.risks
        ]

    def parsed_shift(self) -> Shift | None:
        """The shift; None without one.

        Raises:
            ValueError: it is none.
        """
        return None if self.shift is None else parse_shift(self.shift)


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate of an artifact, if it has one.

    Args:
        folder: folder of the artifact.

    Raises:
        InputError: it is damaged, or was issued for another prompt.
    """
    path = Path(folder) / CERTIFICATE
    if not path.is_file():
        return None
    try:
        certificate = Certificate.model_validate(json_text.loads(read_bytes(path, _MOST_BYTES)))
    except (OSError, ValueError, RecursionError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        raise InputError(
            f"'{path}' is damaged ({why}); remove it, and certify the prompt again"
        ) from error
    found = prompt_hash(folder)
    if certificate.prompt_hash != found:
        raise InputError(
            f"'{path}' was issued for another prompt (hash {certificate.prompt_hash[:12]}, this "
            f"one has {found[:12]}); remove it, and certify this prompt"
        )
    return certificate


def drop_certificate(folder: Path) -> None:
    """Remove a certificate from a folder that is about to hold another prompt.

    Args:
        folder: folder of the artifact.
    """
    (Path(folder) / CERTIFICATE).unlink(missing_ok=True)
