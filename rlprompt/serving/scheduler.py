"""One thread that decodes for everybody: requests wait in a queue, join the batch, and leave it.

Between two steps the thread does what others ask of the base (`Scheduler.between_steps`), such as
the prefix of a prompt that is being loaded. A request keeps the prefix that it came with, so a
swap touches no row: who comes later simply brings another one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch

from rlprompt.engines.continuous import Ask, ContinuousDecoder, Token
from rlprompt.errors import limit_reached
from rlprompt.prompts.base import Conditioner, Prompt
from rlprompt.serving.answer_text import AnswerText
from rlprompt.serving.metrics import Metrics
from rlprompt.types import PrefixKV

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

STOPPING = "the server is stopping"
"""Why a server that drains takes nothing."""


class Full(Exception):
    """The queue is full, or the server takes no more requests."""

    def __init__(self, sentence: str, retry_after: int, *, stopping: bool = False) -> None:
        super().__init__(sentence)
        self.sentence, self.retry_after, self.stopping = sentence, retry_after, stopping


class Failure(NamedTuple):
    """Why a request ends without its answer."""

    status: int
    """HTTP status."""
    sentence: str
    """What was wrong and what to do."""
    code: str | None = None
    """What programs know it by."""


class Piece(NamedTuple):
    """What a step adds to one answer of a request."""

    copy: int
    """Which of the answers."""
    text: str
    """New text, which may be empty."""
    token: Token
    """The token that was drawn."""
    finish: str | None
    """`stop`, `length`, or None where more will come."""


Event = Piece | Failure


@dataclass(frozen=True)
class SchedulerLimits:
    """What the queue and the batch hold."""

    rows: int = 64
    """Answers that are decoded at once."""
    positions: int = 65536
    """Positions of all of them together, prompts included: what bounds the memory."""
    waiting: int = 256
    """Requests that may wait."""


@dataclass(eq=False)
class Job:
    """A request on its way through the queue and the batch."""

    ask: Ask
    """What is to be drawn."""
    texts: Sequence[AnswerText]
    """One per answer."""
    deliver: Callable[[Event], None]
    """Called with each event; by `Scheduler.post`."""
    deadline: float = float("inf")
    """`time.monotonic()` at which it is given up."""
    submitted: float = field(default_factory=time.monotonic)
    """When it came."""
    cancelled: bool = False
    """Whether nobody wants it any more."""
    unfinished: int = 0
    """Answers that go on."""
    started: bool = False
    """Whether its first token was drawn."""

    @property
    def positions(self) -> int:
        """Positions that its answers take at most."""
        ask = self.ask
        each = ask.prefix.num_tokens + len(ask.query_ids) + ask.sampling.max_tokens
        return each * ask.copies

    def take(self, token: Token) -> Piece:
        """Take up a token; a string that ends an answer may make it its last one.

        Args:
            token: one token of one of its answers.
        """
        text = self.texts[token.copy]
        new = text.push(token.token_id, last=token.finish is not None)
        finish = "stop" if text.stopped else token.finish
        if finish is not None:
            self.unfinished -= 1
        return Piece(token.copy, new, token, finish)


class Told(NamedTuple):
    """An event, and the request that it belongs to."""

    job: Job
    """The request."""
    event: Event
    """What has happened to it."""


class Answerer(Protocol):
    """What draws the answers of a server's requests: the base here, or a server of another kind."""

    limits: SchedulerLimits
    post: Callable[[list[Told]], None]

    @property
    def unready(self) -> str | None:
        """Why no requests are taken; None = they are."""
        ...

    @property
    def max_positions(self) -> int:
        """The longest conversation, answer included."""
        ...

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        ...

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        ...

    def start(self) -> None:
        """Begin."""
        ...

    def between_steps(self, work: Callable[[], _Result]) -> _Result:
        """Do something that needs the base; see `Scheduler.between_steps`."""
        ...

    def prefix_of(self, prompt: Prompt, conditioner: Conditioner) -> PrefixKV:
        """What requests under a prompt bring with them.

        Raises:
            InputError: there is no place for such a prompt.
        """
        ...

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Raises:
            Full: there is no place, or the server is stopping.
        """
        ...

    def cancel(self, job: Job) -> None:
        """Take a request out; nobody waits for it any more."""
        ...

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        ...

    def close(self, seconds: float = 0.0) -> None:
        """Drain, give up what has not ended after so many seconds, and end all threads."""
        ...


class Scheduler:
    """Decodes for many requests at once, in a thread of its own."""

    def __init__(
        self, decoder: ContinuousDecoder, limits: SchedulerLimits, metrics: Metrics
    ) -> None:
        """Start without requests; `start` begins.

        Args:
            decoder: the decoder, which only the thread uses.
            limits: what the queue and the batch hold.
            metrics: where steps and tokens are counted.
        """
        self.limits = limits
        self.post: Callable[[list[Told]], None] = deliver
        """How events reach those who wait for them; called by the thread, once per step."""
        self._decoder = decoder
        self._metrics = metrics
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Ask, Job] = {}
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        self._draining = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="rlprompt-decode", daemon=True)

    def start(self) -> None:
        """Begin to decode."""
        self._thread.start()

    @property
    def unready(self) -> str | None:
        """Why no requests are taken; None = they are."""
        return None if self._thread.is_alive() and not self._draining else STOPPING

    @property
    def max_positions(self) -> int:
        """The longest conversation, answer included."""
        return self._decoder.policy.forward.max_positions

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Put a request into the queue.

        Args:
            job: the request; it fits into an empty batch.

        Raises:
            Full: there is no place, or the server is stopping.
        """
        with self._wake:
            require_place(len(self._waiting), self.limits, draining=self._draining)
            job.unfinished = job.ask.copies
            self._waiting.append(job)
            self._wake.notify()

    def prefix_of(self, prompt: Prompt, conditioner: Conditioner) -> PrefixKV:
        """The prefix of a prompt, which no update changes any more.

        Args:
            prompt: the prompt.
            conditioner: the base, whose forwards run between two steps.
        """
        with torch.no_grad():
            made = prompt.prefix(conditioner).snapshot()
        keys, values = [k.detach() for k in made.keys], [v.detach() for v in made.values]
        return PrefixKV(keys, values, made.adapter)

    def cancel(self, job: Job) -> None:
        """Take a request out at the next step; nobody waits for it any more."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def between_steps(self, work: Callable[[], _Result]) -> _Result:
        """Let the decoding thread do something that needs the base, and wait for the result.

        Args:
            work: what is to be done; what it raises is raised here.
        """
        if not self._thread.is_alive() or threading.current_thread() is self._thread:
            return work()
        future: Future[object] = Future()
        with self._wake:
            self._calls.append((work, future))
            self._wake.notify()
        return future.result()  # type: ignore[return-value]

    def drain(self) -> None:
        """Take no more requests; those that are here are answered."""
        with self._wake:
            self._draining = True
            self._wake.notify()

    def close(self, seconds: float = 0.0) -> None:
        """Drain, give up what has not ended after so many seconds, and end the thread.

        Args:
            seconds: seconds that requests may still take.
        """
        self.drain()
        if not self._thread.is_alive():
            return
        end = time.monotonic() + seconds
        with self._wake:
            while (self._waiting or self._running) and time.monotonic() < end:
                self._wake.wait(0.05)
            self._closing = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while self._await_work():
            self._do_calls()
            try:
                events = self._sweep()
                self._join()
                events += self._step()
            except Exception as error:
                events = self._fail(error)
            if events:
                self.post(events)
            self._metrics.set("rlprompt_waiting_requests", self.num_waiting)
            self._metrics.set("rlprompt_running_rows", self._decoder.num_rows)
        stopped = Failure(503, "the server is stopping; ask again")
        left = [*self._running.values(), *self._waiting]
        self._decoder.clear()
        self._running.clear()
        self._waiting.clear()
        self._do_calls()
        if left:
            self.post([Told(job, stopped) for job in left])

    def _await_work(self) -> bool:
        """Sleep until there is something to do; False = the thread is to end."""
        with self._wake:
            while not (self._waiting or self._running or self._calls or self._closing):
                self._wake.wait()
            return not self._closing

    def _do_calls(self) -> None:
        while self._calls:
            work, future = self._calls.popleft()
            try:
                future.set_result(work())
            except BaseException as error:  # raised again by the caller
                future.set_exception(error)

    def _sweep(self) -> list[Told]:
        """Take out who has gone, and whose time is over."""
        now = time.monotonic()
        events: list[Told] = []
        with self._wake:
            jobs = [*self._waiting, *self._running.values()]
            over = [job for job in jobs if job.cancelled or job.deadline <= now]
            for job in over:
                if job.ask in self._running:
                    self._decoder.leave(job.ask)
                    del self._running[job.ask]
                else:
                    self._waiting.remove(job)
                if not job.cancelled:
                    sentence = "the answer has taken longer than the server allows; ask for less"
                    events.append(Told(job, Failure(504, sentence)))
        return events

    def _join(self) -> None:
        """Let waiting requests in, in their order, as far as there is room."""
        rows = self._decoder.num_rows
        positions = sum(job.positions for job in self._running.values())
        joining: list[Job] = []
        with self._wake:
            for job in self._waiting:
                rows, positions = rows + job.ask.copies, positions + job.positions
                alone = not self._running and not joining
                fits = rows <= self.limits.rows and positions <= self.limits.positions
                if not (fits or alone):
                    break
                joining.append(job)
            count = ContinuousDecoder.prefilled_at_once([job.ask for job in joining])
            joining = joining[:count]
            for job in joining:
                self._waiting.popleft()
                self._running[job.ask] = job
        if joining:
            self._decoder.join([job.ask for job in joining])

    def _step(self) -> list[Told]:
        if not self._running:
            return []
        begun = time.monotonic()
        tokens = self._decoder.step()
        events: list[Told] = []
        for token in tokens:
            job = self._running.get(token.ask)
            if job is None:  # another of its answers could not go on
                continue
            if token.fault is not None:
                self._decoder.leave(token.ask)
                del self._running[token.ask]
                events.append(Told(job, Failure(400, token.fault)))
                continue
            events.append(Told(job, self._piece(job, token)))
            if not job.started:
                job.started = True
                waited = time.monotonic() - job.submitted
                self._metrics.observe("rlprompt_time_to_first_token_seconds", waited)
            if job.unfinished == 0:
                del self._running[token.ask]
        self._metrics.add("rlprompt_completion_tokens_total", len(tokens))
        self._metrics.observe("rlprompt_step_seconds", time.monotonic() - begun)
        return events

    def _piece(self, job: Job, token: Token) -> Piece:
        piece = job.take(token)
        if piece.finish is not None and token.finish is None:
            self._decoder.leave(job.ask, token.copy)
        return piece

    def _fail(self, error: Exception) -> list[Told]:
        """Give up all that runs: what state the batch is in is not known."""
        logger.error("a decode step failed; its requests are given up", exc_info=error)
        self._metrics.add("rlprompt_failed_steps_total")
        why = limit_reached(error) or f"{type(error).__name__} in the server; see its log"
        jobs = list(self._running.values())
        self._running.clear()
        self._decoder.clear()
        return [Told(job, Failure(500, why)) for job in jobs]


def require_place(waiting: int, limits: SchedulerLimits, *, draining: bool) -> None:
    """Refuse a request for which there is no place.

    Args:
        waiting: number of requests that wait.
        limits: what the queue holds.
        draining: whether no more are taken.

    Raises:
        Full: there is none.
    """
    if draining:
        raise Full(f"{STOPPING}; ask another one", 5, stopping=True)
    if waiting >= limits.waiting:
        raise Full(
            f"{waiting} requests are waiting, as many as may; ask again later",
            1 + waiting // max(1, limits.rows),
        )


def deliver(events: list[Told]) -> None:
    """Hand events over to those who wait for them, in this thread.

    Args:
        events: what has happened.
    """
    for job, event in events:
        job.deliver(event)
