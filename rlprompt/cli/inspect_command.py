"""`rlprompt inspect` on the command line: names and arguments; see `rlprompt.cli.main`."""

from __future__ import annotations

from pathlib import Path

import typer

from rlprompt.cli.reward_app import VERBOSE

_ARTIFACT = typer.Argument(..., metavar="ARTIFACT", help="The folder of an artifact, or of a run.")
_OUTPUT = typer.Option(
    ..., "--output", "-o", metavar="DIR", help="Where inspection.json and inspection.html go."
)
_MODEL = typer.Option(
    None, "--model", metavar="PATH", help="Base in place of the one that the artifact names."
)
_QUERIES = typer.Option(
    None,
    "--queries",
    metavar="FILE",
    help="Queries to inspect it on; by default those that its recipe holds out.",
)
_REWARD = typer.Option(
    None,
    "--reward",
    metavar="PATH",
    help="What its gain is measured by; again = their sum. By default those of its recipe.",
)
_AGAINST = typer.Option(
    None, "--against", metavar="ARTIFACT", help="Another prompt to compare; may be given again."
)
_SENTENCES = typer.Option(
    None, "--sentences", metavar="FILE", help="Sentences to try as explanations, one a line."
)
_LIBRARY = typer.Option(
    True, "--library/--no-library", help="Try the pieces of system texts that come with rlprompt."
)
_TRIGGERS = typer.Option(
    True, "--triggers/--no-triggers", help="Search for words that switch the behaviour."
)
_WORD = typer.Option(
    None,
    "--word",
    metavar="TEXT",
    help="A word or phrase that may switch it; tried whatever the search finds. Again = another.",
)
_REWARD_SETS = typer.Option(
    16,
    "--reward-sets",
    metavar="N",
    help="Sets of positions whose answers are drawn for their worth in reward; 0 = none.",
)
_MINUTES = typer.Option(4.5, "--minutes", metavar="M", help="Time to take, loading left out.")
_MAX_QUERIES = typer.Option(
    36, "--max-queries", min=6, metavar="N", help="Use so many queries at most."
)
_SEED = typer.Option(0, "--seed", min=0, max=2**31 - 1, metavar="S", help="Of all draws.")
_FORCE = typer.Option(
    False, "--force", help="Load the artifact although it was made on another base."
)
_TRUST_REMOTE_CODE = typer.Option(
    False, "--trust-remote-code", help="Let Python code that comes with the base run."
)
_PROMPT_CLASS = typer.Option(
    None, "--prompt-class", metavar="FILE:CLASS", help="As of `rlprompt chat`."
)
_AS_JSON = typer.Option(False, "--json", help="Print inspection.json in place of the summary.")


def inspect(
    artifact: Path = _ARTIFACT,
    output: Path = _OUTPUT,
    model: str | None = _MODEL,
    queries: Path | None = _QUERIES,
    reward: list[str] = _REWARD,
    against: list[Path] = _AGAINST,
    sentences: Path | None = _SENTENCES,
    library: bool = _LIBRARY,
    triggers: bool = _TRIGGERS,
    word: list[str] = _WORD,
    reward_sets: int = _REWARD_SETS,
    minutes: float = _MINUTES,
    max_queries: int = _MAX_QUERIES,
    seed: int = _SEED,
    force: bool = _FORCE,
    trust_remote_code: bool = _TRUST_REMOTE_CODE,
    prompt_class: list[str] = _PROMPT_CLASS,
    as_json: bool = _AS_JSON,
    verbose: bool = VERBOSE,
) -> None:
    """Say what a learned prompt means and does: sentences, each with how much it explains.

    Also nearest tokens, which positions matter, what happens inside the base, and whether some word
    switches its behaviour. See docs/interpretation.md.
    """
    from rlprompt.cli.commands.inspect import InspectOptions, run

    options = InspectOptions(
        output=output,
        model=model,
        queries=queries,
        rewards=reward or [],
        against=against or [],
        sentences=sentences,
        library=library,
        triggers=triggers,
        words=word or [],
        reward_sets=reward_sets,
        minutes=minutes,
        max_queries=max_queries,
        seed=seed,
        force=force,
        trust_remote_code=trust_remote_code,
        prompt_classes=prompt_class or [],
        as_json=as_json,
    )
    run(artifact, options, verbose=verbose)
