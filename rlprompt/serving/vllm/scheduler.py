"""Requests on their way to a vLLM server: a queue of ours before it, and its tokens as ours.

An event loop in a thread of its own speaks to vLLM. A request is told whole at its beginning, its
prompt included, so a swap touches nothing that runs. vLLM ends an answer by the tokens that it is
told; strings that end one are looked for here, as in the native engine.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from rlprompt.engines.continuous import Token
from rlprompt.errors import InputError
from rlprompt.model.cpu.fused_modules import give_back
from rlprompt.policy import Policy
from rlprompt.prompts.adapter import AdapterPrompt
from rlprompt.prompts.base import Conditioner, Prompt
from rlprompt.serving.metrics import Metrics
from rlprompt.serving.scheduler import (
    STOPPING,
    Failure,
    Full,
    Job,
    SchedulerLimits,
    Told,
    deliver,
    require_place,
)
from rlprompt.serving.vllm.adapters import AdapterLoader
from rlprompt.serving.vllm.base_check import Checked, check_base, make_probes
from rlprompt.serving.vllm.client import VllmClient, VllmError, VllmSettings
from rlprompt.serving.vllm.prompts import VllmPrefix, completion_body, make_prefix

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_MARK = "token_id:"
_GREEDY = 1e-5
"""Temperature below which vLLM draws the likeliest token."""
_UNAVAILABLE = "engine_unavailable"


class _Drawn(NamedTuple):
    """What vLLM tells of one token; see `engines.continuous.Token`."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class _Answers:
    """How far the answers of a request have come."""

    counts: list[int]
    """Tokens of each."""
    ended_there: set[int] = field(default_factory=set)
    """Choices that vLLM has ended."""


class VllmScheduler:
    """Lets a vLLM server draw the answers of requests; see `serving.scheduler.Answerer`."""

    def __init__(
        self, policy: Policy, settings: VllmSettings, limits: SchedulerLimits, metrics: Metrics
    ) -> None:
        """Look whether the server computes what the base computes.

        Args:
            policy: the policy over the base, for its template, its embeddings, and the comparison.
            settings: the server.
            limits: what is asked of it at once, and how many requests wait.
            metrics: where requests and tokens are counted.

        Raises:
            InputError: it is not there, or serves another model.
        """
        self.limits = limits
        self.post: Callable[[list[Told]], None] = deliver
        """See `Scheduler.post`."""
        self._policy, self._settings, self._metrics = policy, settings, metrics
        self._stop_ids = sorted(policy.stop_ids)
        self._probes = make_probes(policy)
        give_back(policy.base.model)  # from here on only embeddings are read
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, asyncio.Task[None]] = {}
        self._timers: dict[Job, asyncio.TimerHandle] = {}
        self._draining = self._closing = self._closed = False
        self._wrong: str | None = None
        self._takes_rows = self._takes_adapters = False
        self._watcher: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="rlprompt-vllm", daemon=True)
        self._thread.start()
        try:
            self._checked = self._do(self._begin())
        except BaseException:
            self.close()
            raise

    # What a server asks of it.

    @property
    def unready(self) -> str | None:
        """Why no requests are taken; None = they are."""
        return STOPPING if self._draining else self._wrong

    @property
    def max_positions(self) -> int:
        """The longest conversation, answer included."""
        ours, theirs = self._policy.forward.max_positions, self._checked.model.max_positions
        return ours if theirs is None else min(ours, theirs)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that vLLM has."""
        return len(self._running)

    def start(self) -> None:
        """Begin to watch whether the server is there."""
        self._loop.call_soon_threadsafe(self._start_watching)

    def between_steps(self, work: Callable[[], _Result]) -> _Result:
        """Do something; nothing of the base runs here that it would have to wait for."""
        return work()

    def prefix_of(self, prompt: Prompt, conditioner: Conditioner) -> VllmPrefix:
        """What vLLM is told of a prompt; its adapter is loaded there.

        Args:
            prompt: the prompt.
            conditioner: the base and its chat template.

        Raises:
            InputError: vLLM has no place for it, or was started without what it needs.
        """
        made = make_prefix(prompt, conditioner)
        self._require_one_kind(prompt, made)
        if made.rows is not None and not self._checked.takes_embeddings:
            raise InputError(
                f"a {prompt.kind} prompt is input embeddings, and the vLLM server takes none; "
                "start it with --enable-prompt-embeds"
            )
        if not isinstance(prompt, AdapterPrompt):
            self._takes_rows = self._takes_rows or made.rows is not None
            return made
        stored = prompt.artifact_files(self._policy.id)
        files = {
            path.removeprefix("adapter/"): content
            for path, content in stored.items()
            if path.startswith("adapter/")
        }
        try:
            lora = self._do(self._adapters.load(files))
        except VllmError as error:
            raise InputError(_why_no_adapter(error)) from error
        except OSError as error:
            raise InputError(
                f"the adapter cannot be written for vLLM ({error.strerror}); make room in TMPDIR"
            ) from error
        self._takes_adapters = True
        return VllmPrefix((), (), ids=made.ids, lora=lora)

    def _require_one_kind(self, prompt: Prompt, made: VllmPrefix) -> None:
        """Refuse adapters beside embeddings: vLLM 0.32 dies of a batch that has both.

        A request that is cancelled may be in a batch for a while, so keeping them apart by when
        they are sent would not do.

        Raises:
            InputError: the other kind has been served.
        """
        is_adapter = isinstance(prompt, AdapterPrompt)
        if (is_adapter and self._takes_rows) or (made.rows is not None and self._takes_adapters):
            has, wants = ("soft prompts", "LoRA") if is_adapter else ("LoRA", "soft prompts")
            raise InputError(
                f"this server has {has}, and vLLM's engine ends where input embeddings and LoRA "
                f"adapters meet in a batch; serve {wants} by a second `rlprompt serve` before a "
                "vLLM server of its own"
            )

    def submit(self, job: Job) -> None:
        """Put a request into the queue; see `serving.scheduler.Scheduler.submit`."""
        with self._lock:
            require_place(len(self._waiting), self.limits, draining=self._draining)
            job.unfinished = job.ask.copies
            self._waiting.append(job)
        try:
            self._loop.call_soon_threadsafe(self._arrived, job)
        except RuntimeError as error:  # the loop has ended
            raise Full(STOPPING, 5, stopping=True) from error

    def cancel(self, job: Job) -> None:
        """Take a request out, at vLLM too; nobody waits for it any more."""
        job.cancelled = True
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._drop, job)

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        with self._lock:
            self._draining = True

    def close(self, seconds: float = 0.0) -> None:
        """Drain, give up what has not ended after so many seconds, and end the thread.

        Args:
            seconds: seconds that requests may still take.
        """
        self.drain()
        if self._closed:
            return
        self._closed = True
        self._do(self._end(seconds))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    # The thread of the event loop.

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _do(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of a coroutine; called from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _begin(self) -> Checked:
        self._client = VllmClient(self._settings)
        self._adapters = AdapterLoader(self._client, self._loop)
        end = time.monotonic() + self._settings.wait_seconds
        while not await self._client.is_healthy():
            if time.monotonic() >= end:
                raise InputError(
                    f"no vLLM server answers at {self._settings.url}; start it with `vllm serve "
                    "MODEL --host 127.0.0.1 --enable-prompt-embeds`, or let --vllm-wait be longer"
                )
            await asyncio.sleep(min(0.5, self._settings.health_seconds))
        try:
            return await self._check()
        except VllmError as error:
            raise InputError(
                f"the vLLM server at {self._settings.url} cannot be used ({error.sentence}); see "
                "its log"
            ) from error

    async def _check(self) -> Checked:
        # Requests under adapters may be running where it is compared again.
        embed = None if self._takes_adapters else self._policy.embed
        checked = await check_base(self._client, self._policy.id, self._probes, embed)
        self._metrics.set("rlprompt_engine_up", 1)
        return checked

    def _start_watching(self) -> None:
        self._watcher = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Look again and again; a server that was away is compared anew, as it may be another."""
        while True:
            await asyncio.sleep(self._settings.health_seconds)
            if not await self._client.is_healthy():
                self._lose("the engine cannot be reached; ask again")
            elif self._wrong is not None:
                try:
                    self._checked = await self._check()
                except (InputError, VllmError) as error:
                    logger.warning("vLLM is not used: %s", error)
                    self._wrong = "the engine is not ready; ask again"
                else:
                    self._wrong = None
                    logger.warning("vLLM is there again")

    def _lose(self, sentence: str) -> None:
        """Take no requests until the server has been compared anew."""
        if self._wrong is None:
            logger.warning("vLLM at %s is away", self._settings.url)
        self._wrong = sentence
        self._metrics.set("rlprompt_engine_up", 0)

    def _arrived(self, job: Job) -> None:
        if job.deadline != float("inf"):
            seconds = max(0.0, job.deadline - time.monotonic())
            self._timers[job] = self._loop.call_later(seconds, self._expire, job)
        self._admit()

    def _admit(self) -> None:
        """Let waiting requests go to vLLM, in their order, as far as there is room."""
        rows = sum(job.ask.copies for job in self._running)
        positions = sum(job.positions for job in self._running)
        while self._waiting:
            job = self._waiting[0]
            rows, positions = rows + job.ask.copies, positions + job.positions
            fits = rows <= self.limits.rows and positions <= self.limits.positions
            if self._running and not fits:
                break
            with self._lock:
                self._waiting.popleft()
            if self._wrong is not None:
                self._tell(job, Failure(503, self._wrong, _UNAVAILABLE))
                continue
            self._running[job] = self._loop.create_task(self._run(job))
        self._metrics.set("rlprompt_waiting_requests", self.num_waiting)
        self._metrics.set("rlprompt_running_rows", sum(job.ask.copies for job in self._running))

    def _tell(self, job: Job, failure: Failure) -> None:
        """End a request without its answer."""
        self._forget_timer(job)
        if not job.cancelled:
            self.post([Told(job, failure)])

    def _forget_timer(self, job: Job) -> None:
        timer = self._timers.pop(job, None)
        if timer is not None:
            timer.cancel()

    def _expire(self, job: Job) -> None:
        sentence = "the answer has taken longer than the server allows; ask for less"
        self._take_out(job, Failure(504, sentence))

    def _drop(self, job: Job) -> None:
        self._take_out(job, None)

    def _take_out(self, job: Job, failure: Failure | None) -> None:
        """Take a request out wherever it is; it ends with a failure, or in silence."""
        task = self._running.get(job)
        with self._lock:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        self._forget_timer(job)
        if failure is not None and (waits or task is not None):
            self._tell(job, failure)
        job.cancelled = True
        if task is not None:
            task.cancel()
        self._admit()

    async def _run(self, job: Job) -> None:
        """Let vLLM draw a request, and tell what comes of it."""
        try:
            await self._draw(job)
        except VllmError as error:
            if error.is_lost and not await self._client.is_healthy():
                self._lose("the engine cannot be reached; ask again")
            self._failed(job, Failure(error.status, error.sentence, _UNAVAILABLE))
        except Exception as error:
            logger.error("a request to vLLM failed", exc_info=error)
            self._failed(job, Failure(500, f"{type(error).__name__} in the server; see its log"))
        finally:
            self._forget_timer(job)
            self._running.pop(job, None)
            if not self._closing:
                self._admit()

    def _failed(self, job: Job, failure: Failure) -> None:
        self._metrics.add("rlprompt_failed_steps_total")
        self._tell(job, failure)

    async def _draw(self, job: Job) -> None:
        ask, prefix = job.ask, job.ask.prefix
        assert isinstance(prefix, VllmPrefix)
        greedy = ask.sampling.temperature < _GREEDY
        body = await asyncio.to_thread(
            completion_body, ask, self._checked.model.name, self._stop_ids, self._policy
        )
        if greedy:  # vLLM draws one likeliest answer only, which is that of all copies
            body |= {"temperature": 0.0, "n": 1}
        try:
            await self._stream(job, body, greedy=greedy)
        except VllmError as error:
            if error.answered != 404 or prefix.lora is None or job.started:
                raise
            await self._adapters.load_again(prefix.lora, body["model"])
            await self._stream(job, {**body, "model": prefix.lora.name}, greedy=greedy)

    async def _stream(self, job: Job, body: dict[str, Any], *, greedy: bool) -> None:
        """Take the events of a completion until all answers have ended.

        Raises:
            VllmError: they have not.
        """
        answers = _Answers([0] * job.ask.copies)
        async with aclosing(self._client.stream(body)) as events:
            async for event in events:
                told = list(self._told(job, event, answers, greedy=greedy))
                if told:
                    self._count(job, len(told))
                    self.post(told)
                if job.unfinished == 0 and len(answers.ended_there) < body["n"]:
                    return  # by a string that ends it: vLLM would go on
        if job.unfinished:
            raise VllmError(502, "the engine has ended the answer early; ask again", answered=200)

    def _count(self, job: Job, tokens: int) -> None:
        if not job.started:
            job.started = True
            waited = time.monotonic() - job.submitted
            self._metrics.observe("rlprompt_time_to_first_token_seconds", waited)
        self._metrics.add("rlprompt_completion_tokens_total", tokens)

    def _told(
        self, job: Job, event: dict[str, Any], answers: _Answers, *, greedy: bool
    ) -> Iterator[Told]:
        """What an event of vLLM's adds to the answers.

        Raises:
            VllmError: it is not what was asked for.
        """
        try:
            for choice in event["choices"]:
                place = int(choice["index"])
                tokens = _tokens(choice, self._policy.base.vocab_size, job.ask.top_logprobs)
                for copy in range(job.ask.copies) if greedy else (place,):
                    yield from self._pieces(job, copy, tokens, answers)
                if choice.get("finish_reason") is not None:
                    answers.ended_there.add(place)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            logger.warning("vLLM has answered something else: %r", error)
            sentence = "the engine has answered something else than tokens; see the server's log"
            raise VllmError(502, sentence, answered=200) from error

    def _pieces(
        self, job: Job, copy: int, tokens: Sequence[_Drawn], answers: _Answers
    ) -> Iterator[Told]:
        ask = job.ask
        for token_id, logprob, top in tokens:
            if job.texts[copy].stopped or answers.counts[copy] >= ask.sampling.max_tokens:
                return
            answers.counts[copy] += 1
            is_stop = token_id in self._stop_ids or token_id in ask.sampling.stop_token_ids
            is_last = answers.counts[copy] == ask.sampling.max_tokens
            finish = "stop" if is_stop else "length" if is_last else None
            token = Token(ask, copy, token_id, logprob, top, finish)
            piece = job.take(token)
            if piece.finish is not None:
                answers.counts[copy] = ask.sampling.max_tokens
            yield Told(job, piece)

    async def _end(self, seconds: float) -> None:
        """Let requests end in so many seconds, then end all."""
        end = time.monotonic() + seconds
        while (self._waiting or self._running) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self._closing = True
        tasks = [*self._running.values(), *([self._watcher] if self._watcher else [])]
        with self._lock:
            left = [*self._running, *self._waiting]
            self._waiting.clear()
        for job in left:
            self._tell(job, Failure(503, "the server is stopping; ask again"))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._adapters.close()
        await self._client.close()


def _tokens(choice: dict[str, Any], vocabulary: int, top: int | None) -> list[_Drawn]:
    """The tokens of a choice of an event.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none.
    """
    ids = choice.get("token_ids") or []
    if not all(type(each) is int and 0 <= each < vocabulary for each in ids):
        raise ValueError("token ids that are none of the base's")
    if top is None:
        return [_Drawn(each, None, ()) for each in ids]
    told = choice["logprobs"]
    drawn: list[_Drawn] = []
    for each, own, others in zip(ids, told["token_logprobs"], told["top_logprobs"], strict=True):
        pairs = [(int(k.removeprefix(_MARK)), float(v)) for k, v in (others or {}).items()]
        pairs.sort(key=lambda pair: -pair[1])
        drawn.append(_Drawn(each, float(own), tuple(pairs[:top])))
    return drawn


def _why_no_adapter(error: VllmError) -> str:
    if error.answered == 404:
        return (
            "the vLLM server loads no adapters; start it with --enable-lora, and with the variable "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        )
    if error.answered is not None and 400 <= error.answered < 500:
        return (
            "vLLM refuses the adapter (its log says why); let --max-lora-rank be at least its "
            "rank, or serve it with --engine native"
        )
    return f"the adapter could not be loaded: {error.sentence}"
