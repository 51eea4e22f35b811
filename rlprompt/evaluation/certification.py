"""Certificates of prompts: from answers on fresh queries to a claim, and back to check it.

Letters: Q queries, n completions of each.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

import rlprompt
from rlprompt.artifacts.certificate import (
    Certificate,
    CertifiedData,
    CertifiedRisk,
    JudgeCounts,
)
from rlprompt.artifacts.format import ArtifactInfo
from rlprompt.certify.certificate import Bound, Sample, bound, joint_p_value
from rlprompt.certify.feasibility import least_abstention, queries_needed, smallest_limit
from rlprompt.certify.judge import JudgedRate
from rlprompt.certify.selection import Method, passing
from rlprompt.certify.shift import Shift
from rlprompt.errors import InputError, quote
from rlprompt.evaluation.heldout import HeldoutResult
from rlprompt.rewards.base import RewardSettings
from rlprompt.types import Query

RuleKind = Literal["value", "above", "below"]


@dataclass(frozen=True)
class Rule:
    """How a reward's value becomes a loss."""

    kind: RuleKind = "value"
    """`value`: the loss is the value, which must lie in [0, 1]; `above`, `below`: 1 where the value
    is above, or below, the threshold, else 0."""
    threshold: float | None = None
    """Of the last two."""

    def loss(self, value: float, name: str) -> float:
        """The loss of a value; 1 where the reward said nothing, so that silence buys nothing.

        Args:
            value: value of the reward; NaN = it said nothing.
            name: name of the reward, for the error message.

        Raises:
            InputError: the value itself is to be the loss and does not lie in [0, 1].
        """
        if math.isnan(value):
            return 1.0
        if self.threshold is not None:
            return float(value > self.threshold if self.kind == "above" else value < self.threshold)
        if not 0.0 <= value <= 1.0:
            raise InputError(
                f"reward '{name}' gave {value:.6g}, and a mean can be certified only of losses in "
                "[0, 1]; say what a failure is with --fails-above or --fails-below"
            )
        return value

    def __str__(self) -> str:
        """What a failure is, after the reward's name; nothing where the value is the loss."""
        return "" if self.threshold is None else f" {self.kind} {self.threshold:g}"


@dataclass(frozen=True)
class Terms:
    """What is to be certified, and under which conditions."""

    alpha: float
    delta: float
    rule: Rule = Rule()
    limits: tuple[float, ...] = ()
    """All values of alpha that are tested, from loose to strict; empty = this one alone."""
    shift: Shift | None = None
    method: Method = "holm"
    num_compared: int = 1
    """Prompts that were compared on these queries."""
    completions_per_query: int = 1
    seed: int = 0
    group_column: str | None = None
    judge: JudgeCounts | None = None

    @property
    def level(self) -> float:
        """The delta at which the first of several prompts is tested."""
        return self.delta if self.method == "fixed_sequence" else self.delta / self.num_compared

    @property
    def limit(self) -> float:
        """The mean under the sampled distribution that is to be refuted; 0 when there is none."""
        return self.alpha if self.shift is None else self.shift.base_limit(self.alpha)


@dataclass(frozen=True)
class Finding:
    """What was found of one prompt."""

    samples: tuple[Sample, ...]
    p_value: float
    bounds: tuple[Bound, ...]
    """Of each risk, at the corrected delta."""
    passed: bool


def why_impossible(terms: Terms, queries: Sequence[Query]) -> str | None:
    """Why the claim cannot come out, whatever the answers are; None = it can.

    Args:
        terms: what is to be certified.
        queries: the queries that it would be certified on.
    """
    limit, level = terms.limit, terms.level
    if limit <= 0.0:
        return (
            f"a shift of {terms.shift.kind if terms.shift else ''} alone can add alpha = "
            f"{terms.alpha:g}, so that no number of queries certifies it; raise alpha or lower the "
            "radius"
        )
    smallest, group = _smallest_group(terms, queries)
    least = smallest_limit(smallest, level)
    needed = queries_needed(limit, level)
    of = f"the {smallest} queries{f' of group {quote(group)}' if group else ''}"
    if least > limit:
        return (
            f"{of} can certify {_under(terms, least):.4g} at best (no failure, delta "
            f"{_delta(terms)}), and alpha is {terms.alpha:g}, which needs {needed} queries without "
            "a failure; raise alpha, or add queries"
        )
    if terms.judge is not None:
        judged = JudgedRate(terms.judge.labels(), smallest)
        if judged.most_flagged(limit, level) < 0:
            why = _of_judge(judged, 0, limit, level)
            return (
                f"with this judge (it flagged {_counts(terms.judge)}) {of} cannot certify alpha = "
                f"{terms.alpha:g} even if it flags none of them: {why}"
            )
    return None


def feasibility(terms: Terms, queries: Sequence[Query]) -> str:
    """What the queries can certify at best, and how many alpha needs, in one sentence.

    Args:
        terms: what is to be certified; `why_impossible` has found nothing.
        queries: the queries that it would be certified on.
    """
    smallest, group = _smallest_group(terms, queries)
    least = _under(terms, smallest_limit(smallest, terms.level))
    where = f"the {smallest} queries of the smallest group" if group else f"{smallest} queries"
    text = (
        f"{where} can certify {least:.4g} at best; alpha = {terms.alpha:g} needs at least "
        f"{queries_needed(terms.limit, terms.level)} (delta {_delta(terms)})"
    )
    if terms.judge is not None:
        judged = JudgedRate(terms.judge.labels(), smallest)
        text += (
            f"; the judge may flag at most {judged.most_flagged(terms.limit, terms.level)}, and "
            f"flags about {smallest * judged.labels.flagged_others / judged.labels.others:.0f} "
            "of answers that are all good"
        )
    return text


def samples_of(
    result: HeldoutResult, names: Sequence[str], terms: Terms, queries: Sequence[Query]
) -> tuple[Sample, ...]:
    """The losses of each risk of one prompt: completions of a query are averaged.

    Args:
        result: scored completions of the prompt.
        names: names of the rewards.
        terms: what is to be certified.
        queries: the queries, in order.

    Raises:
        InputError: a value cannot be a loss, or a query has no group.
    """
    groups = _groups(terms, queries)
    judge = None if terms.judge is None else terms.judge.labels()
    exact = terms.rule.kind != "value" and terms.completions_per_query == 1
    samples = []
    for name in names:
        values = np.asarray(result.scores[name], dtype=np.float64)  # [Q, n]
        losses = [
            math.fsum(terms.rule.loss(float(v), name) for v in row) / len(row) for row in values
        ]
        samples.append(Sample(tuple(losses), exact=exact, groups=groups, judge=judge))
    return tuple(samples)


def assess(samples: Sequence[tuple[Sample, ...]], terms: Terms) -> list[Finding]:
    """Which prompts pass, all claims at once, and their bounds.

    Args:
        samples: the losses of each risk, by prompt.
        terms: what is to be certified.
    """
    p_values = [joint_p_value(each, terms.alpha, terms.shift) for each in samples]
    passed = passing(
        p_values,
        terms.delta,
        method=terms.method,
        num_compared=None if terms.method == "fixed_sequence" else terms.num_compared,
    )
    return [
        Finding(
            each,
            p_value,
            tuple(bound(sample, terms.level, terms.shift) for sample in each),
            bool(certified),
        )
        for each, p_value, certified in zip(samples, p_values, passed, strict=True)
    ]


@dataclass(frozen=True)
class Claim:
    """What is said of one prompt of several that were tested together."""

    terms: Terms
    """With the smallest alpha that passed, or the largest one where none did."""
    findings: tuple[Finding, ...]
    """Of all prompts, at that alpha."""
    finding: Finding
    """Of this prompt."""


def strictest(samples: Sequence[tuple[Sample, ...]], terms: Terms) -> list[Claim]:
    """The smallest alpha that each prompt passes, of those that are tested.

    "The rate is at least 0.1" implies "it is at least 0.05", so the limits of one prompt are a
    fixed sequence from loose to strict, each at the prompt's whole share of delta: more limits cost
    nothing. Several prompts then have equal shares (Bonferroni): Holm's larger ones would have to
    be paid for at every limit.

    Args:
        samples: the losses of each risk, by prompt.
        terms: what is to be certified.
    """
    claims: list[Claim] = []
    for alpha in terms.limits or (terms.alpha,):
        at = replace(terms, alpha=alpha)
        findings = tuple(assess(samples, at))
        if not claims:
            claims = [Claim(at, findings, each) for each in findings]
            going = {place for place, each in enumerate(findings) if each.passed}
            continue
        going = {place for place in going if findings[place].passed}
        for place in going:
            claims[place] = Claim(at, findings, findings[place])
    return claims


def why_not(finding: Finding, names: Sequence[str], terms: Terms) -> str:
    """Why a prompt did not pass, and what would help, in words.

    Args:
        finding: what was found of it.
        names: names of the rewards.
        terms: what was to be certified.
    """
    place = max(range(len(names)), key=lambda i: finding.bounds[i].worst)
    sample, found = finding.samples[place], finding.bounds[place]
    losses = sample.by_group()[found.group]
    mean, n = math.fsum(losses) / len(losses), len(losses)
    of = f" of group {quote(found.group)}" if found.group else ""
    seen = f"{round(mean * n)} of {n}" if sample.exact else f"{mean:.4g} on average over {n}"
    text = (
        f"{names[place]}{terms.rule}: {seen} queries{of}, so at most {found.worst:.4g} "
        f"(delta {_delta(terms)}), and alpha is {terms.alpha:g}"
    )
    if not sample.exact:
        return f"{text}; more queries, or a better prompt, may help"
    failures = round(math.fsum(losses))
    if sample.judge is not None:
        judged = JudgedRate(sample.judge, n)
        rest = judged.limit_of_labels(failures, terms.level)
        if rest > terms.limit:
            return f"{text}; {_of_judge(judged, failures, terms.limit, terms.level)}"
        return f"{text}; more queries, more labels, or a better prompt may help"
    abstain = least_abstention(failures, n, terms.limit, terms.delta)
    if abstain > 0.0:
        return (
            f"{text}; the rate is above alpha (probability {1 - terms.delta:g}), so that nothing "
            f"can certify this prompt unless it leaves {abstain:.1%} of the queries or more "
            "unanswered"
        )
    return f"{text}; more queries, or a better prompt, may help"


class Drawn(NamedTuple):
    """What certificates of one call share beside their terms."""

    rewards: Sequence[RewardSettings]
    source_hashes: Sequence[str | None]
    """sha256 of the file of each reward; None for what is built in."""
    data: CertifiedData
    queries: Sequence[Query]
    sampling: Mapping[str, Any]


def certificate(
    findings: Sequence[Finding],
    place: int,
    terms: Terms,
    drawn: Drawn,
    info: ArtifactInfo,
    prompt_hash: str,
    num_unscored: Sequence[int],
) -> Certificate:
    """The certificate of a prompt that passed.

    Args:
        findings: what was found of all prompts that were tested together.
        place: place of the prompt among them.
        terms: what is certified.
        drawn: what the draws were made with.
        info: content of the artifact's prompt.json.
        prompt_hash: hash of the artifact.
        num_unscored: completions without a value, by reward.
    """
    finding = findings[place]
    risks = [
        CertifiedRisk(
            name=settings.name,
            path=settings.path,
            options=dict(settings.options),
            source_hash=source,
            rule=terms.rule.kind,
            threshold=terms.rule.threshold,
            losses=list(sample.losses),
            num_unscored=unscored,
        )
        for settings, source, sample, unscored in zip(
            drawn.rewards, drawn.source_hashes, finding.samples, num_unscored, strict=True
        )
    ]
    groups = finding.samples[0].groups
    made = Certificate(
        statement="",
        alpha=terms.alpha,
        limits=list(terms.limits),
        delta=terms.delta,
        bounds=[each.worst for each in finding.bounds],
        method=terms.method,
        p_values=[each.p_value for each in findings],
        place=place,
        num_compared=terms.num_compared,
        shift=None if terms.shift is None else f"{terms.shift.kind}:{terms.shift.radius!r}",
        groups=None if groups is None else list(groups),
        group_column=terms.group_column,
        judge=terms.judge,
        risks=risks,
        data=drawn.data,
        completions_per_query=terms.completions_per_query,
        seed=terms.seed,
        sampling=dict(drawn.sampling),
        prompt_hash=prompt_hash,
        base=info.base,
        base_fingerprint=info.base_fingerprint or "",  # loading refuses what has none
        template_hash=info.template_hash or "",
        code_version=rlprompt.__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return made.model_copy(update={"statement": statement(made)})


def statement(certificate: Certificate) -> str:
    """The claim in words, from what a certificate records.

    Args:
        certificate: a certificate; its own statement is not read.
    """
    data, n = certificate.data, certificate.data.num_queries
    of = " and of ".join(
        f"{risk.name}{Rule(risk.rule, risk.threshold)}" for risk in certificate.risks
    )
    what = "mean" if certificate.risks[0].rule == "value" else "rate"
    text = (
        f"With probability at least {1 - certificate.delta:g} over the draw of {n} queries, the "
        f"{what} of {of} under this prompt is at most {certificate.alpha:g}"
    )
    if certificate.groups is not None:
        count = len(set(certificate.groups))
        text += f" in each of the {count} groups of {certificate.group_column}"
    text += f", on the distribution that {data.source} ({data.split}) was drawn from"
    shift = certificate.parsed_shift()
    if shift is not None:
        text += f", and on every one {shift}"
    seen = ", ".join(_seen(risk.losses) for risk in certificate.risks)
    text += f". Seen: {seen}; {_unit(certificate.completions_per_query)}"
    if certificate.judge is not None:
        text += f"; the judge's errors are reckoned with (it flagged {_counts(certificate.judge)})"
    if certificate.num_compared > 1:
        method = certificate.method.replace("_", " ")
        text += f"; {certificate.num_compared} prompts were compared ({method})"
    stricter = [limit for limit in certificate.limits if limit < certificate.alpha]
    if stricter:
        text += f"; not shown: at most {' or '.join(f'{limit:g}' for limit in stricter)}"
    unscored = sum(risk.num_unscored for risk in certificate.risks)
    if unscored:
        text += f"; {unscored} completions without a value count as failures"
    return f"{text}."


def _seen(losses: Sequence[float]) -> str:
    total = math.fsum(losses)
    if set(losses) <= {0.0, 1.0}:
        return f"{total:.0f} of {len(losses)}"
    return f"{total / len(losses):.4g} on average"


def discrepancies(certificate: Certificate, queries_hash: str | None = None) -> list[str]:
    """What in a certificate does not follow from what it records; empty when all does.

    Args:
        certificate: a certificate that belongs to its prompt.
        queries_hash: hash of the queries as they are now; None = they are not at hand.
    """
    try:
        samples, shift = certificate.samples(), certificate.parsed_shift()
    except ValueError as error:
        return [f"its counts are wrong ({error})"]
    found = []
    n = certificate.data.num_queries
    if any(len(sample.losses) != n for sample in samples):
        found.append(f"it says {n} queries and has another number of losses")
    count = len(certificate.p_values)
    if certificate.place >= count or certificate.num_compared < count:
        return [*found, "it names a prompt, or a number of prompts, that its p-values lack"]
    p_value = joint_p_value(samples, certificate.alpha, shift)
    if not math.isclose(p_value, certificate.p_values[certificate.place], rel_tol=1e-6):
        found.append(
            f"its losses give the p-value {p_value:.4g}, and it says "
            f"{certificate.p_values[certificate.place]:.4g}"
        )
    sequence = certificate.method == "fixed_sequence"
    p_values = [*certificate.p_values]
    p_values[certificate.place] = p_value
    passed = passing(
        p_values,
        certificate.delta,
        method=certificate.method,
        num_compared=None if sequence else certificate.num_compared,
    )
    if not bool(passed[certificate.place]):
        found.append(
            f"its losses do not certify alpha = {certificate.alpha:g} at delta = "
            f"{certificate.delta:g}"
        )
    found += _of_limits(certificate, samples, shift)
    level = certificate.delta if sequence else certificate.delta / certificate.num_compared
    bounds = [bound(sample, level, shift).worst for sample in samples]
    if len(bounds) != len(certificate.bounds) or not np.allclose(
        bounds, certificate.bounds, atol=1e-3
    ):
        found.append(f"its losses give the bounds {bounds}, and it says {certificate.bounds}")
    if not found and certificate.statement != statement(certificate):
        found.append("its words say something else than its numbers")
    if queries_hash is not None and queries_hash != certificate.data.hash:
        found.append("the queries are not those that it was drawn on")
    return found


def _of_limits(
    certificate: Certificate, samples: Sequence[Sample], shift: Shift | None
) -> list[str]:
    """What does not fit in the limits that were tested from loose to strict."""
    limits = certificate.limits
    if not limits:
        return []
    if certificate.alpha not in limits or limits != sorted(set(limits), reverse=True):
        return [f"it tested the limits {limits}, not in order or without {certificate.alpha:g}"]
    if certificate.method != "bonferroni":
        return [f"several limits were tested by {certificate.method}, which does not cover them"]
    following = [limit for limit in limits if limit < certificate.alpha][:1]
    level = certificate.delta / certificate.num_compared
    if following and joint_p_value(samples, following[0], shift) <= level:
        return [f"its losses certify {following[0]:g} too, which it says is not shown"]
    return []


def hash_of_queries(queries: Sequence[Query]) -> str:
    """sha256 over queries and their columns, in order.

    Args:
        queries: the queries.
    """
    digest = hashlib.sha256()
    for query in queries:
        content = [query.messages, sorted(query.columns.items())]
        digest.update(json.dumps(content, default=repr, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _groups(terms: Terms, queries: Sequence[Query]) -> tuple[str, ...] | None:
    column = terms.group_column
    if column is None:
        return None
    for query in queries:
        if query.columns.get(column) is None:
            known = ", ".join(query.columns) or "none"
            raise InputError(
                f"query {quote(query.text)} has nothing in the column '{column}' that --groups "
                f"names (its columns: {known}); name a column that every query has"
            )
    return tuple(str(query.columns[column]) for query in queries)


class _Group(NamedTuple):
    """The smallest group of queries; "" where no groups are named."""

    size: int
    name: str = ""


def _smallest_group(terms: Terms, queries: Sequence[Query]) -> _Group:
    groups = _groups(terms, queries)
    if groups is None:
        return _Group(len(queries))
    sizes = {name: groups.count(name) for name in dict.fromkeys(groups)}
    name = min(sizes, key=lambda each: sizes[each])
    return _Group(sizes[name], name)


def _under(terms: Terms, mean: float) -> float:
    return mean if terms.shift is None else terms.shift.worst(mean)


def _delta(terms: Terms) -> str:
    if terms.level == terms.delta:
        return f"{terms.delta:g}"
    return f"{terms.delta:g} / {terms.num_compared} prompts"


def _unit(completions: int) -> str:
    if completions == 1:
        return "one completion drawn of each query"
    return f"the mean of {completions} completions of each query"


def _counts(judge: JudgeCounts) -> str:
    return (
        f"{judge.flagged_failures} of {judge.failures} labelled failures and "
        f"{judge.flagged_others} of {judge.others} other answers"
    )


def _of_judge(judged: JudgedRate, flagged: int, limit: float, level: float) -> str:
    rest = judged.limit_of_labels(flagged, level)
    if rest < limit:
        return (
            "more queries may help, more labels, or a judge that errs less (with the same share "
            f"flagged of endless queries, {rest:.2g} would be left possible)"
        )
    return (
        f"what is known of the judge leaves {rest:.4g} possible however many queries there are; "
        "label more answers, or use a judge that errs less"
    )
