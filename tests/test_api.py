"""rlprompt from Python: objects in a recipe's places, what a run gives, and what is left behind."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rlprompt
from rlprompt.errors import InputError
from tests.fixtures.runs import QUERIES, artifact_embeddings, comparable_rows
from tests.fixtures.tiny import save_tiny

SHORT: dict[str, Any] = {
    "training": {"steps": 3, "queries_per_step": 2},
    "algorithm": {"group_size": 4},
    "sampling": {"max_tokens": 6},
    "progress": False,
}


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """The share of a, e, i, o and u."""
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in completions]


class Long:
    """The share of a number of characters that a completion has."""

    def __init__(self, characters: int) -> None:
        self.characters = characters

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [min(1.0, len(text) / self.characters) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    return save_tiny(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without `output` go below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> dict[str, Any]:
    """A transformers model in memory, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)}


def learn(**keywords: Any) -> rlprompt.Run:
    """A short run."""
    plain = {"rewards": vowels, "data": list(QUERIES), "heldout": 2, "prompt": "the sun and rain"}
    run = rlprompt.train(**{**SHORT, **plain, **keywords})
    assert isinstance(run, rlprompt.Run)
    return run


def test_five_lines_from_nothing_to_a_run(folder: Path) -> None:
    run = rlprompt.train(
        model=folder, rewards=vowels, data=list(QUERIES), prompt="the sun and rain", **SHORT
    )
    assert run.folder == Path("runs") / "run"
    metrics = run.metrics
    assert (metrics.steps, str(metrics.stop_reason)) == (3, "finished")
    assert metrics.learned is not None and metrics.base is not None
    assert metrics.handwritten is not None  # the text that the prompt starts from
    assert [row["step"] for row in metrics.history] == [1, 2, 3]
    assert {row["who"] for row in metrics.evaluations} == {"base", "handwritten", "learned"}
    assert run.prompt.kind == "soft" and run.prompt.num_tokens > 1
    assert "<iframe" in run.report._repr_html_() and run.report.path.is_file()
    answer = run.prompt.generate("the rain", max_tokens=5)
    assert answer == run.prompt.generate("the rain", max_tokens=5)
    again = rlprompt.load_prompt(run.folder)
    assert again.generate("the rain", max_tokens=5) == answer


def test_keywords_are_the_recipe_that_says_the_same(folder: Path, tmp_path: Path) -> None:
    """Objects in memory change nothing about the numbers of a run."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def vowels(completions, **columns):\n"
        "    return [sum(t.count(v) for v in 'aeiou') / max(1, len(t)) for t in completions]\n"
    )
    recipe = {
        "name": "written",
        "model": {"path": str(folder)},
        "prompt": {"type": "soft", "init_text": "the sun and rain", "num_virtual_tokens": None},
        "data": {"rows": list(QUERIES), "heldout": 2},
        "rewards": [{"path": "reward.py:vowels", "name": "vowels"}],
        "evaluation": {"handwritten": "the sun and rain"},
        **{key: value for key, value in SHORT.items() if key != "progress"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    written = rlprompt.train(tmp_path / "recipe.yaml", output="written", progress=False)
    mapped = rlprompt.train(recipe, output="mapped", progress=False)
    given = learn(model=folder, output="given")
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(Path("written"), kind) == comparable_rows(Path("given"), kind)
        assert comparable_rows(Path("written"), kind) == comparable_rows(Path("mapped"), kind)
    assert written.metrics.learned == mapped.metrics.learned == given.metrics.learned


def test_a_search_begins_at_the_text(folder: Path) -> None:
    texts = ["the sun and rain", "in here", "there"]
    run = rlprompt.train(
        model=folder,
        rewards=vowels,
        data=list(QUERIES),
        heldout=2,
        prompt=texts[0],
        search={"type": "texts", "texts": texts[1:], "completions": 2},
        training={"steps": 9, "queries_per_step": 2},
        sampling={"max_tokens": 6},
        progress=False,
    )
    assert isinstance(run, rlprompt.Run)
    assert [row["text"] for row in run.summary["candidates"]] == texts
    assert run.metrics.handwritten is not None
    assert run.prompt.kind == "text" and run.prompt.text in texts
    answer = run.prompt.generate("the rain", max_tokens=5)
    assert rlprompt.load_prompt(run.folder).generate("the rain", max_tokens=5) == answer


def test_keywords_replace_parts_of_a_recipe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "r",
                "model": {"path": str(folder)},
                "data": {"rows": ["a"]},
                "rewards": [{"path": "builtin:length", "options": {"max": 3}}],
                "training": {"steps": 50, "queries_per_step": 2},
                "sampling": {"max_tokens": 6},
            }
        )
    )
    run = rlprompt.train(
        "r.yaml", data=list(QUERIES), rewards=[vowels], training={"steps": 2}, progress=False
    )
    assert run.folder == Path("runs/r")
    assert run.metrics.steps == 2
    found = yaml.safe_load((run.folder / "recipe.resolved.yaml").read_text())
    assert found["training"]["queries_per_step"] == 2
    assert found["rewards"][0]["path"].startswith("memory:vowels@")


def snapshot(model: PreTrainedModel) -> tuple[Any, ...]:
    """All that a run could change about a model."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    parameters = [
        (name, p.data_ptr(), p.requires_grad, p.grad, p.detach().clone())
        for name, p in model.named_parameters()
    ]
    return modules, parameters, model.config._attn_implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_memory_stays_as_it_is(folder: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before, logits = snapshot(model), model(ids).logits
    run = learn(model=model, tokenizer=tokenizer)
    with torch.no_grad():
        after = snapshot(model)
        assert torch.equal(model(ids).logits, logits)
    assert before[0] == after[0] and before[2] == after[2]
    for (name, *one), (other, *two) in zip(before[1], after[1], strict=True):
        assert (name, *one[:3]) == (other, *two[:3])
        assert torch.equal(one[3], two[3])
    shared = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in run.parts.policy.base.model.parameters()} == shared
    assert run.prompt.generate("the rain", max_tokens=3, seed=1) is not None


def test_a_model_in_memory_learns_what_the_same_model_from_a_folder_does(
    folder: Path, loaded: dict[str, Any]
) -> None:
    named = learn(model=folder, output="named")
    given = learn(**loaded, output="given")
    opened = learn(model=rlprompt.open_model(folder, dtype="float32"), output="opened")
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(Path("given"), kind) == comparable_rows(Path("opened"), kind)
    assert given.metrics.learned == opened.metrics.learned
    assert named.parts.policy.base.fingerprint == given.parts.policy.base.fingerprint


@pytest.mark.parametrize("form", ["texts", "mappings", "dataset", "frame", "tuple"])
def test_every_form_of_data_is_the_same_data(form: str, loaded: dict[str, Any]) -> None:
    rows = [{"prompt": text, "label": text[:1]} for text in QUERIES]
    if form == "dataset":
        import datasets

        data: Any = datasets.Dataset.from_list(rows)
    elif form == "frame":
        pandas = pytest.importorskip("pandas")
        data = pandas.DataFrame(rows)
    else:
        data = {"texts": list(QUERIES), "mappings": rows, "tuple": tuple(rows)}[form]
    run = learn(**loaded, data=data)
    assert sorted(query.text for query in run.parts.data.train) == sorted(
        text for text in QUERIES if text not in {q.text for q in run.parts.data.heldout}
    )
    if form != "texts":
        assert all(q.columns["label"] == q.text[:1] for q in run.parts.data.train)


def test_held_out_queries_may_be_a_dataset_of_their_own(loaded: dict[str, Any]) -> None:
    run = learn(**loaded, data=list(QUERIES[:5]), heldout=list(QUERIES[5:]))
    assert {q.text for q in run.parts.data.heldout} == set(QUERIES[5:])
    assert {q.text for q in run.parts.data.train} == set(QUERIES[:5])


def test_rewards_of_every_form_together(loaded: dict[str, Any]) -> None:
    rewards = [
        vowels,
        lambda completions, **columns: [1.0] * len(completions),
        Long(20),
        "builtin:repetition",
        {"path": Long(9), "name": "nine", "weight": 0.5},
        {"path": "builtin:length", "role": "metric", "options": {"max": 3}},
    ]
    run = learn(**loaded, rewards=rewards)
    names = run.metrics.evaluations[-1]["rewards"]
    assert list(names) == ["vowels", "reward", "Long", "repetition", "nine", "length"]


def test_a_start_from_a_prompt_in_memory_and_from_an_artifact(loaded: dict[str, Any]) -> None:
    first = learn(**loaded)
    for number, start in enumerate((first.prompt, first.folder / "artifact", str(first.folder))):
        prompt = Path(start) if isinstance(start, Path) else start
        run = learn(**loaded, prompt=prompt, output=f"from{number}", training={"steps": 1})
        state = run.metrics.evaluations
        learned = [row for row in state if row["who"] == "learned" and row["step"] == 0]
        assert learned[0]["reward"] == first.metrics.learned


def test_resuming_from_python(loaded: dict[str, Any]) -> None:
    whole = learn(**loaded, output="whole", training={"steps": 4, "queries_per_step": 2})
    calls = 0

    def counted(completions: list[str], **columns: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise RuntimeError("the machine fell over")
        return vowels(completions)

    stop_at = 6
    keywords = {**loaded, "rewards": counted, "training": {"steps": 4, "queries_per_step": 2}}
    keywords["training"]["save_every"] = 1
    with pytest.raises(InputError, match="fell over"):
        learn(**keywords, output="cut")
    with pytest.raises(InputError, match="holds another run"):
        learn(**keywords, output="cut")
    stop_at = 10**9
    resumed = learn(**keywords, output="cut", resume=True)
    assert resumed.metrics.learned == whole.metrics.learned
    assert torch.equal(artifact_embeddings(Path("cut")), artifact_embeddings(Path("whole")))


def test_a_run_goes_on_without_a_recipe(folder: Path, loaded: dict[str, Any]) -> None:
    """As it was begun, with what may change; objects in memory are given again."""
    more: dict[str, Any] = {"training": {"steps": 5}, "output": "run", "resume": True}
    Path("queries.jsonl").write_text("".join(f'{{"query": "{text}"}}\n' for text in QUERIES))
    learn(model=folder, rewards="builtin:sentence", data="queries.jsonl", output="run", seed=3)
    run = rlprompt.train(**more, progress=False)
    assert run.metrics.steps == 5 and [row["step"] for row in run.metrics.history] == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert yaml.safe_load((run.folder / "recipe.resolved.yaml").read_text())["seed"] == 3
    learn(**loaded, output="other")
    with pytest.raises(InputError, match="memory"):
        rlprompt.train(**{**more, "output": "other"}, progress=False)
    again = rlprompt.train(
        **{**more, "output": "other"}, **loaded, rewards=vowels, data=list(QUERIES), heldout=2,
        progress=False,
    )  # fmt: skip
    assert again.metrics.steps == 5
    with pytest.raises(InputError, match=r"seed \(was 3, is 4\)"):
        rlprompt.train(**more, seed=4, progress=False)
    with pytest.raises(InputError, match="holds no run to resume"):
        rlprompt.train(**{**more, "output": "nowhere"}, progress=False)


def test_resuming_with_another_function_is_refused(loaded: dict[str, Any]) -> None:
    def reward(completions: list[str], **columns: Any) -> list[float]:
        return [0.5 * value for value in vowels(completions)]

    first = reward
    learn(**loaded, rewards=first, output="run")

    def reward(completions: list[str], **columns: Any) -> list[float]:  # type: ignore[no-redef]
        return [0.25 * value for value in vowels(completions)]

    with pytest.raises(InputError, match=r"has another recipe: rewards.0.path"):
        learn(**loaded, rewards=reward, output="run", resume=True)


def test_runs_without_a_name_never_overwrite_each_other(loaded: dict[str, Any]) -> None:
    folders = [learn(**loaded, training={"steps": 1}).folder for _ in range(3)]
    assert folders == [Path("runs/run"), Path("runs/run-2"), Path("runs/run-3")]


def generators() -> list[Any]:
    """The states of the process-wide random generators."""
    numpy: Any = np.random.get_state(legacy=True)
    return [random.getstate(), numpy[1].tolist(), torch.get_rng_state().tolist()]


def test_a_second_run_finds_nothing_of_the_first(loaded: dict[str, Any]) -> None:
    """Twice in one process: the same numbers, and generators and threads as they were before."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = generators()
    threads = torch.get_num_threads()
    running = set(threading.enumerate())
    learn(**loaded, output="one")
    learn(**loaded, output="between", prompt="another text", seed=5)
    learn(**loaded, output="two")
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(Path("one"), kind) == comparable_rows(Path("two"), kind)
    assert generators() == before
    assert torch.get_num_threads() == threads
    assert set(threading.enumerate()) == running


def test_a_run_in_a_thread(loaded: dict[str, Any]) -> None:
    learn(**loaded, output="main")
    failures: list[BaseException] = []

    def work() -> None:
        try:
            learn(**loaded, output="thread")
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    for kind in ("metrics", "completions", "evaluation"):
        assert comparable_rows(Path("main"), kind) == comparable_rows(Path("thread"), kind)


def test_a_run_beside_a_running_event_loop(loaded: dict[str, Any]) -> None:
    """A notebook has one; rewards may be coroutines all the same."""
    import asyncio

    async def slow(completions: list[str], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return vowels(completions)

    async def cell() -> rlprompt.Run:
        return learn(**loaded, rewards=slow)

    assert asyncio.run(cell()).metrics.steps == 3


def test_a_population_has_what_a_run_has(loaded: dict[str, Any]) -> None:
    members = [{"name": "a", "changes": {"seed": 1}}, {"name": "b", "changes": {"seed": 2}}]
    run = rlprompt.train(
        **loaded, rewards=vowels, data=list(QUERIES), heldout=2, prompt="the sun and rain",
        population=members, **{**SHORT, "training": {"steps": 4, "queries_per_step": 2}},
    )  # fmt: skip
    assert isinstance(run, rlprompt.Population)
    best = max(run.members.values(), key=lambda member: member.metrics.learned or 0.0)
    assert run.metrics.learned == best.metrics.learned
    answer = run.prompt.generate("the rain", max_tokens=4)
    assert answer == best.prompt.generate("the rain", max_tokens=4)
    assert run.report.path == run.folder / "report.html"


def test_a_population_that_had_ended_has_its_prompt_again(loaded: dict[str, Any]) -> None:
    members = [{"name": "a", "changes": {"seed": 1}}, {"name": "b", "changes": {"seed": 2}}]
    keywords: dict[str, Any] = {
        **loaded, "rewards": vowels, "data": list(QUERIES), "heldout": 2, "output": "run",
        "prompt": "the sun and the rain", "population": members,
        **{**SHORT, "training": {"steps": 4, "queries_per_step": 2}},
    }  # fmt: skip
    first, again = rlprompt.train(**keywords), rlprompt.train(**keywords, resume=True)
    assert again.metrics.learned == first.metrics.learned
    answers = [run.prompt.generate("the rain", max_tokens=6, seed=2) for run in (first, again)]
    assert answers[0] == answers[1]


def test_prompts_are_compared_under_the_same_draws(loaded: dict[str, Any]) -> None:
    run = learn(**loaded)
    model = rlprompt.open_model(**loaded)
    prompts: Mapping[str, Any] = {
        "base": None, "written": "the sun", "learned": run, "again": run.folder / "artifact",
    }  # fmt: skip
    found = rlprompt.evaluate(
        prompts, model=model, data=list(QUERIES), rewards=[vowels, Long(30)], max_tokens=6
    )
    assert list(found) == list(prompts)
    assert found["learned"].metrics == found["again"].metrics
    assert found["learned"].rewards.keys() == {"vowels", "Long"}
    assert len(found["base"].completions) == 2 * len(QUERIES)
    assert [row["prompt"] for row in found.rows] == list(prompts)
    assert "learned" in str(found) and "<table>" in found._repr_html_()
    alone = rlprompt.evaluate(run, data=list(QUERIES), rewards=[vowels, Long(30)], max_tokens=6)
    assert alone["run"].reward == found["learned"].reward


def test_prompts_in_a_list_get_names_that_tell_them_apart(loaded: dict[str, Any]) -> None:
    found = rlprompt.evaluate(
        [None, "the sun", "the sun", "x" * 99], **loaded, data=["the rain"], rewards=vowels
    )
    assert list(found) == ["base", "the sun", "the sun (2)", f"{'x' * 57}..."]


def test_a_saved_prompt_is_the_prompt(loaded: dict[str, Any], tmp_path: Path) -> None:
    run = learn(**loaded)
    model = rlprompt.open_model(**loaded)
    for prompt in (run.prompt, model.prompt("the sun and rain")):
        copy = model.load(prompt.save(tmp_path / prompt.kind))
        assert copy.generate("the rain", max_tokens=6) == prompt.generate("the rain", max_tokens=6)
        assert (copy.kind, copy.num_tokens, copy.text) == (
            prompt.kind, prompt.num_tokens, prompt.text,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_pieces_of_a_stream_are_the_answer(seed: int, loaded: dict[str, Any]) -> None:
    prompt = rlprompt.open_model(**loaded).prompt("the sun")
    pieces = list(prompt.stream("the rain", seed=seed, max_tokens=30))
    assert len(pieces) > 3
    assert "".join(pieces) == prompt.generate("the rain", seed=seed, max_tokens=30)


def test_a_stream_that_nobody_takes_ends_and_the_prompt_answers_again(
    loaded: dict[str, Any],
) -> None:
    prompt = rlprompt.open_model(**loaded).prompt("the sun")
    before = set(threading.enumerate())
    stream = prompt.stream("the rain", max_tokens=200)
    first = next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    stream.close()  # type: ignore[attr-defined]  # a generator
    assert set(threading.enumerate()) == before
    assert prompt.generate("the rain", max_tokens=200).startswith(first)


def test_what_goes_wrong_in_a_stream_is_raised_where_it_is_taken(loaded: dict[str, Any]) -> None:
    prompt = rlprompt.open_model(**loaded).prompt("the sun")
    with pytest.raises(InputError, match="positions"):
        list(prompt.stream("the rain " * 500))


def test_conversations_in_one_batch(loaded: dict[str, Any]) -> None:
    prompt = rlprompt.open_model(**loaded).prompt("the sun")
    turns = [
        {"role": "user", "content": "the rain"},
        {"role": "assistant", "content": "is here"},
        {"role": "user", "content": "and then"},
    ]
    many = prompt.generate_many(["the rain", turns], n=2, max_tokens=4)
    assert [len(answers) for answers in many] == [2, 2]
    greedy = prompt.generate_many(["the rain", turns], temperature=0, max_tokens=4)
    assert greedy == [
        [prompt.generate("the rain", temperature=0, max_tokens=4)],
        [prompt.generate(turns, temperature=0, max_tokens=4)],
    ]
    assert prompt.generate_many([]) == []
    (first,) = prompt.complete(["the rain"], max_tokens=4)
    assert len(first[0].token_ids) == len(first[0].sampling_logprobs)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"rewards": 3}, "rewards holds an object of type int; give a function"),
        ({"rewards": None}, "no reward has role: score"),
        ({"data": 5}, "data is of type int; give a list"),
        ({"data": []}, "data is empty"),
        ({"data": {"train": [], "test": []}}, "data is a mapping .*dataset\\['train'\\]"),
        ({"data": [3]}, "data row 1"),
        ({"heldout": 1.5}, "heldout"),
        ({"prompt": "runs/none"}, "looks like a path, but there is no artifact"),
        ({"prompt": Path("runs/none")}, "is not an artifact"),
        ({"trainig": {}}, "unknown key 'trainig'; did you mean 'training'"),
        ({"training": {"step": 3}}, "unknown key 'training.step'; did you mean 'steps'"),
        ({"algorithm": "grp"}, "algorithm"),
        ({"model": 3}, "model is of type int, no PreTrainedModel"),
        ({"model": nn.Linear(2, 2)}, "model is of type Linear"),
        ({"tokenizer": None}, "tokenizer is missing"),
        ({"resume": True}, "resume needs the folder of the run"),
        ({"rewards": {"path": vowels, "isolation": {}}}, "a worker process cannot load"),
    ],
)
def test_a_wrong_keyword_is_one_sentence_and_nothing_is_written(
    keywords: dict[str, Any], sentence: str, loaded: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=sentence):
        learn(**{**loaded, **keywords})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sampling", "sentence"),
    [
        ({"max_token": 3}, "there is no sampling setting 'max_token'; choose from temperature"),
        ({"temperature": -1.0}, "sampling setting 'temperature' is wrong"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_a_wrong_sampling_setting_is_one_sentence(
    sampling: dict[str, Any], sentence: str, loaded: dict[str, Any]
) -> None:
    prompt = rlprompt.open_model(**loaded).prompt()
    with pytest.raises(InputError, match=sentence):
        prompt.generate_many(["a"], **sampling)


def test_a_system_turn_is_refused(loaded: dict[str, Any]) -> None:
    prompt = rlprompt.open_model(**loaded).prompt("the sun")
    with pytest.raises(InputError, match="role system, which is the learned prompt's place"):
        prompt.generate([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_an_artifact_of_a_model_in_memory_says_how_to_load_it(loaded: dict[str, Any]) -> None:
    loaded["model"].config._name_or_path = "somebody/model"
    run = learn(**loaded)
    with pytest.raises(InputError, match=r"was a model in memory \(somebody/model\)"):
        rlprompt.load_prompt(run.folder)
    assert rlprompt.load_prompt(run.folder, **loaded).num_tokens == run.prompt.num_tokens


def test_prompts_of_two_bases_are_not_compared(loaded: dict[str, Any], tmp_path: Path) -> None:
    other = rlprompt.open_model(save_tiny(tmp_path / "other", "qwen3"))
    with pytest.raises(InputError, match="evaluate prompts of one base in one call"):
        rlprompt.evaluate(
            [rlprompt.open_model(**loaded).prompt("a"), other.prompt("b")],
            data=["the rain"],
            rewards=vowels,
        )
