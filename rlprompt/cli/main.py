"""The command line: names and arguments of the commands; `rlprompt.cli.commands` does the work.

`main` is the entry point. Exit codes: 0 done (also when a signal ended a run cleanly), 1 the run or
the machine failed, 2 wrong input, told in one line on stderr. Nothing heavy is imported before a
command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from rlprompt import __version__
from rlprompt.cli.artifact_app import artifact_app
from rlprompt.cli.certify_command import certify
from rlprompt.cli.export_command import export
from rlprompt.cli.inspect_command import inspect
from rlprompt.cli.registry_app import registry_app
from rlprompt.cli.reward_app import CONTEXT, VERBOSE, reward_app
from rlprompt.cli.serve_command import serve
from rlprompt.cpu_share import bound_waiting
from rlprompt.errors import InputError, machine_fault
from rlprompt.process_exit import process_end
from rlprompt.standard_streams import hold_standard_streams

app = typer.Typer(
    name="rlprompt",
    help="Learn the system prompt of a frozen language model with reinforcement learning.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(
    help="Fetch, convert and list models.",
    context_settings=CONTEXT,
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(model_app, name="model")
app.add_typer(reward_app, name="reward")
app.add_typer(registry_app, name="registry")
app.add_typer(artifact_app, name="artifact")
app.command()(certify)
app.command()(export)
app.command()(inspect)
app.command()(serve)

_JSON = typer.Option(False, "--json", help="Print JSON.")
_STOP_EXIT_CODE = typer.Option(
    0,
    "--stop-exit-code",
    min=0,
    max=125,
    metavar="N",
    help="What to end with when a signal stopped the run, so that a scheduler knows.",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        arguments: the arguments; None = those of the process, which ends after them.

    Raises:
        SystemExit: always, with the exit code; see `process_exit` for when the process just ends,
            and `standard_streams` for what happens when nobody reads the output any more.
    """
    if arguments is not None:
        _run(list(arguments))
    bound_waiting()
    with process_end():
        hold_standard_streams()
        try:
            _run(None)
        finally:
            sys.stdout.flush()  # here an end of the output still decides the exit code


_RESERVE = 16 * 2**20
"""Bytes that are given back to say that memory is out, and to end; until then they are address
space alone."""


def _run(arguments: list[str] | None) -> None:
    reserve = bytearray(_RESERVE)
    try:
        app(args=arguments, prog_name="rlprompt")
    except InputError as error:
        from rlprompt.cli.commands.terminal import report_error

        report_error(error)
        sys.exit(2)
    except Exception as error:
        del reserve
        sentence = machine_fault(error)
        if sentence is None or os.environ.get("RLPROMPT_DEBUG") == "1":
            raise
        # Not `report_error`: where memory or descriptors are out, its imports may fail too.
        line = " ".join("".join(c if c.isprintable() else " " for c in sentence).split())
        sys.stderr.write(f"error: {line}\n")
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rlprompt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    del version  # the callback has shown it


@app.command()
def init(
    folder: Path = typer.Argument(
        None, metavar="[FOLDER]", help="Where to write; by default a folder of the target's name."
    ),
    target: str = typer.Option(
        "style", "--target", metavar="TARGET", help="persona, style, safety or task."
    ),
) -> None:
    """Write a recipe, example data and a reward to edit; they run as they are."""
    from rlprompt.cli.commands.init import run

    run(folder, target)


@app.command()
def train(
    recipe: Path = typer.Argument(..., metavar="RECIPE", help="A YAML file; see docs/recipe.md."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="KEY=VALUE",
        help="Changes to the recipe, such as training.steps=50 or rewards.0.weight=2.",
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="DIR", help="The run folder; by default runs/<name>."
    ),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with the run in the output folder from its last checkpoint."
    ),
    auto_resume: bool = typer.Option(
        False, "--auto-resume", help="Go on with the run in the output folder if there is one."
    ),
    stop_exit_code: int = _STOP_EXIT_CODE,
    verbose: bool = VERBOSE,
) -> None:
    """Learn a prompt as a recipe says, and compare it with the base before and after.

    Ctrl-C, SIGTERM and SIGUSR1 end the run after the step in progress, with a checkpoint.
    """
    from rlprompt.cli.commands.train import TrainOptions, run

    options = TrainOptions(output, resume, auto_resume, stop_exit_code, verbose)
    raise typer.Exit(run(recipe, overrides or [], options))


@app.command()
def compare(
    runs: list[Path] = typer.Argument(
        ..., metavar="RUN", help="Run folders, two or more; or JSON logs of Inspect, of one task."
    ),
    output: Path = typer.Option(
        Path("compare.html"), "--output", "-o", metavar="FILE", help="The page to write."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the comparison as JSON."),
) -> None:
    """Compare runs: what differs in their recipes, and whether what they learned does.

    The first run is held against each other one, query by query. Logs of Inspect are compared
    sample by sample, on the terminal alone.
    """
    from rlprompt.cli.commands.compare_logs import are_logs
    from rlprompt.cli.commands.compare_logs import run as compare_logs

    if are_logs(runs):
        compare_logs(runs, as_json)
        return
    from rlprompt.cli.commands.compare import run

    run(runs, output, as_json)


@app.command()
def resume(
    run: Path = typer.Argument(..., metavar="RUN", help="The folder of a run."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="What changes from here on, such as training.steps=100."
    ),
    stop_exit_code: int = _STOP_EXIT_CODE,
    verbose: bool = VERBOSE,
) -> None:
    """Go on with a run, with all that was set when it was begun; one that has ended can go further.

    What may change is listed in docs/recipe.md, such as training.steps, evaluation.every, tracking.
    """
    from rlprompt.cli.commands.train import TrainOptions
    from rlprompt.cli.commands.train import resume as go_on

    options = TrainOptions(run, resume=True, stop_exit_code=stop_exit_code, verbose=verbose)
    raise typer.Exit(go_on(run, overrides or [], options))


@app.command()
def submit(
    recipe: Path = typer.Argument(None, metavar="RECIPE", help="As of `rlprompt train`."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes to the recipe; {server} is the server's address."
    ),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="DIR", help="The run folder; by default runs/<name>."
    ),
    cluster: Path | None = typer.Option(
        None, "--cluster", metavar="FILE", help="YAML about the cluster; see docs/cluster.md."
    ),
    nodes: int | None = typer.Option(None, "--nodes", metavar="N", help="Nodes that train."),
    gpus_per_node: int | None = typer.Option(
        None, "--gpus-per-node", metavar="N", help="GPUs of each; every one gets a rank."
    ),
    tasks_per_node: int | None = typer.Option(
        None, "--tasks-per-node", metavar="N", help="Ranks of each node without GPUs."
    ),
    time: str | None = typer.Option(None, "--time", metavar="HH:MM:SS", help="Time limit."),
    account: str | None = typer.Option(None, "--account", help="Whom the time is charged to."),
    partition: str | None = typer.Option(None, "--partition", help="Partition."),
    qos: str | None = typer.Option(None, "--qos", help="Quality of service."),
    constraint: str | None = typer.Option(None, "--constraint", help="Node features."),
    sweep: list[str] = typer.Option(
        None, "--sweep", metavar="KEY=[A,B]", help="One run per value; again for a grid."
    ),
    max_parallel: int | None = typer.Option(
        None, "--max-parallel", min=1, metavar="N", help="Runs of a sweep at a time."
    ),
    then: list[str] = typer.Option(
        None, "--then", metavar="COMMAND", help="Then run it: {output}, {artifact}, {recipe}."
    ),
    after: list[str] = typer.Option(
        None, "--after", metavar="JOB", help="Wait until this job has ended well."
    ),
    server: str | None = typer.Option(
        None, "--server", metavar="COMMAND", help="Run it beside the training, on other nodes."
    ),
    server_nodes: int = typer.Option(1, "--server-nodes", min=1, help="Nodes of the server."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the scripts and do nothing."),
    wait: bool = typer.Option(False, "--wait", help="Show what happens until the jobs end."),
    status: bool = typer.Option(
        False, "--status", help="Show the jobs of RECIPE or --output in place of submitting."
    ),
) -> None:
    """Train on a Slurm cluster: one rank per GPU, requeued and resumed until the run is finished.

    Exit code with --wait or --status: 1 when a job has failed.
    """
    from rlprompt.cli.commands.submit import SubmitOptions, show_status, status_folder
    from rlprompt.cli.commands.submit import submit as run

    if status:
        raise typer.Exit(show_status(status_folder(recipe, overrides or [], output), wait=wait))
    if recipe is None:
        raise InputError("no recipe is named; give one, or --status with --output")
    asked = {
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
        "tasks_per_node": tasks_per_node,
        "time": time,
        "account": account,
        "partition": partition,
        "qos": qos,
        "constraint": constraint,
    }
    options = SubmitOptions(
        output=output,
        cluster_file=cluster,
        cluster=asked,
        sweep=sweep or [],
        max_parallel=max_parallel,
        then=then or [],
        after=after or [],
        server=server,
        server_nodes=server_nodes,
    )
    raise typer.Exit(run(recipe, overrides or [], options, dry_run=dry_run, wait=wait))


@app.command()
def plan(
    recipe: Path = typer.Argument(..., metavar="RECIPE", help="As of `rlprompt train`."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes to the recipe, such as distributed.base=sharded."
    ),
    model_size: str | None = typer.Option(
        None, "--model-size", metavar="SIZE", help="135m, 1b, 3b, 8b (the default) or 70b."
    ),
    model: str | None = typer.Option(
        None,
        "--model",
        metavar="MODEL",
        help="Any base in place of a size: a folder with config.json, a model of the cache, or a "
        "hub id, of which the config is fetched.",
    ),
    gpus: int | None = typer.Option(
        None,
        "--gpus",
        min=1,
        metavar="N",
        help="One rank each; by default 8, or one per query of a step where those are fewer.",
    ),
    gpu: str = typer.Option("h100", "--gpu", metavar="NAME", help="a100, h100, h200, l40s or cpu."),
    gpus_per_node: int | None = typer.Option(
        None, "--gpus-per-node", min=1, metavar="N", help="GPUs of a node; by default 8."
    ),
    network: float | None = typer.Option(
        None, "--network", metavar="GB/S", help="For each GPU from other nodes; else a usual one."
    ),
    query_tokens: int = typer.Option(
        64, "--query-tokens", min=1, metavar="N", help="Mean length of a query with its template."
    ),
    as_json: bool = _JSON,
) -> None:
    """Say what a recipe would need elsewhere: memory by part, traffic, and the least time."""
    from rlprompt.cli.commands.plan import run

    run(
        recipe,
        overrides or [],
        model_size=model_size,
        model=model,
        gpus=gpus,
        gpu=gpu,
        query_tokens=query_tokens,
        gpus_per_node=gpus_per_node,
        network=network,
        as_json=as_json,
    )


@app.command("forecast")
def forecast_recipe(
    recipe: Path = typer.Argument(..., metavar="RECIPE", help="As of `rlprompt train`."),
    overrides: list[str] = typer.Argument(
        None, metavar="KEY=VALUE", help="Changes to the recipe, such as sampling.temperature=1."
    ),
    queries: int = typer.Option(
        24, "--queries", min=2, metavar="N", help="Training queries that each prompt answers."
    ),
    completions: int = typer.Option(
        4, "--completions", min=2, metavar="N", help="Completions per query and prompt."
    ),
    texts: Path | None = typer.Option(
        None, "--texts", metavar="FILE", help="JSON list of further system texts to try."
    ),
    difference: float = typer.Option(
        0.05, "--difference", metavar="D", help="Say how many queries this difference needs."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON in place of tables."),
    verbose: bool = VERBOSE,
) -> None:
    """Say before training whether prompts can help: what of the reward's variance is theirs."""
    from rlprompt.cli.commands.forecast import run

    run(
        recipe,
        overrides or [],
        num_queries=queries,
        completions=completions,
        texts=texts,
        difference=difference,
        as_json=as_json,
        verbose=verbose,
    )


@app.command()
def chat(
    artifact: Path = typer.Argument(
        ..., metavar="ARTIFACT", help="The folder of an artifact, or of a run."
    ),
    compare: bool = typer.Option(
        False,
        "--compare",
        help="Also answer without a prompt and with the recipe's hand-written one; each keeps a "
        "history of its own.",
    ),
    model: str | None = typer.Option(
        None, "--model", metavar="PATH", help="Base in place of the one that the artifact names."
    ),
    force: bool = typer.Option(
        False, "--force", help="Load the artifact although it was made on another base."
    ),
    max_tokens: int | None = typer.Option(
        None, min=1, metavar="N", help="Longest answer; by default as in training."
    ),
    temperature: float | None = typer.Option(
        None, min=0.0, max=10.0, metavar="T", help="0 = the likeliest; by default as in training."
    ),
    seed: int = typer.Option(
        0, min=0, max=2**31 - 1, metavar="S", help="Equal seeds give equal answers."
    ),
    query: list[str] = typer.Option(
        None,
        "--query",
        "-q",
        metavar="TEXT",
        help="Answer this and exit; may be given again, each is a conversation of its own.",
    ),
    trust_remote_code: bool = typer.Option(
        False, "--trust-remote-code", help="Let Python code that comes with the base run."
    ),
    prompt_class: list[str] = typer.Option(
        None,
        "--prompt-class",
        metavar="FILE:CLASS",
        help="The prompt's class where it is one of your own; may be given again.",
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print one JSON object per question, a line each."
    ),
    verbose: bool = VERBOSE,
) -> None:
    """Talk to a base under a learned prompt. /reset forgets the conversation, /quit ends it."""
    from rlprompt.cli.commands.chat import run
    from rlprompt.serving.chat import ChatOptions

    options = ChatOptions(
        compare=compare,
        model=model,
        force=force,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        trust_remote_code=trust_remote_code,
        prompt_classes=prompt_class or [],
    )
    run(artifact, query or [], options, as_json=as_json, verbose=verbose)


@app.command("eval")
def evaluate(
    arguments: list[str] = typer.Argument(
        None,
        metavar="[ARTIFACT]... [KEY=VALUE]...",
        help="The folder of an artifact or a run, several with a suite (without one, the recipe's "
        "prompt as it is before training, such as a text), and changes to the recipe.",
    ),
    recipe: Path = typer.Option(
        None,
        "--recipe",
        "-r",
        metavar="RECIPE",
        help="Gives held-out queries, rewards, sampling; by default the one of the artifact.",
    ),
    overrides: list[str] = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="A change to the recipe; may be given again."
    ),
    output: Path | None = typer.Option(
        None,
        "--output",
        "-o",
        metavar="DIR",
        help="Write evaluation.json there, and the prompt as an artifact if none was given.",
    ),
    suite: str | None = typer.Option(
        None,
        "--suite",
        metavar="FILE|NAME",
        help="Situations, side effects and attacks: default, quick, or a YAML file.",
    ),
    gate: Path | None = typer.Option(
        None, "--gate", metavar="FILE", help="YAML with limits on bounds; exit code 1 if not kept."
    ),
    force: bool = typer.Option(
        False, "--force", help="Load the artifact although it was made on another base."
    ),
    verbose: bool = VERBOSE,
) -> None:
    """Print held-out rewards of a prompt as JSON, with those of base and hand-written prompt.

    With --suite or --gate, write evaluation.json and suite.html; see docs/evaluation.md.
    """
    given = list(arguments or [])
    if suite is not None or gate is not None:
        from rlprompt.cli.commands.evaluate_suite import SuiteOptions, run_suite

        artifacts = [Path(each) for each in given if "=" not in each or Path(each).exists()]
        changes = [each for each in given if Path(each) not in artifacts] + list(overrides or [])
        options = SuiteOptions(suite, gate, output, recipe, changes, force, verbose)
        raise typer.Exit(run_suite(artifacts, options))
    from rlprompt.cli.commands.evaluate import run

    # A folder may have a "=" in its name; a change is no folder.
    named = bool(given) and ("=" not in given[0] or Path(given[0]).exists())
    artifact = Path(given.pop(0)) if named else None
    changes = [*given, *(overrides or [])]
    run(artifact, recipe, changes, output, force=force, verbose=verbose)


@model_app.command("fetch")
def model_fetch(
    name: str = typer.Argument(..., metavar="NAME", help="As in `rlprompt model list`."),
    verbose: bool = VERBOSE,
) -> None:
    """Put an embedded model into the cache; says where it is."""
    from rlprompt.cli.commands.model import fetch_model

    fetch_model(name, verbose=verbose)


@model_app.command("convert")
def model_convert(
    file: str = typer.Argument(
        ..., metavar="FILE.gguf", help="A Llama, Qwen2 or Gemma 3 model, quantised or not."
    ),
    name: str = typer.Argument(..., metavar="NAME", help="What model.path will call it."),
    dtype: str = typer.Option(
        "bfloat16", "--dtype", metavar="TYPE", help="What weights are stored in, or float32."
    ),
    force: bool = typer.Option(False, "--force", help="Replace a converted model of that name."),
    verbose: bool = VERBOSE,
) -> None:
    """Convert a GGUF file to a model of the cache; says where it is.

    Weights are dequantised, and config, tokenizer and chat template are made of what the file
    says; the result is loaded and tried before it gets its name.
    """
    from rlprompt.cli.commands.model import convert_model

    convert_model(file, name, dtype, force=force, verbose=verbose)


@model_app.command("list")
def model_list(as_json: bool = _JSON) -> None:
    """List the embedded models, and those that were converted here."""
    from rlprompt.cli.commands.model import show_models

    show_models(as_json=as_json)


@app.command()
def schema(
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="FILE", help="Write there in place of stdout."
    ),
    artifact: bool = typer.Option(
        False, "--artifact", help="That of an artifact's prompt.json in place of a recipe's."
    ),
) -> None:
    """Print the JSON schema of a recipe, with which editors complete and check recipes."""
    from rlprompt.cli.commands.schema import write_schema

    write_schema(output, of_artifact=artifact)


@app.command()
def doctor(
    as_json: bool = _JSON,
) -> None:
    """Say what this machine has, and whether a run could start (exit code 0) or not (1)."""
    from rlprompt.cli.commands.doctor import run

    raise typer.Exit(run(as_json=as_json))
