"""`rlprompt certify` on the command line: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import VERBOSE
from rlprompt.errors import InputError

_ARTIFACTS = typer.Argument(
    ..., metavar="ARTIFACT", help="The artifact/ folder of a run, or the run; several together."
)
_REWARD = typer.Option(
    None,
    "--reward",
    metavar="PATH",
    help="The risk: a path, or a name in --recipe; again = all of them are claimed.",
)
_ALPHA = typer.Option(
    None,
    "--alpha",
    metavar="A",
    help="Largest mean accepted; again = the smallest that passes is claimed.",
)
_DELTA = typer.Option(
    0.05, "--delta", metavar="D", help="Probability with which the claim may be false."
)
_RECIPE = typer.Option(
    None,
    "--recipe",
    "-r",
    metavar="RECIPE",
    help="Gives the test queries, and rewards by name.",
)
_DATA = typer.Option(
    None, "--data", metavar="FILE", help="Fresh queries in place of the recipe's test split."
)
_SPLIT = typer.Option(
    "test", "--split", metavar="NAME", help="test, or validation at the price of selection."
)
_WHERE = typer.Option(
    None, "--where", metavar="COLUMN=VALUE", help="Only queries with this in a column."
)
_FAILS_ABOVE = typer.Option(
    None, "--fails-above", metavar="X", help="A failure is a value above X."
)
_FAILS_BELOW = typer.Option(
    None, "--fails-below", metavar="X", help="A failure is a value below X."
)
_CANDIDATES = typer.Option(
    None,
    "--candidates",
    metavar="RUN",
    help="Runs whose prompts were compared on these queries too; counted from their records.",
)
_NUM_COMPARED = typer.Option(
    None, "--num-compared", min=1, metavar="K", help="Prompts compared on these queries."
)
_IN_SEQUENCE = typer.Option(
    False, "--in-sequence", help="Test in the order given, each at delta, until one fails."
)
_JUDGE_LABELS = typer.Option(
    None,
    "--judge-labels",
    metavar="FILE",
    help="Answers with people's labels (column human), "
    "from which the judge's errors are reckoned with.",
)
_SHIFT = typer.Option(
    None, "--shift", metavar="KIND:RADIUS", help="tv:0.05, ratio:1.5, chi2:0.1 or kl:0.05."
)
_GROUPS = typer.Option(
    None, "--groups", metavar="COLUMN", help="Claim it of each group of queries."
)
_COMPLETIONS = typer.Option(
    1, "--completions", min=1, metavar="N", help="Completions of each query, averaged."
)
_SEED = typer.Option(0, "--seed", min=0, max=2**31 - 1, metavar="S", help="Of the draws.")
_OPTION = typer.Option(
    None, "--option", metavar="KEY=VALUE", help="An option of the reward; may be given again."
)
_MODEL = typer.Option(
    None, "--model", metavar="PATH", help="Base in place of the one that the artifact names."
)
_PROMPT_CLASS = typer.Option(
    None, "--prompt-class", metavar="FILE:CLASS", help="As of `rlprompt chat`."
)
_TRUST_REMOTE_CODE = typer.Option(
    False, "--trust-remote-code", help="Let Python code that comes with the base run."
)
_VERIFY = typer.Option(
    False, "--verify", help="Recompute the stored certificates in place of issuing any."
)
_AS_JSON = typer.Option(False, "--json", help="Print JSON.")


def certify(
    artifacts: list[Path] = _ARTIFACTS,
    reward: list[str] = _REWARD,
    alpha: list[float] = _ALPHA,
    delta: float = _DELTA,
    recipe: Path | None = _RECIPE,
    data: Path | None = _DATA,
    split: str = _SPLIT,
    where: list[str] = _WHERE,
    fails_above: float | None = _FAILS_ABOVE,
    fails_below: float | None = _FAILS_BELOW,
    candidates: list[Path] = _CANDIDATES,
    num_compared: int | None = _NUM_COMPARED,
    in_sequence: bool = _IN_SEQUENCE,
    judge_labels: Path | None = _JUDGE_LABELS,
    shift: str | None = _SHIFT,
    groups: str | None = _GROUPS,
    completions: int = _COMPLETIONS,
    seed: int = _SEED,
    option: list[str] = _OPTION,
    model: str | None = _MODEL,
    prompt_class: list[str] = _PROMPT_CLASS,
    trust_remote_code: bool = _TRUST_REMOTE_CODE,
    verify: bool = _VERIFY,
    as_json: bool = _AS_JSON,
    verbose: bool = VERBOSE,
) -> None:
    """Certify that a prompt's rate of failures is at most ALPHA; exit code 1 when it cannot be.

    The certificate goes into the artifact; see docs/guarantees.md for what it promises.
    """
    from rlprompt.cli.commands import certify as command

    if split not in ("test", "validation"):
        raise InputError(f"--split is '{split}'; write test or validation")
    options = command.CertifyOptions(
        rewards=tuple(reward or ()),
        alpha=tuple(alpha or ()),
        delta=delta,
        recipe=recipe,
        data=data,
        split=split,
        where=tuple(where or ()),
        fails_above=fails_above,
        fails_below=fails_below,
        candidates=tuple(candidates or ()),
        num_compared=num_compared,
        in_sequence=in_sequence,
        judge_labels=judge_labels,
        shift=shift,
        groups=groups,
        completions=completions,
        seed=seed,
        options=tuple(option or ()),
        model=model,
        prompt_classes=tuple(prompt_class or ()),
        trust_remote_code=trust_remote_code,
        as_json=as_json,
    )
    if verify:
        raise typer.Exit(command.verify(artifacts, options))
    raise typer.Exit(command.run(artifacts, options, verbose=verbose))
