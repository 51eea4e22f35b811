"""The engine that draws on vLLM servers: what is sent, what comes back, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlprompt.engines.make import require_support
from rlprompt.engines.native import NativeEngine
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.engines.vllm.engine import VllmEngine
from rlprompt.engines.vllm.requests import read_completions
from rlprompt.engines.vllm.settings import VllmSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt, AdapterSettings
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.layer_adapters import IA3Settings, LoRASettings
from rlprompt.prompts.prefix import PrefixPrompt, PrefixSettings
from rlprompt.prompts.sequence import SequencePrompt
from rlprompt.prompts.text import NonePrompt, TextPrompt
from tests.fixtures.http_server import Answer, Seen
from tests.fixtures.runs import queries, tiny_policy
from tests.fixtures.vllm_server import FakeVllm, fake_vllm
from tests.invariants.oracle import scores

SAMPLING = SamplingSettings(max_tokens=7, temperature=0.8, stop_token_ids=tuple(range(10, 40)))
GREEDY = SAMPLING.model_copy(update={"temperature": 0.0})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return tiny_policy()


@pytest.fixture(scope="module")
def server() -> Iterator[FakeVllm]:
    with fake_vllm() as running:
        yield running


def engine_on(policy: Policy, *servers: FakeVllm, **settings: Any) -> VllmEngine:
    known: dict[str, Any] = {"backoff": 0.01, "start_timeout": 0.0, "retries": 1}
    urls = tuple(each.url for each in servers)
    return VllmEngine.make(VllmSettings(urls=urls, **known | settings), policy)


def lora(policy: Policy, seed: int = 0) -> AdapterPrompt:
    """An adapter that changes what is drawn."""
    method = LoRASettings(rank=4)
    made = AdapterPrompt.create(AdapterSettings(text="the rain", method=method), policy, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in made.adapter.weights.items():
            if ".lora_B" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return made


def prompt_of(kind: str, policy: Policy) -> Prompt:
    if kind == "sequence":
        return SequencePrompt([TextPrompt("the rain"), policy.prompt.copy()], 1)  # type: ignore[list-item]
    kinds: dict[str, Prompt] = {
        "none": NonePrompt(), "text": TextPrompt("the rain and the sun"), "soft": policy.prompt,
    }  # fmt: skip
    return kinds[kind] if kind in kinds else lora(policy)


@pytest.mark.parametrize("kind", ["none", "text", "soft", "sequence", "lora"])
def test_it_draws_what_the_base_draws_under_the_prompt(
    kind: str, policy: Policy, server: FakeVllm
) -> None:
    """Greedy tokens are the native engine's; sampling log-probabilities the training forward's."""
    engine, native = engine_on(policy, server), NativeEngine(policy)
    prompt = prompt_of(kind, policy)
    require_support(engine, [prompt])
    for each in (engine, native):
        each.sync(prompt)
    ours, theirs = (
        [c for group in each.generate(queries(3), 2, GREEDY, 0).groups for c in group.completions]
        for each in (native, engine)
    )
    assert [(c.token_ids, c.text, c.terminated) for c in theirs] == [
        (c.token_ids, c.text, c.terminated) for c in ours
    ]
    drawn = engine.generate(queries(3), 3, SAMPLING, seed=5).groups
    assert len({c.token_ids for group in drawn for c in group.completions}) > 6
    rows = [group.completions for group in drawn]
    got = scores(policy, prompt, queries(3), rows, SAMPLING.temperature)
    flat = [c for row in rows for c in row]
    stop = policy.stop_ids | set(SAMPLING.stop_token_ids)
    for logprobs, completion in zip(got.logprobs, flat, strict=True):
        sampled = torch.tensor(completion.sampling_logprobs)
        torch.testing.assert_close(logprobs[: len(sampled)], sampled, rtol=0, atol=1e-4)
        assert completion.terminated == (completion.token_ids[-1] in stop)


def test_a_request_says_everything_and_nothing_is_tokenised_there(policy: Policy) -> None:
    with fake_vllm() as server:
        engine = engine_on(policy, server)
        engine.sync(TextPrompt("the rain"))
        told: list[int] = []
        before = len(server.completions)
        drawn = engine.generate(
            queries(2), 3, SAMPLING, seed=4, progress=lambda done, most: told.append(done)
        )
        bodies = server.completions[before:]
    assert len(bodies) == 2  # all completions of a query in one request
    assert told[-1] == max(len(c.token_ids) for g in drawn.groups for c in g.completions)
    texts = [policy.decode(body["prompt"]) for body in bodies]
    assert sorted(query.text in text for query in queries(2) for text in texts).count(True) == 2
    for body in bodies:
        query = next(q for q in queries(2) if q.text in policy.decode(body["prompt"]))
        tail = policy.tail_ids(query.messages)
        assert body["prompt"] == [*policy.head_ids, *policy.slot_ids("the rain"), *tail]
        rest = {key: value for key, value in body.items() if key not in ("prompt", "seed")}
        assert rest == {
            "model": "tiny", "n": 3, "temperature": 0.8, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
            "max_tokens": 7, "min_tokens": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            "skip_special_tokens": False, "stream": False,
            "stop_token_ids": sorted(policy.stop_ids | set(range(10, 40))),
        }  # fmt: skip
    assert len({body["seed"] for body in bodies}) == 2


def test_a_soft_prompt_travels_as_the_embeddings_of_the_whole_conversation(policy: Policy) -> None:
    with fake_vllm() as server:
        engine = engine_on(policy, server)
        engine.sync(policy.prompt)
        engine.generate(queries(1), 1, SAMPLING, seed=4)
        body = server.completions[-1]
    assert "prompt" not in body
    rows = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
    with torch.no_grad():
        slot = policy.prompt.input_embeddings(policy)  # type: ignore[attr-defined]
        tail = policy.embed(policy.tail_ids(queries(1)[0].messages))
    assert torch.equal(rows, torch.cat([slot, tail]))


def test_equal_seeds_draw_alike_and_a_query_draws_its_own(policy: Policy, server: FakeVllm) -> None:
    engine = engine_on(policy, server)
    prompts = [TextPrompt("the rain and the sun"), policy.prompt]
    drawn = engine.generate_each(prompts, queries(3), 2, SAMPLING, seed=6)
    again = engine_on(policy, server)
    for prompt, generation in zip(prompts, drawn, strict=True):
        again.sync(prompt)
        assert again.generate(queries(3), 2, SAMPLING, seed=6).groups == generation.groups
    rest = again.generate(queries(3)[1:], 2, SAMPLING, seed=6, first=1).groups
    assert rest == drawn[1].groups[1:]
    assert again.generate(queries(3), 2, SAMPLING, seed=7).groups != drawn[1].groups
    with pytest.raises(InputError, match="no prompt to draw under"):
        again.generate_each([], queries(1), 1, SAMPLING, seed=0)
    with pytest.raises(InputError, match="no prompt yet"):
        engine_on(policy, server).generate(queries(1), 1, SAMPLING, seed=0)


def test_truncated_draws_have_no_logprobs_to_compare(policy: Policy, server: FakeVllm) -> None:
    engine = engine_on(policy, server)
    engine.sync(NonePrompt())
    sampling = SAMPLING.model_copy(update={"top_k": 1, "min_tokens": 2})
    groups = engine.generate(queries(2), 2, sampling, seed=1).groups
    for group in groups:
        assert len({each.token_ids for each in group.completions}) == 1
        for each in group.completions:
            assert each.sampling_logprobs == ()
            assert len(each.token_ids) >= 2
    native = NativeEngine(policy)
    native.sync(NonePrompt())
    ours = native.generate(queries(2), 1, sampling, seed=1).groups
    assert [g.completions[0].token_ids for g in ours] == [
        g.completions[0].token_ids for g in groups
    ]


def test_queries_are_dealt_out_to_the_servers(policy: Policy) -> None:
    with fake_vllm() as one, fake_vllm() as two:
        engine = engine_on(policy, one, two)
        engine.sync(policy.prompt)
        before = [len(each.completions) for each in (one, two)]
        drawn = engine.generate(queries(4), 2, SAMPLING, seed=3).groups
        asked = [len(each.completions) for each in (one, two)]
        assert [a - b for a, b in zip(asked, before, strict=True)] == [2, 2]
        two.fault = lambda seen: Answer({"error": {"message": "overloaded"}}, status=503)
        assert engine.generate(queries(4), 2, SAMPLING, seed=3).groups == drawn  # by the other one
        one.fault = two.fault
        with pytest.raises(InputError, match=r"status 503 \(overloaded\) \(2 attempts\); see"):
            engine.generate(queries(4), 2, SAMPLING, seed=3)


def test_adapters_are_loaded_by_version_and_again_where_they_are_lost(
    policy: Policy, tmp_path: Path
) -> None:
    with fake_vllm() as server:
        engine = engine_on(policy, server, adapter_folder=str(tmp_path / "adapters"))
        first, second = lora(policy, 0), lora(policy, 1)
        engine.sync(first)
        drawn = engine.generate(queries(2), 2, SAMPLING, seed=1).groups
        (name,) = server.loaded
        files = tmp_path / "adapters" / name
        assert {each.name for each in files.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip
        engine.sync(NonePrompt())  # evaluation of the base leaves it there
        engine.sync(first)
        assert server.history == [f"load {name}"]
        engine.sync(second)
        (other,) = server.loaded
        assert server.history == [f"load {name}", f"load {other}", f"unload {name}"]
        assert [each.name for each in (tmp_path / "adapters").iterdir()] == [other]
        assert engine.generate(queries(2), 2, SAMPLING, seed=1).groups != drawn
        engine.sync(first)
        server.loaded.clear()  # it was started anew
        assert engine.generate(queries(2), 2, SAMPLING, seed=1).groups == drawn
        assert list(server.loaded) == [name]


def test_ranks_share_an_adapter(policy: Policy, tmp_path: Path) -> None:
    """Each rank has an engine of its own; all load the same versions, and unload the same ones."""
    with fake_vllm() as server:
        ranks = [engine_on(policy, server, adapter_folder=str(tmp_path)) for _ in range(2)]
        for seed in range(2):
            for rank in ranks:
                rank.sync(lora(policy, seed))
        drawn = [rank.generate(queries(1), 2, SAMPLING, seed=1).groups for rank in ranks]
        assert drawn[0] == drawn[1]
        assert [each.split()[0] for each in server.history] == ["load", "load", "unload"]
        assert len(list(tmp_path.iterdir())) == len(server.loaded) == 1


def test_a_temporary_folder_of_adapters_is_removed(policy: Policy) -> None:
    with fake_vllm() as server:
        engine = engine_on(policy, server)
        engine.sync(lora(policy))
        (path,) = server.loaded.values()
        assert Path(path).is_dir()
        del engine
    assert not Path(path).parent.exists()


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        ({"seed": 1}, {}, r"other log-probabilities there than by tiny-llama here \(.* nats apart"),
        ({"noise": 0.5}, {}, "engine.largest_gap is 0.1"),
        ({"name": "other"}, {"model": "tiny"}, r"engine.model is 'tiny', and http.* no such base"),
        (
            {"fault": lambda seen: Answer({"detail": "Not Found"}, status=404)},
            {},
            r"status 404 .*; check engine.urls, which mostly end in /v1",
        ),
        ({"fault": lambda seen: Answer({"object": "list"})}, {}, "gives no list of models"),
        (
            {"fault": lambda seen: Answer({"data": []}) if seen.body is None else None},
            {},
            "serves no base; name the recipe's as engine.model",
        ),
        ({"fault": lambda seen: Answer({}, status=401)}, {}, r"check the key of engine.api_key"),
        ({"fault": lambda seen: Answer(hang_up=True)}, {}, "see whether the server runs"),
        (
            {"fault": lambda seen: Answer({"choices": []}) if seen.body else None},
            {},
            "holds 0 completions, and 4 were asked for",
        ),
        ({"max_model_len": 20}, {}, r"the servers have 20; start them with --max-model-len"),
    ],
    ids=[
        "another base", "rough", "name", "address", "no list", "no base", "key", "down", "not vllm",
        "short",
    ],
)  # fmt: skip
def test_servers_that_cannot_be_drawn_on_are_refused_at_the_start(
    state: dict[str, Any], settings: dict[str, Any], message: str, policy: Policy
) -> None:
    with fake_vllm(**state) as server, pytest.raises(InputError, match=message):
        engine_on(policy, server, **settings)


def test_servers_of_different_names_are_refused(policy: Policy) -> None:
    with (
        fake_vllm() as one,
        fake_vllm(name="other") as two,
        pytest.raises(InputError, match="servers of other, tiny; start them with one"),
    ):
        engine_on(policy, one, two)


def test_what_a_server_lacks_is_named(policy: Policy) -> None:
    with fake_vllm(embeds=False, adapters=False, processed=False) as server:
        engine = engine_on(policy, server)
        with pytest.raises(InputError, match="start it with --enable-prompt-embeds"):
            require_support(engine, [policy.prompt])
        with pytest.raises(InputError, match="loads no adapters; start it with --enable-lora and"):
            require_support(engine, [lora(policy)])
        engine.sync(NonePrompt())
        warm = SAMPLING.model_copy(update={"temperature": 1.0})
        assert engine.generate(queries(1), 1, warm, seed=0).groups
        with pytest.raises(InputError, match="start it with --logprobs-mode processed_logprobs"):
            engine.generate(queries(1), 1, SAMPLING, seed=0)


def test_a_server_may_need_a_while(policy: Policy) -> None:
    tries: list[Seen] = []

    def loading(seen: Seen) -> Answer | None:
        tries.append(seen)
        return Answer(hang_up=True) if len(tries) == 1 else None

    with fake_vllm(fault=loading) as server:
        engine_on(policy, server, start_timeout=60.0)
    assert len(tries) > 2


def test_prompts_without_a_way_there_are_refused_with_the_reason(
    policy: Policy, server: FakeVllm
) -> None:
    engine = engine_on(policy, server)
    prefix = PrefixPrompt.create(PrefixSettings(num_virtual_tokens=3), policy, 0)
    ia3 = AdapterPrompt.create(AdapterSettings(text="the rain", method=IA3Settings()), policy, 0)
    mixed = SequencePrompt([TextPrompt("the rain"), prefix], 1)
    for prompt, reason in (
        (prefix, r"prefix \(prompt.type\), since a request to vLLM holds tokens and input"),
        (ia3, r"LoRA adapters only \(prompt.method.type: lora\)"),
        (mixed, r"sequence \(prompt.parts\), since a request"),
    ):
        assert not engine.supports(prompt)
        with pytest.raises(InputError, match=reason):
            require_support(engine, [prompt])
        with pytest.raises(InputError, match=reason):
            engine.sync(prompt)


def test_adapters_need_a_folder_that_far_servers_see(policy: Policy) -> None:
    settings = VllmSettings(urls=("http://gpu7:8000/v1",))
    engine = VllmEngine(policy, settings)
    with pytest.raises(InputError, match=r"set engine.adapter_folder to a shared folder; choose"):
        require_support(engine, [lora(policy)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.005}, "vLLM draws with no less than 0.01"),
        ({"temperature": 3.0}, "vLLM takes no more than 2"),
        ({"min_p": 0.1, "top_p": 0.9}, "applies them in another order"),
        ({"stop_token_ids": (9999,)}, "tokens that tiny-llama does not have"),
        ({"max_tokens": 1000}, "needs .* positions with its completion, and the servers have 1000"),
    ],
)  # fmt: skip
def test_sampling_that_would_mean_something_else_is_refused(
    changes: dict[str, Any], message: str, policy: Policy, server: FakeVllm
) -> None:
    engine = engine_on(policy, server)
    engine.sync(NonePrompt())
    with pytest.raises(InputError, match=message):
        engine.generate(queries(1), 1, SAMPLING.model_copy(update=changes), seed=0)


def test_the_caller_can_break_off_a_rollout(policy: Policy, server: FakeVllm) -> None:
    engine = engine_on(policy, server, concurrency=1)
    engine.sync(NonePrompt())

    def stop(done: int, most: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(queries(8), 4, SAMPLING, seed=0, progress=stop)
    assert engine.generate(queries(1), 1, SAMPLING, seed=0).groups


GOOD = {"index": 0, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (None, "no object"),
        ({"index": None}, "no index"),
        ({"token_ids": None}, "no token_ids"),
        ({"token_ids": []}, "no token_ids"),
        ({"token_ids": [300]}, "beyond the 300"),
        ({"token_ids": [True]}, "beyond the 300"),
        ({"token_ids": [5] * 8}, "8 tokens, and max_tokens is 7"),
        ({"logprobs": None}, "no log-probability for each"),
        ({"logprobs": {"token_logprobs": [-1.0, -1.0]}}, "no log-probability for each"),
        ({"logprobs": {"token_logprobs": [None]}}, "no finite number"),
        ({"logprobs": {"token_logprobs": [float("nan")]}}, "no finite number"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_told_apart(choice: Any, message: str) -> None:
    assert read_completions({"choices": [GOOD]}, 1, 7, 300) == [((5,), (-1.0,))]
    wrong = None if choice is None else {**GOOD, **choice}
    with pytest.raises(ValueError, match=message):
        read_completions({"choices": [wrong]}, 1, 7, 300)
