"""rlprompt from Python: learn a system prompt, load it, answer under it, compare it.

    import rlprompt

    run = rlprompt.train(rewards=my_reward, data=["How do I ...?", ...], prompt="Be brief.")
    run.prompt.generate("How do I sharpen a knife?")

What is public is listed in `rlprompt.__all__` and documented in docs/python.md.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from rich.console import Console

from rlprompt.artifacts.format import check_files, read_artifact_info
from rlprompt.artifacts.identity import prompt_hash
from rlprompt.data import load_queries
from rlprompt.data.base import DataSettings
from rlprompt.engines.make import make_engine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.evaluation.compare import Comparison, compare
from rlprompt.evaluation.heldout import HeldoutEvaluator
from rlprompt.exports.formats import TEXT, check_format, export_prompt, export_text
from rlprompt.exports.source import Source
from rlprompt.model.base import ModelSettings
from rlprompt.model.chat.slot import ChatSlot
from rlprompt.model.in_memory import base_in_memory
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.random_state import global_random_state, restore_global_random_state
from rlprompt.recipe.build import build_run
from rlprompt.recipe.keywords import (
    Found,
    Keywords,
    Start,
    data_section,
    recipe_of,
    reward_sections,
)
from rlprompt.recipe.objects import Objects
from rlprompt.recipe.schema import Recipe
from rlprompt.recipe.stored import check_folder, claim_folder
from rlprompt.recipe.yaml_file import explain
from rlprompt.rewards import RewardSettings, build_rewards
from rlprompt.runs.claim_folder import RECIPE_FILE, default_output, require_run
from rlprompt.runs.outcome import Outcome
from rlprompt.runs.population import Population
from rlprompt.runs.run import Run
from rlprompt.serving.loaded import (
    LoadedPrompt,
    Model,
    artifact_folder,
    base_of_artifact,
    checked_sampling,
)
from rlprompt.settings import Settings
from rlprompt.tracking.console import PlainConsole

logger = logging.getLogger(__name__)

OnePrompt = str | Path | LoadedPrompt | Outcome | None
"""A prompt that `evaluate` takes: a text, an artifact, a loaded prompt, a finished run, or None."""
_DEFAULT_MODEL = "smollm2-135m"
_LONGEST_NAME = 60
"""Characters of a text that stands for its name in a comparison."""
_Section = TypeVar("_Section", bound=Settings)

AnyModel = Any
"""A name (embedded, a folder, a hub id), a `Model`, or a loaded `transformers` model."""


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    model: AnyModel | None = None,
    tokenizer: Any = None,
    rewards: Any = None,
    data: Any = None,
    heldout: Any = None,
    test: Any = None,
    prompt: Start | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **sections: Any,
) -> Run | Population:
    """Learn a system prompt; returns the finished run.

    Give a recipe, keywords, or a recipe and keywords that replace its parts. What a keyword names
    may be a Python object. A Ctrl-C ends the run after the step in progress; `resume=True` goes on.

    Args:
        recipe: path of a YAML file, or its content as a mapping.
        model: the frozen base: the embedded name `smollm2-135m` (the default), a folder, a hub id,
            a `Model`, or a `transformers` model in memory, which stays as it is.
        tokenizer: tokenizer of a `transformers` model in memory, with a chat template.
        rewards: a reward or a list of them. A reward is a function as TRL's (keywords in, one float
            or None per completion out), a path (`file.py:object`, `builtin:length`), or a mapping
            with the keys of a recipe's rewards, whose `path` may be a function.
        data: the queries: a list of texts or of mappings with a column `query` (or TRL's `prompt`),
            a `datasets.Dataset`, a `pandas.DataFrame`, the path of a file or a hub id, or a
            mapping with the keys of a recipe's data.
        heldout: validation queries, by which the best prompt is chosen, in any form of `data` but a
            hub id; or how many of `data` to hold out (a count, or a share between 0 and 1).
        test: queries for the result at the end, by which nothing is chosen; forms as of `heldout`.
        prompt: where the prompt starts: a text, an artifact (its `Path`, or a `LoadedPrompt`), or a
            mapping with the keys of a recipe's prompt. A text is also what the result is compared
            with, unless `evaluation` names another.
        output: the run folder; without one, `runs/NAME`, or `runs/NAME-2` and so on where that
            holds a run.
        resume: whether to go on with the run in `output`, which has ended or was cut off. Without
            `recipe`, as it was begun; keywords then change what may change (`runs.changes`), such
            as `training={"steps": 100}`, and bring back objects that were in memory.
        progress: whether to show the run while it goes on.
        sections: other keys of a recipe, such as `algorithm="ppo"`, `training={"steps": 60}`,
            `sampling={"max_tokens": 80}`, `seed=1`; a text stands for `{"type": text}`.

    Returns:
        The run, with `.prompt`, `.metrics`, `.folder` and `.report`; a recipe with a population
        gives a `Population`, which has the same and `.members`.

    Raises:
        InputError: something given is wrong; the sentence names the key. Nothing has been written.
        NotFiniteError: loss, gradient or prompt was not finite; the folder keeps what led to it.
    """
    keywords = Keywords(rewards, data, heldout, test, prompt, sections)
    named, opened = _named_or_opened(model, tokenizer)
    if output is None and resume:
        raise InputError("resume needs the folder of the run; name it as output=")
    if resume and recipe is None:
        require_run(Path(str(output)))
        recipe = Path(str(output)) / RECIPE_FILE
    resolved, base_dir, objects = recipe_of(recipe, keywords, named, opened)
    folder = _fresh_folder(resolved.name) if output is None else Path(output)
    console = PlainConsole() if progress else PlainConsole(quiet=True)
    with _process_state_kept():
        return _run(resolved, base_dir, folder, console, resume, objects)


def _run(
    recipe: Recipe,
    base_dir: Path,
    folder: Path,
    console: Console,
    resume: bool,
    objects: Objects,
) -> Run | Population:
    for line in check_folder(folder, recipe, base_dir, resume):
        logger.info("%s", line)
    run = build_run(recipe, base_dir, folder, console, objects=objects)
    with claim_folder(folder, recipe, base_dir, resume) as begun:
        run.run(resume=begun)
    return run


def load_prompt(
    artifact: str | Path,
    *,
    model: AnyModel | None = None,
    tokenizer: Any = None,
    force: bool = False,
    trust_remote_code: bool = False,
    prompt_classes: Sequence[type[Prompt] | str] = (),
) -> LoadedPrompt:
    """A learned prompt, on the base that it was learned on.

    Args:
        artifact: the folder of an artifact, or of a run.
        model: another copy of its base: a name, a `Model`, or a `transformers` model in memory.
        tokenizer: tokenizer of a `transformers` model in memory.
        force: whether to load on a base or chat template that differs; a warning is logged.
        trust_remote_code: whether Python code that comes with the base may run.
        prompt_classes: classes of your own that the prompt is of, or their paths as
            `path/file.py:object` (docs/extend.md); an artifact alone imports nothing.

    Raises:
        InputError: artifact or base cannot be loaded, or do not belong together, or the prompt's
            class is neither built in nor named.
    """
    folder = artifact_folder(artifact)
    info = read_artifact_info(folder)
    named, policy = _named_or_opened(model, tokenizer)
    if policy is None:
        policy = open_policy(base_of_artifact(info, folder, named, trust_remote_code))
    return Model(policy).load(folder, force=force, prompt_classes=prompt_classes)


def export(
    artifact: str | Path | LoadedPrompt,
    to: str,
    output: str | Path,
    *,
    model: AnyModel | None = None,
    tokenizer: Any = None,
    force: bool = False,
    trust_remote_code: bool = False,
    prompt_classes: Sequence[type[Prompt] | str] = (),
) -> Path:
    """Write a prompt in the format of another program (docs/export.md).

    Args:
        artifact: the folder of an artifact or of a run, or a `LoadedPrompt`.
        to: the format: `peft`, `merged`, `vocabulary`, `vllm-embeds`, `kv` or `text`.
        output: the folder that is to be made.
        model: another copy of the base, as for `load_prompt`.
        tokenizer: tokenizer of a `transformers` model in memory.
        force: whether to load on a base or chat template that differs.
        trust_remote_code: whether Python code that comes with the base may run.
        prompt_classes: classes of your own that the prompt is of, or their paths.

    Returns:
        The folder. Its README.md says how to load it.

    Raises:
        InputError: the format cannot hold the prompt, the folder is there and not empty, or see
            `load_prompt`; or something is given that has no effect.
    """
    check_format(to)
    place = Path(output)
    asked = {"model": model, "tokenizer": tokenizer, "force": force}
    asked |= {"trust_remote_code": trust_remote_code, "prompt_classes": prompt_classes}
    if isinstance(artifact, LoadedPrompt):
        _refuse_given(asked, "for an artifact; the prompt given is loaded already")
        return export_prompt(_source(artifact), to, place)
    folder = artifact_folder(artifact)
    if place.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"'{place}' lies in the artifact, whose files must stay as they are; name a folder "
            "outside of it"
        )
    info = read_artifact_info(folder)
    if to == TEXT and info.representation == TextPrompt.kind:
        _refuse_given(asked, f"in the format {TEXT}, for which no base is loaded")
        check_files(folder)
        return export_text(info.init_text, info.base, info.name, place)
    prompt = load_prompt(
        folder,
        model=model,
        tokenizer=tokenizer,
        force=force,
        trust_remote_code=trust_remote_code,
        prompt_classes=prompt_classes,
    )
    return export_prompt(
        Source(prompt.policy, prompt.prompt, prompt.name, prompt_hash(folder)), to, place
    )


def _refuse_given(asked: Mapping[str, Any], why: str) -> None:
    """Refuse settings that would have no effect."""
    for name, value in asked.items():
        if value is not None and value is not False and value != ():
            raise InputError(f"{name} has no effect {why}; remove it")


def _source(prompt: LoadedPrompt) -> Source:
    """A loaded prompt as what is exported; it need not have been saved."""
    with tempfile.TemporaryDirectory(prefix="rlprompt-export-") as temporary:
        own = prompt_hash(prompt.save(Path(temporary) / "artifact"))
    return Source(prompt.policy, prompt.prompt, prompt.name, own)


def open_model(
    model: AnyModel = "smollm2-135m", *, tokenizer: Any = None, **settings: Any
) -> Model:
    """A frozen chat model, to try prompts on and to train on several times.

    Args:
        model: the embedded name, a folder, a hub id, or a `transformers` model in memory, which
            stays as it is.
        tokenizer: tokenizer of a `transformers` model in memory.
        settings: other keys of a recipe's model, such as `dtype="float32"` or `device="cpu"`.

    Raises:
        InputError: the model cannot be loaded, is of an unsupported kind, or has no system slot.
    """
    named, policy = _named_or_opened(model, tokenizer)
    if policy is None:
        return Model(open_policy(_checked(ModelSettings, {"path": named, **settings}, "model")))
    if settings:
        raise InputError(
            f"{min(settings)} is for a model that is loaded; the one given is in memory, remove it"
        )
    return Model(policy)


def evaluate(
    prompts: OnePrompt | Sequence[OnePrompt] | Mapping[str, OnePrompt],
    *,
    data: Any,
    rewards: Any,
    model: AnyModel | None = None,
    tokenizer: Any = None,
    completions_per_query: int = 2,
    seed: int = 0,
    **sampling: Any,
) -> Comparison:
    """Score one prompt, or compare several on the same queries and the same draws.

    Args:
        prompts: a prompt, a list of them, or a mapping from names to them. A prompt is a
            `LoadedPrompt`, a finished run, the `Path` of an artifact, a hand-written text, or None
            for the base without a system message.
        data: the queries, as for `train`; all of them are used.
        rewards: rewards as for `train`; the total is the weighted sum of those with role `score`.
        model: the base, where no prompt brings one: as for `train`.
        tokenizer: tokenizer of a `transformers` model in memory.
        completions_per_query: completions drawn for each query.
        seed: seed of the draws.
        sampling: fields of `SamplingSettings` in place of those that the first learned prompt was
            trained with.

    Returns:
        The scores by name: `comparison["learned"].reward`, `.rows` for a table, `print` for text.

    Raises:
        InputError: something given is wrong, a prompt belongs to another base, or a reward failed.
    """
    policy, loaded = _on_one_base(prompts, model, tokenizer)
    found = Found()
    asked = _checked(DataSettings, {"heldout": 0, **data_section(data, found)}, "data")
    if asked.system == "init":
        raise InputError("data.system: init starts a prompt, and none is trained here; write drop")
    queries = load_queries(asked, Path(), found.rows).train
    settings = [
        _checked(RewardSettings, each, f"rewards.{place}")
        for place, each in enumerate(reward_sections(rewards, found))
    ]
    runner = build_rewards(settings, Path(), needs_score=False, given=found.rewards)
    runner.bind_policy(policy)
    first = next((each.sampling for each in loaded.values() if each.recipe), SamplingSettings())
    evaluator = HeldoutEvaluator(
        make_engine(policy),
        runner,
        queries,
        checked_sampling({**first.model_dump(), **sampling}),
        completions_per_query=completions_per_query,
        seed=seed,
        measures={},
    )
    try:
        return compare(evaluator, {name: each.prompt for name, each in loaded.items()})
    finally:
        evaluator.close()


def _named_or_opened(model: AnyModel | None, tokenizer: Any) -> tuple[str | None, Policy | None]:
    """The name of a model to load, or the policy over one that is in memory; None, None without."""
    if model is None or isinstance(model, str | Path):
        if tokenizer is not None:
            raise InputError(
                "tokenizer belongs to a transformers model in memory; give that as model="
            )
        return None if model is None else str(model), None
    if isinstance(model, Model):
        if tokenizer is not None:
            raise InputError("model has a tokenizer of its own; remove tokenizer")
        return None, model.policy
    base = base_in_memory(model, tokenizer)
    return None, Policy(base, ChatSlot.from_tokenizer(base.tokenizer))


def _checked(kind: type[_Section], values: Mapping[str, Any], place: str) -> _Section:
    """Settings of plain values; an error names the place and the key."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        _, sentence = explain(error, kind.model_json_schema())
        raise InputError(f"{place}: {sentence}") from error


def _on_one_base(
    prompts: OnePrompt | Sequence[OnePrompt] | Mapping[str, OnePrompt],
    model: AnyModel | None,
    tokenizer: Any,
) -> tuple[Policy, dict[str, LoadedPrompt]]:
    """The base that all prompts stand on, and the prompts on it by name."""
    named = dict(prompts) if isinstance(prompts, Mapping) else _with_names(prompts)
    if not named:
        raise InputError("there is no prompt to evaluate; give at least one")
    ready = {k: v.prompt if isinstance(v, Outcome) else v for k, v in named.items()}
    own = [each.policy for each in ready.values() if isinstance(each, LoadedPrompt)]
    if model is not None or not own:
        base = open_model(model or _DEFAULT_MODEL, tokenizer=tokenizer)
    else:
        base = Model(own[0])
    loaded: dict[str, LoadedPrompt] = {}
    for name, each in ready.items():
        if isinstance(each, LoadedPrompt):
            if each.policy.base.fingerprint != base.policy.base.fingerprint:
                raise InputError(
                    f"prompt '{name}' belongs to {each.policy.base.id}, not to {base.id}; evaluate "
                    "prompts of one base in one call"
                )
            loaded[name] = each
        else:
            loaded[name] = base.load(each) if isinstance(each, Path) else base.prompt(each)
    return base.policy.sibling(), loaded


def _with_names(prompts: OnePrompt | Sequence[OnePrompt]) -> dict[str, OnePrompt]:
    """Prompts by a name that tells them apart."""
    if prompts is None or isinstance(prompts, str | Path | LoadedPrompt | Outcome):
        given: list[OnePrompt] = [prompts]
    else:
        given = list(prompts)
    named: dict[str, OnePrompt] = {}
    for each in given:
        name, number = _name_of(each), 2
        while name in named:
            name, number = f"{_name_of(each)} ({number})", number + 1
        named[name] = each
    return named


def _name_of(prompt: OnePrompt) -> str:
    if prompt is None:
        return "base"
    if isinstance(prompt, LoadedPrompt):
        return prompt.name
    if isinstance(prompt, Outcome):
        return prompt.folder.name
    if isinstance(prompt, Path):
        return str(prompt)
    return prompt if len(prompt) <= _LONGEST_NAME else f"{prompt[: _LONGEST_NAME - 3]}..."


def _fresh_folder(name: str) -> Path:
    """`runs/NAME`, or the first of `runs/NAME-2`, `runs/NAME-3`, ... that is not there."""
    first = default_output(name)
    folder, number = first, 2
    while (folder / RECIPE_FILE).exists():
        folder = first.with_name(f"{first.name}-{number}")
        number += 1
    return folder


@contextmanager
def _process_state_kept() -> Iterator[None]:
    """A block after which the caller's random generators and threads are as they were before."""
    tensors, state = global_random_state()
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        restore_global_random_state(tensors, state)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
