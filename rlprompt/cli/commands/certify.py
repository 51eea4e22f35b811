"""`rlprompt certify`: a finite-sample claim about a learned prompt, stored in its artifact."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.text import Text

from rlprompt.artifacts.certificate import (
    CertifiedData,
    JudgeCounts,
    read_certificate,
)
from rlprompt.artifacts.format import certify_artifact, read_artifact_info
from rlprompt.artifacts.identity import prompt_hash
from rlprompt.certify.selection import Method
from rlprompt.certify.shift import parse_shift
from rlprompt.cli.commands.terminal import setup_logging
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.data.conversation import match_key
from rlprompt.data.files import read_file
from rlprompt.engines.make import make_engine
from rlprompt.errors import InputError, quote
from rlprompt.evaluation.certification import (
    Claim,
    Drawn,
    Rule,
    Terms,
    certificate,
    discrepancies,
    feasibility,
    hash_of_queries,
    samples_of,
    strictest,
    why_impossible,
    why_not,
)
from rlprompt.evaluation.heldout import HeldoutEvaluator, HeldoutResult
from rlprompt.files import to_json
from rlprompt.policy import open_policy
from rlprompt.recipe.schema import Recipe, load_recipe
from rlprompt.recipe.yaml_file import apply_override
from rlprompt.rewards import RewardRunner, RewardSettings, build_rewards
from rlprompt.runs.outcome import read_summary
from rlprompt.serving.loaded import LoadedPrompt, Model, artifact_folder, base_of_artifact
from rlprompt.tracking.console import PlainConsole
from rlprompt.types import Completion, Group, Query


@dataclass(frozen=True)
class CertifyOptions:
    """What a caller says of the claim; the fields are the options of the command."""

    rewards: Sequence[str]
    alpha: Sequence[float]
    delta: float
    recipe: Path | None = None
    data: Path | None = None
    split: str = "test"
    where: Sequence[str] = ()
    fails_above: float | None = None
    fails_below: float | None = None
    candidates: Sequence[Path] = ()
    num_compared: int | None = None
    in_sequence: bool = False
    judge_labels: Path | None = None
    shift: str | None = None
    groups: str | None = None
    completions: int = 1
    seed: int = 0
    options: Sequence[str] = ()
    model: str | None = None
    prompt_classes: Sequence[str] = ()
    trust_remote_code: bool = False
    as_json: bool = False


class _Queries(NamedTuple):
    """What a sample is drawn on."""

    queries: Sequence[Query]
    data: CertifiedData


def run(artifacts: Sequence[Path], options: CertifyOptions, *, verbose: bool = False) -> int:
    """Certify prompts together, and store the certificate of each that passes.

    Args:
        artifacts: folders of artifacts, or of runs, in the order of testing.
        options: what is claimed.
        verbose: whether to log more.

    Returns:
        The exit code: 0 when every prompt passed, 1 when one did not; nothing is stored in those.

    Raises:
        InputError: something named is wrong or cannot be loaded.
    """
    notes, console = PlainConsole(stderr=True), PlainConsole()
    setup_logging(notes, logging.WARNING, verbose)
    folders = _folders(artifacts)
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    settings = _rewards(options, recipe)
    drawn_on = _queries(options, recipe)
    runner = build_rewards(settings, _base_dir(options), needs_score=False)
    try:
        terms = _terms(options, folders, runner, settings)
        if not _say_feasibility(notes, terms, drawn_on.queries):
            return 1
        with notes.status("loading the model"):
            prompts = _loaded(folders, options)
        runner.bind_policy(prompts[0].policy)
        with notes.status(f"drawing on {len(drawn_on.queries)} queries"):
            results = [_draw(prompt, runner, drawn_on, terms) for prompt in prompts]
    finally:
        runner.close()
    names = [each.name for each in settings]
    samples = [samples_of(r, names, terms, drawn_on.queries) for r in results]
    sampling = prompts[0].sampling.model_dump(mode="json")
    drawn = Drawn(
        settings, _source_hashes(settings, options), drawn_on.data, drawn_on.queries, sampling
    )
    report = _stored(folders, strictest(samples, terms), results, drawn)
    _show(console, report, options.as_json)
    return 0 if all(row["certified"] for row in report) else 1


def _say_feasibility(notes: PlainConsole, terms: Terms, queries: Sequence[Query]) -> bool:
    """Say what each limit needs; False where none can come out."""
    possible = False
    for alpha in terms.limits or (terms.alpha,):
        at = replace(terms, alpha=alpha)
        impossible = why_impossible(at, queries)
        said = feasibility(at, queries) if impossible is None else f"impossible: {impossible}"
        notes.print(Text(said), soft_wrap=True)
        possible |= impossible is None
        if impossible is not None:
            break  # a stricter limit needs more
    return possible


def verify(artifacts: Sequence[Path], options: CertifyOptions) -> int:
    """Recompute stored certificates from what they record; returns 1 when one does not hold.

    Args:
        artifacts: folders of artifacts, or of runs.
        options: options that may name the queries, to compare them with those that were drawn on.

    Raises:
        InputError: an artifact has no certificate, or one that is damaged or another prompt's.
    """
    console = PlainConsole()
    kept = CertifyOptions(
        (), (), options.delta, recipe=options.recipe, data=options.data, as_json=options.as_json
    )
    if options != kept:
        changed = sorted(k for k, v in vars(options).items() if v != getattr(kept, k))
        raise InputError(
            f"--verify recomputes what is stored, so {changed[0].replace('_', '-')} has no effect; "
            "leave it out (--recipe or --data may name the queries)"
        )
    recipe = None if options.recipe is None else load_recipe(options.recipe)
    report: list[dict[str, Any]] = []
    for folder in _folders(artifacts):
        info, stored = read_artifact_info(folder), read_certificate(folder)
        if stored is None:
            raise InputError(
                f"'{folder}' has no certificate; issue one with rlprompt certify and --reward"
            )
        now = None
        if recipe is not None or options.data is not None:
            now = _queries(_with_split(options, stored.data.split), recipe).data.hash
        found = discrepancies(stored, now)
        if (stored.base_fingerprint, stored.template_hash) != (
            info.base_fingerprint,
            info.template_hash,
        ):
            found.append("it names another base or chat template than the artifact")
        row = {"artifact": str(folder), "certified": not found, "statement": stored.statement}
        report.append(row | {"reason": "; ".join(found) or None})
    _show(console, report, options.as_json)
    return 0 if all(row["certified"] for row in report) else 1


def _folders(artifacts: Sequence[Path]) -> list[Path]:
    folders = [artifact_folder(path) for path in artifacts]
    for place, folder in enumerate(folders):
        read_artifact_info(folder)
        if folder.resolve() in {each.resolve() for each in folders[:place]}:
            raise InputError(f"'{folder}' is named twice; name each artifact once")
    return folders


def _base_dir(options: CertifyOptions) -> Path:
    return Path.cwd() if options.recipe is None else options.recipe.parent


def _rewards(options: CertifyOptions, recipe: Recipe | None) -> list[RewardSettings]:
    """The rewards that are named: of the recipe by name, or by path."""
    if not options.rewards:
        raise InputError("no risk is named; give --reward, a path or the name of one in --recipe")
    tree: dict[str, Any] = {}
    for text in options.options:
        apply_override(tree, text)
    known = {} if recipe is None else {each.name: each for each in recipe.rewards}
    found = []
    for name in options.rewards:
        if name in known:
            if tree:
                raise InputError(
                    f"--option has no effect on '{name}', whose options are in the recipe; remove "
                    "it, or name the reward by its path"
                )
            own = known[name]
            kept: dict[str, Any] = {"path": own.path, "name": own.name, "adapter": own.adapter}
            kept |= {"isolation": own.isolation, "timeout": own.timeout, "options": own.options}
            found.append(RewardSettings(**kept, role="metric"))
            continue
        path = _absolute(name)
        found.append(RewardSettings(path=path, role="metric", options=tree))
    return found


def _absolute(name: str) -> str:
    """A reward's path from the working directory, whatever folder the recipe is in."""
    path = f"{name}:reward" if name.endswith(".py") else name
    file, _, attribute = path.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if Path(file).is_file() else path


def _source_hashes(settings: Sequence[RewardSettings], options: CertifyOptions) -> list[str | None]:
    hashes = []
    for each in settings:
        path = _base_dir(options) / each.path.rpartition(":")[0]
        known = path if path.is_file() else Path(each.path.rpartition(":")[0])
        hashes.append(hashlib.sha256(known.read_bytes()).hexdigest() if known.is_file() else None)
    return hashes


def _queries(options: CertifyOptions, recipe: Recipe | None) -> _Queries:
    """The queries of the claim: a split of the recipe's data, or a file of fresh ones."""
    if options.data is None and recipe is None:
        raise InputError("no queries are named; give --recipe for its test split, or --data FILE")
    if options.data is not None and options.split == "validation":
        raise InputError("--split has no effect beside --data, which is used whole; remove it")
    split = None
    if recipe is not None and options.recipe is not None:
        split = load_queries(recipe.data, options.recipe.parent)
    if options.data is not None:
        fresh = load_queries(DataSettings(path=str(options.data), heldout=0), Path.cwd()).train
        seen = {match_key(query) for query in (*split.train, *split.heldout)} if split else set()
        for query in fresh:
            if match_key(query) in seen:
                raise InputError(
                    f"query {quote(query.text)} of '{options.data}' is one of those that "
                    f"'{options.recipe}' trains or chooses on; remove it from the file"
                )
        return _described(fresh, str(options.data), "all", options.where)
    assert split is not None
    queries = split.test if options.split == "test" else split.heldout
    if not queries:
        raise InputError(
            f"the data of '{options.recipe}' has no {options.split} queries; mark some, set "
            f"data.{'test' if options.split == 'test' else 'heldout'}, or give --data FILE"
        )
    return _described(queries, str(options.recipe), options.split, options.where)


def _described(
    everything: Sequence[Query], source: str, split: str, where: Sequence[str]
) -> _Queries:
    """The queries that every condition keeps, and what a certificate says of them."""
    queries = list(everything)
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals or not any(column in query.columns for query in queries):
            known = ", ".join(everything[0].columns) or "none"
            raise InputError(
                f"--where is '{condition}', and the queries have the columns {known}; write "
                "COLUMN=VALUE with one of them"
            )
        queries = [query for query in queries if str(query.columns.get(column)) == value]
        split = f"{split}, {condition}"
        if not queries:
            raise InputError(f"no query has {condition}; correct --where")
    data = CertifiedData(
        source=source, split=split, hash=hash_of_queries(queries), num_queries=len(queries)
    )
    return _Queries(queries, data)


def _with_split(options: CertifyOptions, split: str) -> CertifyOptions:
    """The options with the split, and the conditions, that a certificate was drawn on."""
    name, *conditions = split.split(", ")
    chosen = "validation" if name == "validation" else "test"
    return replace(options, split=chosen, where=conditions)


def _terms(
    options: CertifyOptions,
    folders: Sequence[Path],
    runner: RewardRunner,
    settings: Sequence[RewardSettings],
) -> Terms:
    limits = _limits(options)
    rule = _rule(options)
    try:
        shift = None if options.shift is None else parse_shift(options.shift)
    except ValueError as error:
        raise InputError(f"--shift: {error}") from error
    compared = _num_compared(options, folders)
    if options.in_sequence and compared > len(folders):
        raise InputError(
            f"--in-sequence tests every prompt that was compared, and {compared - len(folders)} of "
            f"{compared} are not given; name them, or leave --in-sequence out"
        )
    method: Method = "fixed_sequence" if options.in_sequence else "holm"
    if len(limits) > 1:
        if options.in_sequence:
            raise InputError(
                "--in-sequence orders the prompts, and several --alpha are a sequence of their "
                "own; give one --alpha, or leave --in-sequence out"
            )
        method = "bonferroni"
    judge = None
    if options.judge_labels is not None:
        if len(settings) > 1 or rule.kind == "value" or options.completions > 1:
            raise InputError(
                "--judge-labels corrects verdicts of one reward on one completion per query; give "
                "one --reward, --fails-above or --fails-below, and --completions 1"
            )
        judge = _judge(options.judge_labels, rule, runner, settings[0].name)
    return Terms(
        alpha=limits[0],
        limits=limits if len(limits) > 1 else (),
        delta=options.delta,
        rule=rule,
        shift=shift,
        method=method,
        num_compared=compared,
        completions_per_query=options.completions,
        seed=options.seed,
        group_column=options.groups,
        judge=judge,
    )


def _limits(options: CertifyOptions) -> tuple[float, ...]:
    """The values of alpha, from loose to strict.

    Raises:
        InputError: there is none, one is twice there, or alpha or delta is not between 0 and 1.
    """
    if not options.alpha:
        raise InputError("no limit is named; give --alpha, the largest rate that is acceptable")
    named = [*(("alpha", value) for value in options.alpha), ("delta", options.delta)]
    for name, value in named:
        if not 0.0 < value < 1.0:
            raise InputError(f"--{name} is {value:g}; choose it between 0 and 1")
    for place, value in enumerate(options.alpha):
        if value in options.alpha[:place]:
            raise InputError(f"--alpha {value:g} is given twice; give each limit once")
    return tuple(sorted(options.alpha, reverse=True))


def _rule(options: CertifyOptions) -> Rule:
    if options.fails_above is not None and options.fails_below is not None:
        raise InputError("--fails-above and --fails-below both say what a failure is; keep one")
    if options.fails_above is not None:
        return Rule("above", options.fails_above)
    return Rule() if options.fails_below is None else Rule("below", options.fails_below)


def _num_compared(options: CertifyOptions, folders: Sequence[Path]) -> int:
    """How many prompts were looked at on these queries: those given, and those of the records."""
    count = len(folders)
    if options.split == "validation" and options.data is None:
        count = sum(_recorded(folder, options) for folder in folders)
    count += sum(_recorded(artifact_folder(path), options) for path in options.candidates)
    if options.num_compared is None:
        return count
    if options.num_compared < count:
        raise InputError(
            f"--num-compared is {options.num_compared}, and the records name {count} prompts; "
            "raise it, or leave it out"
        )
    return options.num_compared


def _recorded(folder: Path, options: CertifyOptions) -> int:
    """How many prompts the run of an artifact compared, by its own summary."""
    try:
        count = read_summary(folder.parent).get("num_compared")
    except InputError as error:
        if options.num_compared is not None:
            return 1
        raise InputError(
            f"how many prompts '{folder}' was chosen from is not recorded ({error}); certify on "
            "the test split, or give --num-compared"
        ) from error
    return max(1, int(count or 1))


def _judge(path: Path, rule: Rule, runner: RewardRunner, name: str) -> JudgeCounts:
    """The judge's verdicts on labelled answers, counted."""
    table = read_file(str(path), Path.cwd(), "query")
    verdicts: list[bool] = []
    labels: list[bool] = []
    for place, row in enumerate(table.rows):
        label = row.get("human")
        if str(label).lower() not in ("0", "1", "true", "false", "0.0", "1.0"):
            raise InputError(
                f"{table.where(place)} has {label!r} in the column 'human'; write 1 for a failure "
                "and 0 for any other answer"
            )
        labels.append(str(label).lower() in ("1", "true", "1.0"))
    if all(row.get("judge") is not None for row in table.rows):
        for place, row in enumerate(table.rows):
            try:
                verdicts.append(rule.loss(float(row["judge"]), name) > 0.5)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{table.where(place)} has {row['judge']!r} in the column 'judge'; write the "
                    "reward's value as a number"
                ) from error
    else:
        groups = [_answered(table.where(place), row) for place, row in enumerate(table.rows)]
        values = runner.score(groups, step=0).values[name].tolist()
        verdicts = [rule.loss(value, name) > 0.5 for value in values]
    pairs = list(zip(verdicts, labels, strict=True))
    failures = sum(labels)
    if failures in (0, len(labels)):
        raise InputError(
            f"all {len(labels)} answers in {table.label} have the same label, so that only one of "
            "the judge's two errors can be known; label answers of both kinds"
        )
    return JudgeCounts(
        flagged_failures=sum(verdict and label for verdict, label in pairs),
        failures=failures,
        flagged_others=sum(verdict and not label for verdict, label in pairs),
        others=len(labels) - failures,
        labels_hash=hashlib.sha256(path.expanduser().read_bytes()).hexdigest(),
    )


def _answered(where: str, row: dict[str, Any]) -> Group:
    query, completion = row.get("query"), row.get("completion")
    if not isinstance(query, str) or not isinstance(completion, str):
        raise InputError(
            f"{where} has neither a value in 'judge' nor text in 'query' and 'completion'; give "
            "one of the two"
        )
    own = {"query", "completion", "human", "judge"}
    columns = {key: value for key, value in row.items() if key not in own}
    turns = ({"role": "user", "content": query},)
    asked = Query(messages=turns, columns=columns, conversational=False)
    return Group(asked, (Completion((0,), (0.0,), completion, True),))


def _loaded(folders: Sequence[Path], options: CertifyOptions) -> list[LoadedPrompt]:
    infos = [read_artifact_info(folder) for folder in folders]
    settings = base_of_artifact(infos[0], folders[0], options.model, options.trust_remote_code)
    model = Model(open_policy(settings))
    prompts = [
        model.load(folder, prompt_classes=list(options.prompt_classes)) for folder in folders
    ]
    for folder, prompt in zip(folders, prompts, strict=True):
        if prompt.sampling != prompts[0].sampling:
            raise InputError(
                f"'{folder}' draws with other sampling settings than '{folders[0]}'; certify them "
                "in calls of their own"
            )
    return prompts


def _draw(
    prompt: LoadedPrompt, runner: RewardRunner, drawn_on: _Queries, terms: Terms
) -> HeldoutResult:
    evaluator = HeldoutEvaluator(
        make_engine(prompt.policy),
        runner,
        drawn_on.queries,
        prompt.sampling,
        completions_per_query=terms.completions_per_query,
        seed=terms.seed,
        measures={},
    )
    return evaluator.evaluate(prompt.prompt, 0)


def _stored(
    folders: Sequence[Path],
    claims: Sequence[Claim],
    results: Sequence[HeldoutResult],
    drawn: Drawn,
) -> list[dict[str, Any]]:
    """Write the certificates of those that passed; what to show of each prompt."""
    names = [each.name for each in drawn.rewards]
    report = []
    for place, folder in enumerate(folders):
        terms, finding = claims[place].terms, claims[place].finding
        row: dict[str, Any] = {
            "artifact": str(folder),
            "certified": finding.passed,
            "alpha": terms.alpha if finding.passed else None,
            "bounds": {n: b.worst for n, b in zip(names, finding.bounds, strict=True)},
            "p_value": finding.p_value,
        }
        if finding.passed:
            unscored = [
                int(results[place].batch.rewards.values[name].isnan().sum()) for name in names
            ]
            made = certificate(
                claims[place].findings, place, terms, drawn, read_artifact_info(folder),
                prompt_hash(folder), unscored,
            )  # fmt: skip
            certify_artifact(folder, made)
            row |= {"statement": made.statement, "reason": None}
        else:
            row |= {"statement": None, "reason": why_not(finding, names, terms)}
        report.append(row)
    return report


def _show(console: PlainConsole, report: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        console.file.write(to_json(list(report), indent=2) + "\n")
        return
    for row in report:
        head = "certified" if row["certified"] else "not certified"
        tail = row["statement"] if row["certified"] else row["reason"]
        console.print(Text(f"{head}: {row['artifact']}", style="bold"), soft_wrap=True)
        console.print(Text(str(tail)), soft_wrap=True)
