"""Wrong recipes, models, rewards, datasets, artifacts and run folders, each made to order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from tests.cli.runs import with_changes, write_recipe
from tests.docs.bad_classes import OWN
from tests.docs.bad_registry import REGISTRY
from tests.docs.bad_shipping import EXPORTS, INSPECTIONS, SERVING, SUITES
from tests.fixtures.gguf_bytes import line, pair, text, whole
from tests.fixtures.tiny import tiny_model, tiny_tokenizer

TRAIN = ("train", "recipe.yaml")
MAMBA = pair("general.architecture", 8, text("mamba"))


@dataclass(frozen=True)
class Project:
    """A folder with a model, a finished run, and a recipe that works."""

    folder: Path

    def recipe(self, **changes: Any) -> Sequence[str]:
        """Change the recipe; `__` in a name stands for a dot, None deletes a key."""
        write_recipe(self.folder, Path("model"), **changes)
        return TRAIN

    def model(self, **changes: Any) -> Sequence[str]:
        """Change the model's config.json; None deletes a key."""
        path = self.folder / "model" / "config.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return TRAIN

    def reward(self, source: str, **changes: Any) -> Sequence[str]:
        """Write another reward.py."""
        self.recipe(**changes)
        (self.folder / "reward.py").write_text(source)
        return TRAIN

    def reward_returning(self, values: str, **changes: Any) -> Sequence[str]:
        """Write a reward that returns an expression."""
        source = f"def reward(completions, **kwargs):\n    return {values}\n"
        return self.reward(source, **changes)

    def write(self, name: str, text: str) -> Sequence[str]:
        """Write a file."""
        (self.folder / name).write_text(text)
        return TRAIN

    def gguf(self, content: bytes, name: str = "mine") -> Sequence[str]:
        """Write a GGUF file, and convert it."""
        (self.folder / "mine.gguf").write_bytes(content)
        return ("model", "convert", "mine.gguf", name)

    def pairs(self, text: str) -> Sequence[str]:
        """Write a file of compared answers, and check the reward on them."""
        self.write("pairs.jsonl", text)
        return ("reward", "check", "reward.py", "--pairs", "pairs.jsonl")

    def rows(self, name: str, *rows: Any, **changes: Any) -> Sequence[str]:
        """Write a JSONL dataset and name it in the recipe."""
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.folder / name).write_text("\n".join(lines) + "\n")
        return self.recipe(data={"path": name, **changes})

    def artifact(self, **changes: Any) -> Sequence[str]:
        """Change prompt.json of the run's artifact."""
        path = self.folder / "run" / "artifact" / "prompt.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return chat()

    def tensors(self, embeddings: torch.Tensor) -> Sequence[str]:
        """Write other tensors into the run's artifact."""
        path = self.folder / "run" / "artifact" / "prompt.safetensors"
        save_file({"embeddings": embeddings}, path)
        return chat()

    def copy(self, folder: str, name: str) -> None:
        """Copy a folder."""
        shutil.copytree(self.folder / folder, self.folder / name)

    def remove(self, *names: str, then: Sequence[str] = TRAIN) -> Sequence[str]:
        """Remove files."""
        for name in names:
            (self.folder / name).unlink()
        return then


def chat(*options: str) -> Sequence[str]:
    return ("chat", "run/artifact", "--query", "what is rain", *options)


def train(*options: str) -> Sequence[str]:
    return (*TRAIN, *options)


@dataclass(frozen=True)
class Case:
    """A wrong input: what a person did, and how to make it and run it."""

    section: str
    title: str
    arguments: Callable[[Project], Sequence[str]]


def _recipe_text(change: Callable[[str], str]) -> Callable[[Project], Sequence[str]]:
    def arguments(project: Project) -> Sequence[str]:
        text = yaml.safe_dump(with_changes({}), sort_keys=False)
        return project.write("recipe.yaml", change(text))

    return arguments


def _with_alias_bomb(text: str) -> str:
    levels = "".join(f"  - &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    return f"{text}augment:\n  - &a0 [x]\n{levels}"


def _stray_adapter(project: Project) -> Sequence[str]:
    (project.folder / "model" / "adapter_config.json").write_text("{}")
    return TRAIN


def _endless_template(project: Project) -> Sequence[str]:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    project.write("chat.jinja", loop)
    return project.recipe(model__template="chat.jinja")


def _other_base(project: Project) -> Sequence[str]:
    other = project.folder / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    return chat("--model", "other")


def _no_template(project: Project) -> Sequence[str]:
    tokenizer = tiny_tokenizer()
    shutil.rmtree(project.folder / "model")
    tiny_model("llama").save_pretrained(project.folder / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(project.folder / "model")
    return TRAIN


def _pickled(project: Project) -> Sequence[str]:
    model = project.folder / "model"
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return TRAIN


def _short_shape(project: Project) -> Sequence[str]:
    return project.model(num_hidden_layers=3)


def _changed_data(project: Project) -> Sequence[str]:
    """Move the run's rows into a file that has one more, as if it had been trained on the file."""
    rows = [*with_changes({})["data"]["rows"], "one more"]
    project.rows("queries.jsonl", *({"query": text} for text in rows), heldout=2)
    stored = project.folder / "run" / "recipe.resolved.yaml"
    tree = yaml.safe_load(stored.read_text())
    tree["data"] |= {"path": "queries.jsonl", "rows": None}
    stored.write_text(yaml.safe_dump(tree, sort_keys=False))
    return train("--output", "run", "--resume")


RECIPES = [
    ("a path with a typo", lambda p: ("train", "recipes.yaml")),
    ("a folder in place of a file", lambda p: ("train", ".")),
    ("aliases that stand for millions of values", _recipe_text(_with_alias_bomb)),
    ("a name that looks like a date", lambda p: p.write("recipe.yaml", "name: 2024-13-45")),
    ("a name that no folder can have", lambda p: p.recipe(name="..")),
    ("a line that is not YAML", _recipe_text(lambda t: t.replace("name: tiny", "name: a: b"))),
    ("a tab as indentation", _recipe_text(lambda t: t.replace("  path: model", "\tpath: model"))),
    ("a key given twice", _recipe_text(lambda t: t + "name: again\n")),
    ("a list in place of keys", _recipe_text(lambda t: "- name: tiny\n")),
    ("no name", lambda p: p.recipe(name=None)),
    ("no rewards", lambda p: p.recipe(rewards=[])),
    ("a misspelt section", lambda p: p.recipe(trainig={"steps": 3})),
    ("a misspelt key inside", lambda p: p.recipe(training__optimizer={"shedule": "linear"})),
    ("a name of TRL's", lambda p: train("training.learning_rate=0.1")),
    ("a name of PEFT's", lambda p: p.recipe(prompt={"prompt_tuning_init_text": "Be nice."})),
    ("a key in another place", lambda p: train("kl_coef=0.1")),
    ("a misspelt key of a list entry", lambda p: train("rewards.0.wieght=2")),
    ("true where a number belongs", lambda p: train("prompt.num_virtual_tokens=true")),
    ("text where a number belongs", lambda p: p.recipe(training__steps="many")),
    ("a fraction where a count belongs", lambda p: train("training.steps=1.5")),
    ("a number out of range", lambda p: p.recipe(algorithm__group_size=1)),
    ("a choice that does not exist", lambda p: p.recipe(model__dtype="bf16")),
    ("a kind that does not exist", lambda p: p.recipe(reference={"type": "inital"})),
    ("a kind left out", lambda p: p.recipe(reference={"text": "Be nice."})),
    ("a name where keys belong", lambda p: p.recipe(reference="none")),
    ("a setting without effect", lambda p: p.recipe(reference={"type": "initial"})),
    (
        "two settings that exclude each other",
        lambda p: p.recipe(training__optimizer={"lr": 0.1, "lr_relative": 0.1}),
    ),
    ("a clip range with one update per batch", lambda p: p.recipe(algorithm__clip_low=0.1)),
    (
        "rollouts during updates on given answers",
        lambda p: p.recipe(algorithm={"type": "supervised"}, training__overlap_rollouts=True),
    ),
    (
        "rollouts during updates of an adapter",
        lambda p: p.recipe(
            prompt={"type": "adapter", "text": "a"}, training__overlap_rollouts=True
        ),
    ),
    (
        "rollouts during updates of a sharded base",
        lambda p: p.recipe(distributed__base="sharded", training__overlap_rollouts=True),
    ),
    (
        "rollouts during the only update",
        lambda p: p.recipe(training={"steps": 1, "overlap_rollouts": True}),
    ),
    (
        "a reference for supervised tuning",
        lambda p: p.recipe(algorithm={"type": "supervised"}, reference={"type": "initial"}),
    ),
    (
        "an overlong margin beyond max_tokens",
        lambda p: p.recipe(algorithm__overlong_margin=5000),
    ),
    ("an algorithm with a typo", lambda p: p.recipe(algorithm={"type": "grop"})),
    ("greedy sampling in training", lambda p: p.recipe(sampling__temperature=0)),
    ("an override without a value", lambda p: train("training.steps")),
    ("an override past the end of a list", lambda p: train("rewards.2.weight=1")),
    ("an override below a plain value", lambda p: train("name.first=a")),
    ("a name that is no folder, and no --output", lambda p: p.recipe(name="a/b")),
    ("more queries per step than there are", lambda p: p.recipe(training__queries_per_step=9)),
    ("an empty prompt to start from", lambda p: p.recipe(prompt__init_text="")),
]
TEXT_PART = {"type": "text", "text": "Be safe."}
SOFT_PART = {"type": "soft", "init_text": "Be nice."}
PROMPTS = [
    ("a text, which has nothing to train", lambda p: p.recipe(prompt=TEXT_PART)),
    ("a kind of prompt that does not exist", lambda p: p.recipe(prompt={"type": "lora"})),
    (
        "a setting of another kind of prompt",
        lambda p: p.recipe(prompt={**SOFT_PART, "rank": 4}),
    ),
    (
        "an artifact and a text to start from",
        lambda p: p.recipe(prompt={**SOFT_PART, "from_artifact": "run/artifact"}),
    ),
    (
        "an artifact that is not there",
        lambda p: p.recipe(prompt={"type": "soft", "from_artifact": "runs/artifact"}),
    ),
    (
        "an artifact that another kind cannot start from",
        lambda p: p.recipe(prompt={"type": "adapter", "from_artifact": "run/artifact"}),
    ),
    (
        "a layer that the base does not have",
        lambda p: p.recipe(
            prompt={"type": "adapter", "method": {"type": "lora", "target_modules": ["query"]}}
        ),
    ),
    (
        "IA3 that scales inputs of layers it does not adapt",
        lambda p: p.recipe(
            prompt={"type": "adapter", "method": {"type": "ia3", "target_modules": ["k_proj"]}}
        ),
    ),
    (
        "a sequence of one",
        lambda p: p.recipe(prompt={"type": "sequence", "parts": [SOFT_PART]}),
    ),
    (
        "a sequence whose trained part is a text",
        lambda p: p.recipe(prompt={"type": "sequence", "parts": [SOFT_PART, TEXT_PART]}),
    ),
    (
        "steps that a population cannot share",
        lambda p: p.recipe(population=[{"name": "a"}, {"name": "b"}]),
    ),
    (
        "a member that changes what all share",
        lambda p: p.recipe(population=[{"name": "a", "changes": {"sampling.top_p": 0.9}}]),
    ),
    (
        "a population without held-out queries",
        lambda p: p.recipe(population=[{"name": "a"}], data__heldout=0),
    ),
    (
        "an evaluation without held-out queries",
        lambda p: ("eval", "run/artifact", "--recipe", "recipe.yaml", "--set", "data.heldout=0"),
    ),
]


def _race(project: Project, **changes: Any) -> Sequence[str]:
    """A recipe that searches among texts, changed as by `Project.recipe`."""
    prompt, search = dict(TEXT_PART), {"type": "texts", "texts": ["Be brief.", "Be kind."]}
    return project.recipe(**{"algorithm": None, "prompt": prompt, "search": search, **changes})


def _gepa(project: Project, **settings: Any) -> Sequence[str]:
    """A recipe that searches with GEPA, with these settings."""
    return _race(project, search={"type": "gepa", **settings})


SEARCHES = [
    (
        "GEPA with texts of your own and a writer",
        lambda p: _gepa(p, proposals=["Be brief."], writer={"type": "base"}),
    ),
    ("GEPA with evidence and no fresh queries", lambda p: _gepa(p, evidence={})),
    ("GEPA's request without its examples", lambda p: _gepa(p, template="<curr_param>")),
    ("GEPA with too few training queries", lambda p: _gepa(p, ranking_queries=500)),
    ("a searcher with a typo", lambda p: _race(p, search__type="text")),
    ("texts that start from embeddings", lambda p: _race(p, prompt=SOFT_PART)),
    ("one text to choose from", lambda p: _race(p, search__texts=["Be brief."])),
    ("a text that is there twice", lambda p: _race(p, search__texts=["Be brief."] * 2)),
    ("an algorithm beside a search", lambda p: _race(p, algorithm__group_size=4)),
    ("a learning rate in a search", lambda p: _race(p, training__optimizer={"lr": 0.1})),
    (
        "a constraint in a search",
        lambda p: _race(p, rewards__1__role="constraint", rewards__1__limit=0.1),
    ),
    ("rewards on one scale in a search", lambda p: _race(p, rewards__0__normalise="batch")),
    (
        "several greedy completions in a search",
        lambda p: _race(p, search__completions_per_query=2, sampling__temperature=0),
    ),
    (
        "evidence beside halving",
        lambda p: _race(p, search__evidence={}, search__keep=0.5),
    ),
    (
        "a rate of false findings of 1",
        lambda p: _race(p, search__evidence={"alpha": 1.0}),
    ),
    (
        "an effect that no text can reach",
        lambda p: _race(p, search__evidence={"spread": 0.1, "min_effect": 0.2}),
    ),
    (
        "rewards that differ by more than the stated spread",
        lambda p: (
            _race(p, search__evidence={"spread": 0.2}),
            p.write(
                "reward.py",
                "def reward(completions, **kwargs):\n"
                "    return [5.0 * (place < 2) for place in range(len(completions))]\n",
            ),
        )[1],
    ),
    (
        "an operator that needs a writer",
        lambda p: _race(p, search__type="evolution", search__operators={"rephrase": 1.0}),
    ),
    (
        "an objective that is no reward",
        lambda p: _race(p, search__type="evolution", search__objectives=["safe"]),
    ),
    (
        "components that are no lists",
        lambda p: _race(p, search__type="evolution", search__components={"tone": {"a": 1}}),
    ),
    ("a plan of a search", lambda p: _race(p) and ("plan", "recipe.yaml")),
]
REMOTE = {"type": "endpoint", "base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}


NO_MODEL = {"model__path": None, "model__dtype": None, "model__device": None}


def _remote(project: Project, **changes: Any) -> Sequence[str]:
    """The same for a model behind an endpoint."""
    return _race(project, **{**NO_MODEL, "engine": dict(REMOTE), **changes})


ENDPOINTS = [
    (
        "gradients for a model behind an endpoint",
        lambda p: p.recipe(engine=dict(REMOTE), **NO_MODEL),
    ),
    ("embeddings for an endpoint", lambda p: _remote(p, prompt=SOFT_PART)),
    ("a base beside an endpoint", lambda p: _remote(p, model__path="model")),
    ("no address", lambda p: _remote(p, engine={"type": "endpoint", "model": "m"})),
    ("a key in the recipe", lambda p: _remote(p, engine__api_key="my key")),
    ("a key that is not set", lambda p: _remote(p, engine__api_key="${RLPROMPT_NO_KEY}")),
    ("an address without http", lambda p: _remote(p, engine__base_url="127.0.0.1:9/v1")),
    ("nobody at the address", lambda p: _remote(p)),
    ("sampling that the protocol does not have", lambda p: _remote(p, sampling__top_k=4)),
    ("money without prices", lambda p: _remote(p, budget={"max_cost": 1.0})),
    ("a budget without an endpoint", lambda p: _race(p, budget={"max_tokens": 1000})),
    ("a budget without a limit", lambda p: _remote(p, budget={})),
    ("a base in shards for an endpoint", lambda p: _remote(p, distributed__base="sharded")),
]
ADDRESS = "http://127.0.0.1:9/v1"
VLLM = {"type": "vllm", "urls": [ADDRESS], "start_timeout": 0.0, "retries": 0}


def _vllm(project: Project, engine: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """The recipe with its completions drawn on a vLLM server, which is not there."""
    return project.recipe(engine={**VLLM, **(engine or {})}, **changes)


SERVERS = [
    ("nobody at a server's address", lambda p: _vllm(p)),
    ("no server", lambda p: _vllm(p, {"urls": []})),
    ("a server named twice", lambda p: _vllm(p, {"urls": [ADDRESS, ADDRESS]})),
    ("an address that is none", lambda p: _vllm(p, {"urls": "gpu1:8000"})),
    (
        "a server's key in the clear",
        lambda p: _vllm(p, {"urls": "http://gpu1:8000/v1", "api_key": "${HOME}"}),
    ),
    ("a prefix on a vLLM server", lambda p: _vllm(p, prompt={"type": "prefix"})),
    (
        "IA3 on a vLLM server",
        lambda p: _vllm(p, prompt={"type": "adapter", "method": {"type": "ia3"}}),
    ),
    ("draws that leave tokens out", lambda p: _vllm(p, sampling__top_p=0.9)),
    ("a temperature that vLLM refuses", lambda p: _vllm(p, sampling__temperature=2.5)),
    ("a base in shards beside a server", lambda p: _vllm(p, distributed__base="sharded")),
    ("a folder of adapters without any", lambda p: _vllm(p, {"adapter_folder": "adapters"})),
    ("a weight below one", lambda p: _vllm(p, {"importance_cap": 0.5})),
]
MODELS = [
    ("a path with a typo", lambda p: p.recipe(model__path="modle")),
    ("a folder that is not there", lambda p: p.recipe(model__path="models/tiny")),
    ("a file in place of a folder", lambda p: p.recipe(model__path="model/config.json")),
    ("a folder that is no model", lambda p: p.remove("model/config.json")),
    ("an artifact named as the model", lambda p: p.recipe(model__path="run/artifact")),
    ("no weights", lambda p: p.remove("model/model.safetensors")),
    ("pickled weights only", _pickled),
    ("no tokenizer", lambda p: p.remove("model/tokenizer.json")),
    ("weights of another shape", _short_shape),
    ("a quantised model", lambda p: p.model(quantization_config={"quant_method": "gptq"})),
    ("a model type that nobody knows", lambda p: p.model(model_type="lama")),
    (
        "a model with code of its own",
        lambda p: p.model(model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}),
    ),
    ("a revision of a local folder", lambda p: p.recipe(model__revision="main")),
    ("a device that does not exist", lambda p: p.recipe(model__device="gpu")),
    ("float16 on the CPU", lambda p: p.recipe(model__dtype="float16")),
    (
        "C++ kernels for float32",
        lambda p: p.recipe(model__cpu_kernels="on", model__dtype="float32"),
    ),
    ("CUDA graphs on a CPU", lambda p: p.recipe(engine__cuda_graphs="on")),
    ("a tokenizer without chat template", _no_template),
    (
        "a chat template without a place for the system message",
        lambda p: p.recipe(model__template="{{ messages[-1]['content'] }}"),
    ),
    ("a template that is not there", lambda p: p.recipe(model__template="chat.jinja")),
    ("a template whose loops never end", _endless_template),
    ("an adapter beside the model", _stray_adapter),
    ("an embedded model with a typo", lambda p: ("model", "fetch", "smollm-135m")),
    ("a GGUF file that is none", lambda p: p.gguf(b"<!DOCTYPE html>")),
    ("a GGUF file that is cut short", lambda p: p.gguf(whole(counts=(200, 20)))),
    (
        "a GGUF file whose tensors overlap",
        lambda p: p.gguf(whole((), (line(), line("b")))),
    ),
    ("a GGUF file of another architecture", lambda p: p.gguf(whole((MAMBA,)))),
    ("a GGUF file that is not there", lambda p: ("model", "convert", "mine.gguf", "mine")),
    ("a converted model named as an embedded one", lambda p: p.gguf(whole(), "smollm2-135m")),
    ("a converted model with a path as its name", lambda p: p.gguf(whole(), "../mine")),
]
REWARDS = [
    ("a file that is not there", lambda p: p.recipe(rewards=[{"path": "rewards.py:reward"}])),
    ("an object that is not there", lambda p: p.recipe(rewards=[{"path": "reward.py:rewrad"}])),
    ("a built-in that does not exist", lambda p: p.recipe(rewards=[{"path": "builtin:lenght"}])),
    (
        "an option that does not exist",
        lambda p: p.recipe(rewards=[{"path": "builtin:length", "options": {"maximum": 5}}]),
    ),
    ("a module that is not installed", lambda p: p.reward("import absent_package\n")),
    ("a weight of 0", lambda p: p.recipe(rewards__0__weight=0.0)),
    ("an option left out", lambda p: p.recipe(rewards=[{"path": "builtin:length"}])),
    ("only metrics", lambda p: p.recipe(rewards=[{"path": "reward.py:reward", "role": "metric"}])),
    ("two of one name", lambda p: p.recipe(rewards=[{"path": "reward.py:reward"}] * 2)),
    ("too few values", lambda p: p.reward_returning("[1.0]")),
    ("NaN", lambda p: p.reward_returning("[float('nan')] * len(completions)")),
    ("text in place of numbers", lambda p: p.reward_returning("['good'] * len(completions)")),
    ("an exception", lambda p: p.reward_returning("[1 / 0]")),
    (
        "longer than its timeout",
        lambda p: p.reward_returning("__import__('time').sleep(0.5)", rewards__0__timeout=0.1),
    ),
    (
        "a column that the data does not have",
        lambda p: p.reward("def reward(completions, answer):\n    return [0.0]\n"),
    ),
    ("a constraint without a limit", lambda p: p.recipe(rewards__1__role="constraint")),
    ("a limit of a reward that is no constraint", lambda p: p.recipe(rewards__0__limit=0.1)),
    ("a reward that TRL does not ship", lambda p: p.recipe(rewards=[{"path": "trl:think_format"}])),
    (
        "a DSPy metric without its adapter",
        lambda p: p.reward(
            "def metric(example, pred, trace=None):\n    return 1.0\n",
            rewards=[{"path": "reward.py:metric"}],
        ),
    ),
    (
        "verl's function without the column it needs",
        lambda p: p.reward(
            "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
            "    return 1.0\n",
            rewards=[{"path": "reward.py:compute_score", "adapter": "verl"}],
        ),
    ),
    (
        "a guard whose gold reward is trained on",
        lambda p: p.recipe(guards=[{"type": "parting", "name": "hacked", "gold": "vowels"}]),
    ),
    (
        "a guard that watches a metric nobody logs",
        lambda p: p.recipe(
            guards=[{"type": "limit", "name": "long", "metric": "lenght", "above": 1, "window": 2}]
        ),
    ),
    (
        "evidence where the highest mean is kept",
        lambda p: p.recipe(evaluation__evidence={"alpha": 0.01}),
    ),
    (
        "acceptance without held-out queries",
        lambda p: p.recipe(evaluation__keep="accepted", data__heldout=0),
    ),
    (
        "acceptance on too few held-out queries",
        lambda p: p.recipe(evaluation__keep="accepted"),
    ),
    (
        "a way to keep prompts that there is not",
        lambda p: p.recipe(evaluation__keep="accept"),
    ),
    (
        "acceptance of a reward that scores nothing",
        lambda p: p.reward_returning(
            "[None] * len(completions)",
            evaluation__keep="accepted",
            evaluation__evidence={"alpha": 0.9},
        ),
    ),
    (
        "values that differ by more than the stated spread",
        lambda p: p.reward(
            "def reward(completions, trainer_state, **kwargs):\n"
            "    return [5.0 * (trainer_state.global_step > 0)] * len(completions)\n",
            evaluation__keep="accepted",
            evaluation__evidence={"alpha": 0.99, "spread": 1.0},
            data__heldout=4,
        ),
    ),
    (
        "an artifact chosen by a reward that is not there",
        lambda p: p.recipe(evaluation__select_by="vowel"),
    ),
    ("a reward to check that is not there", lambda p: ("reward", "check", "mine.py")),
    ("pairs that are no pairs", lambda p: p.pairs("{}")),
]


def asked(name: str, **options: Any) -> Callable[[Project], Sequence[str]]:
    """A recipe whose reward asks a model or a server."""
    return lambda p: p.recipe(rewards=[{"path": f"builtin:{name}", "options": options}])


def _reward_recipe(**changes: Any) -> Callable[[Project], Sequence[str]]:
    """A recipe of `rlprompt reward train` over judged answers; None deletes a key."""

    def arguments(project: Project) -> Sequence[str]:
        rows = [{"query": f"q {i}", "completion": "a", "score": i % 2} for i in range(40)]
        project.rows("judged.jsonl", *rows)
        project.rows("worded.jsonl", *({**row, "score": "good"} for row in rows))
        tree = {
            "name": "judged",
            "model": {"path": "model", "device": "cpu"},
            "data": {"type": "labels", "path": "judged.jsonl"},
        } | changes
        kept = {key: value for key, value in tree.items() if value is not None}
        project.write("preference.yaml", yaml.safe_dump(kept))
        return ("reward", "train", "preference.yaml")

    return arguments


ASKING = [
    ("a preference model that is not there", asked("preference", path="modle")),
    (
        "a preference model that is yet to be trained",
        asked("preference", path="../runs/harmlessness/model"),
    ),
    ("a language model in place of a preference model", asked("preference", path="model")),
    ("a judge's verdicts that do not differ", asked("judge", rubric="?", verdicts={"yes": 1})),
    ("a server's address without a scheme", asked("http", url="node7:8770/score")),
    ("a secret in a server's address", asked("http", url="https://node7/score?key=s3cret")),
    ("a token that is not set", asked("http", url="https://node7/score", token_env="NO_SUCH")),
    (
        "a server that is not there",
        asked("http", url="http://127.0.0.1:9/score", retries=0),
    ),
    (
        "a worker process that ends while it loads",
        lambda p: p.reward("import os\nos._exit(3)\n", rewards__0__isolation={}),
    ),
    ("serving to all without a token", lambda p: ("reward", "serve", "reward.py", "--host", "::")),
    ("an unknown key in a preference recipe", _reward_recipe(learn={"epochs": 1})),
    (
        "a judgement that is no number",
        _reward_recipe(data={"type": "labels", "path": "worded.jsonl"}),
    ),
    ("too little to learn from", _reward_recipe(test={"heldout": 0.01})),
]
DATA = [
    ("a path with a typo", lambda p: p.rows("queries.jsonl", "a", path="querys.jsonl")),
    ("a file of another type", lambda p: p.recipe(data={"path": "reward.py"})),
    ("a line that is not JSON", lambda p: p.rows("queries.jsonl", '"a"', "{query: b}")),
    (
        "another name for the query column",
        lambda p: p.rows("queries.jsonl", {"question": "a"}, {"question": "b"}),
    ),
    ("an empty query", lambda p: p.rows("queries.jsonl", {"query": "a"}, {"query": " "})),
    (
        "a column that some rows lack",
        lambda p: p.rows("queries.jsonl", {"query": "a", "answer": 1}, {"query": "b"}),
    ),
    (
        "a system message in the data",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]},
        ),
    ),
    (
        "a conversation that ends with the assistant",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        ),
    ),
    (
        "a speaker that is not known",
        lambda p: p.rows(
            "queries.jsonl",
            {"chat": [{"from": "human", "value": "a"}]},
            {"chat": [{"from": "tool", "value": "b"}]},
            query_column="chat",
        ),
    ),
    (
        "an image in a message",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        ),
    ),
    (
        "two system turns to start from",
        lambda p: p.rows(
            "queries.jsonl",
            *(
                {"query": [{"role": "system", "content": x}, {"role": "user", "content": x}]}
                for x in "ab"
            ),
            system="init",
        ),
    ),
    (
        "the same query in train and held-out",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": "What is snow?", "split": "train"},
            {"query": "what is snow", "split": "heldout"},
            split_column="split",
        ),
    ),
    (
        "the same query in train and test",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": "What is snow?", "split": "train"},
            {"query": "What is rain?", "split": "validation"},
            {"query": "what is snow", "split": "test"},
            split_column="split",
        ),
    ),
    (
        "an unknown word in the split column",
        lambda p: p.rows(
            "queries.jsonl",
            {"query": "What is snow?", "split": "train"},
            {"query": "What is rain?", "split": "holdback"},
            split_column="split",
        ),
    ),
    ("a test file that is not there", lambda p: p.recipe(data__test={"path": "test.jsonl"})),
    ("test queries as a bare path", lambda p: p.recipe(data__test="test.jsonl")),
    ("too few queries to hold some out", lambda p: p.recipe(data={"rows": ["a"]})),
    ("neither a path nor rows", lambda p: p.recipe(data={"heldout": 2})),
    ("a share above 1", lambda p: p.recipe(data__heldout=1.5)),
    (
        "a JSON array in a .jsonl file",
        lambda p: p.rows("queries.jsonl", '[{"query": "a"}, {"query": "b"}]'),
    ),
    ("a query longer than the model", lambda p: p.recipe(data__rows=["rain " * 600, *"abcdef"])),
]
ARTIFACTS = [
    ("a folder of a run that is no artifact", lambda p: ("chat", "run/checkpoints")),
    (
        "an artifact alone whose recipe names code",
        lambda p: (shutil.copytree(p.folder / "run/artifact", p.folder / "got"), ("eval", "got"))[
            1
        ],
    ),
    ("nothing to evaluate", lambda p: ("eval",)),
    ("a damaged prompt.json", lambda p: (p.write("run/artifact/prompt.json", "{"), chat())[1]),
    ("an artifact of a newer version", lambda p: p.artifact(schema_version=99)),
    ("an unknown representation", lambda p: p.artifact(representation="hypernetwork")),
    ("another base", _other_base),
    ("another chat template", lambda p: p.artifact(template_hash="0" * 64)),
    ("no tensors", lambda p: p.remove("run/artifact/prompt.safetensors", then=chat())),
    ("tensors of another width", lambda p: p.tensors(torch.ones(3, 8))),
    ("tensors of integers", lambda p: p.tensors(torch.ones(3, 64, dtype=torch.int64))),
    ("tensors that are not finite", lambda p: p.tensors(torch.full((3, 64), torch.inf))),
    ("a base that is not there", lambda p: chat("--model", "./models/tiny")),
]
RUNS = [
    ("a folder that holds another run", lambda p: train("--output", "run")),
    ("--resume where there is no run", lambda p: train("--output", "new", "--resume")),
    (
        "--resume with another recipe",
        lambda p: train("training.steps=9", "seed=1", "--output", "run", "--resume"),
    ),
    ("resume of a folder without a run", lambda p: ("resume", "new")),
    ("resume with what must stay", lambda p: ("resume", "run", "sampling.temperature=0.5")),
    ("resume with fewer steps than were made", lambda p: ("resume", "run", "training.steps=1")),
    ("--resume after the dataset has changed", _changed_data),
    (
        "a damaged checkpoint",
        lambda p: (
            p.write("run/checkpoints/step_000003/state.json", "{"),
            train("--output", "run", "--resume"),
        )[1],
    ),
    ("a file as the output", lambda p: train("--output", "recipe.yaml")),
]
FRESH = ("who walks", "where is rain now", "what is a land", "he is the sun", "men are there")
CERTIFY = ("certify", "run", "--data", "fresh.jsonl", "--fails-above", "0.9")


def _certify(
    *options: str, rows: Sequence[Any] = FRESH, **changes: Any
) -> Callable[[Project], Sequence[str]]:
    """Certify the run's artifact on fresh queries, with a recipe beside it."""

    def arguments(project: Project) -> Sequence[str]:
        project.recipe(**changes)
        lines = [json.dumps(row if isinstance(row, dict) else {"query": row}) for row in rows]
        project.write("fresh.jsonl", "\n".join(lines) + "\n")
        return (*CERTIFY, *options)

    return arguments


def _risk(*options: str, **changes: Any) -> Callable[[Project], Sequence[str]]:
    """The same with a risk and a limit."""
    return _certify("--reward", "reward.py", "--alpha", "0.6", *options, **changes)


def _labelled(*rows: Mapping[str, Any]) -> Callable[[Project], Sequence[str]]:
    """The same with labelled answers, from which the judge's errors are known."""

    def arguments(project: Project) -> Sequence[str]:
        project.write("labels.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n")
        return _risk("--judge-labels", "labels.jsonl")(project)

    return arguments


def _of_split(*options: str, **changes: Any) -> Callable[[Project], Sequence[str]]:
    """Certify on a split of the recipe's data."""

    def arguments(project: Project) -> Sequence[str]:
        project.recipe(**changes)
        where = ("certify", "run", "--recipe", "recipe.yaml", "--reward", "vowels")
        return (*where, "--alpha", "0.6", "--fails-above", "0.9", *options)

    return arguments


def _verify_damaged(project: Project) -> Sequence[str]:
    project.write("run/artifact/certificate.json", "{}")
    return ("certify", "run", "--verify")


def _without_summary(project: Project) -> Sequence[str]:
    (project.folder / "run" / "summary.json").unlink()
    return _of_split("--split", "validation")(project)


CERTIFICATES = [
    ("no risk", _certify("--alpha", "0.6")),
    ("a reward that is not there", _certify("--alpha", "0.6", "--reward", "mine.py")),
    ("no limit", _certify("--reward", "reward.py")),
    ("a limit of 1", _certify("--reward", "reward.py", "--alpha", "1")),
    ("a limit that is given twice", _risk("--alpha", "0.6")),
    ("several limits beside a sequence of prompts", _risk("--alpha", "0.7", "--in-sequence")),
    ("a delta of 0", _risk("--delta", "0")),
    ("two rules for a failure", _risk("--fails-below", "0.1")),
    (
        "no queries",
        lambda p: ("certify", "run", "--reward", "reward.py", "--alpha", "0.6"),
    ),
    ("a split that is none", _risk("--split", "train")),
    ("a split beside a file of queries", _risk("--split", "validation")),
    ("a recipe without test queries", _of_split()),
    (
        "fresh queries that the recipe trains on",
        _risk("--recipe", "recipe.yaml", rows=["what is rain"]),
    ),
    ("a column that is not there", _risk("--where", "kind=a")),
    (
        "a condition that no query meets",
        _risk("--where", "kind=b", rows=[{"query": "who", "kind": "a"}]),
    ),
    ("groups of a column that is not there", _risk("--groups", "kind")),
    ("a shift of a kind that is not known", _risk("--shift", "l2:0.1")),
    ("a shift beyond what there can be", _risk("--shift", "tv:2")),
    ("an option of a reward that is in the recipe", _of_split("--option", "a=1", data__test=2)),
    (
        "fewer prompts than the records name",
        _of_split("--split", "validation", "--num-compared", "1"),
    ),
    ("a run whose record is gone", _without_summary),
    ("a sequence without all prompts", _risk("--in-sequence", "--num-compared", "3")),
    (
        "one artifact twice",
        lambda p: (
            _risk()(p)
            and (
                "certify",
                "run",
                "run/artifact",
                *CERTIFY[2:],
                "--reward",
                "reward.py",
                "--alpha",
                "0.6",
            )
        ),
    ),
    ("a folder that is no artifact", lambda p: ("certify", "model", "--verify")),
    ("labels without a person's verdict", _labelled({"judge": 1.0})),
    ("labels of one kind only", _labelled({"judge": 1.0, "human": 1}, {"judge": 0.0, "human": 1})),
    ("a judge's verdict that is no number", _labelled({"judge": "yes", "human": 1})),
    ("labelled answers without an answer", _labelled({"query": "who is he", "human": 1})),
    (
        "a judge of several completions",
        lambda p: (*_labelled({"judge": 1.0, "human": 1})(p), "--completions", "2"),
    ),
    ("nothing to verify", lambda p: ("certify", "run", "--verify")),
    ("a claim beside --verify", lambda p: ("certify", "run", "--verify", "--alpha", "0.5")),
    ("a damaged certificate", _verify_damaged),
]
FORECAST = ("forecast", "recipe.yaml")


def _without_score(project: Project) -> Sequence[str]:
    project.recipe(rewards__0__role="metric", algorithm={"type": "distill", "teacher": "Be brief."})
    return FORECAST


FORECASTS = [
    ("no reward that is learned from", _without_score),
    ("a difference of 0", lambda p: (*FORECAST, "--difference", "0")),
    ("texts that are not there", lambda p: (*FORECAST, "--texts", "texts.json")),
    (
        "texts that are no list",
        lambda p: (p.write("texts.json", '{"a": 1}'), (*FORECAST, "--texts", "texts.json"))[1],
    ),
]
SUBMIT = ("submit", "recipe.yaml", "--dry-run")
CLUSTER = [
    (
        "an unknown key in a cluster file",
        lambda p: (p.write("c.yaml", "partitoin: gpu"), (*SUBMIT, "--cluster", "c.yaml"))[1],
    ),
    (
        "a time limit without quotes",
        lambda p: (p.write("c.yaml", "time: 12:00:00"), (*SUBMIT, "--cluster", "c.yaml"))[1],
    ),
    ("a wrong recipe", lambda p: (*SUBMIT, "training.stepps=3")),
    ("a sweep without a list", lambda p: (*SUBMIT, "--sweep", "seed=1")),
    ("a sweep over a wrong key", lambda p: (*SUBMIT, "--sweep", "sede=[1, 2]")),
    (
        "ranks per node beside GPUs",
        lambda p: (*SUBMIT, "--gpus-per-node", "2", "--tasks-per-node", "2"),
    ),
    ("a limit on a sweep that is none", lambda p: (*SUBMIT, "--max-parallel", "2")),
    ("a server's address without a server", lambda p: (*SUBMIT, "name=at-{server}")),
    ("an output that holds another run", lambda p: (*SUBMIT, "seed=5", "--output", "run")),
    ("--status where nothing was submitted", lambda p: ("submit", "--status", "--output", "run")),
    ("no recipe", lambda p: ("submit",)),
    ("fewer queries than ranks", lambda p: (*SUBMIT, "--tasks-per-node", "8")),
    (
        "GPUs for a model on the CPU",
        lambda p: (*SUBMIT, "model.device=cpu", "--gpus-per-node", "1"),
    ),
    (
        "secondary shards that do not divide the ranks",
        lambda p: train("distributed.base=sharded", "distributed.secondary_shards=2"),
    ),
    (
        "NVMe in a folder that is not there",
        lambda p: train(
            "distributed.base=sharded",
            "distributed.offload=nvme",
            "distributed.nvme_path=/nowhere/nvme",
        ),
    ),
    (
        "a plan for two bases",
        lambda p: ("plan", "recipe.yaml", "--model-size", "8b", "--model", "model"),
    ),
    ("a plan for an unknown size", lambda p: ("plan", "recipe.yaml", "--model-size", "9b")),
    ("a plan for more GPUs than queries", lambda p: ("plan", "recipe.yaml", "--gpus", "8")),
]
SECTIONS: dict[str, list[tuple[str, Callable[[Project], Sequence[str]]]]] = {
    "Recipes": RECIPES,
    "Prompts": PROMPTS,
    "Classes of your own": OWN,
    "Search": SEARCHES,
    "Models behind endpoints": ENDPOINTS,
    "vLLM servers": SERVERS,
    "Models": MODELS,
    "Rewards": REWARDS,
    "Rewards that ask a model": ASKING,
    "Datasets": DATA,
    "Artifacts": ARTIFACTS,
    "Run folders": RUNS,
    "Registry": REGISTRY,
    "Certificates": CERTIFICATES,
    "Forecasts": FORECASTS,
    "Suites": SUITES,
    "Inspections": INSPECTIONS,
    "Exports": EXPORTS,
    "Serving": SERVING,
    "Clusters": CLUSTER,
}
CASES = [
    Case(section, title, arguments)
    for section, cases in SECTIONS.items()
    for title, arguments in cases
]
