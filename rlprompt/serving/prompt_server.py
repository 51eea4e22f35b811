"""`rlprompt serve`: an HTTP server that answers under many prompts, in the form of OpenAI's API.

    POST /v1/chat/completions, /v1/responses      answers, whole or as a stream
    GET  /v1/models, /v1/models/NAME              the base, and base@prompt
    POST /v1/rewards  {"messages", "completion"}  {"rewards": {name: number or null}}
    GET  /admin/prompts                           what is served, with verdicts and history
    POST /admin/prompts  {"name", "source"}       load, or swap; DELETE /admin/prompts/NAME
    POST /admin/aliases  {"alias", "to"}          point; DELETE /admin/aliases/NAME
    GET  /healthz, /readyz, /metrics
    GET  /prompts and what clients of Langfuse and MLflow read: the texts of a registry

What a prompt has learned as numbers is in no answer. docs/serving.md is the user's page.
"""

from __future__ import annotations

import asyncio
import logging
import mimetypes
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from rlprompt import __version__
from rlprompt.engines.continuous import Ask, ContinuousDecoder
from rlprompt.engines.grammar import JsonGrammar
from rlprompt.engines.sampling import SamplingSettings
from rlprompt.errors import InputError
from rlprompt.policy import Policy
from rlprompt.prompts.base import Prompt
from rlprompt.registry.catalog import Catalog
from rlprompt.serving.access import Access
from rlprompt.serving.answer_format import Grammars
from rlprompt.serving.answer_text import AnswerText
from rlprompt.serving.chat_answers import Reply, openai_error
from rlprompt.serving.chat_requests import ChatRequest, RequestLimits, parse_chat
from rlprompt.serving.drawing import CHAT, RESPONSE, Drawing, EventStream, Form
from rlprompt.serving.http_server import Address, HttpServer
from rlprompt.serving.json_api import Endpoint, Refusal, answer, json_app, read_json
from rlprompt.serving.metrics import Described, Metrics
from rlprompt.serving.registry_api import registry_endpoints
from rlprompt.serving.registry_clients import client_endpoints
from rlprompt.serving.request_log import RequestLog, RequestRecord, Trace
from rlprompt.serving.scheduler import (
    Answerer,
    Event,
    Full,
    Job,
    Scheduler,
    SchedulerLimits,
    Told,
)
from rlprompt.serving.shelf import ServedPrompt, Shelf, UnknownModelError
from rlprompt.serving.sources import Source
from rlprompt.serving.vllm.client import VllmSettings
from rlprompt.serving.vllm.scheduler import VllmScheduler
from rlprompt.serving.watch import Answered, Scorer, Watch, WatchSettings

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_PLAYGROUND = Path(__file__).parent / "playground"

METRICS: Mapping[str, Described] = {
    "rlprompt_requests_total": Described("counter", "Requests by model and HTTP status."),
    "rlprompt_prompt_tokens_total": Described("counter", "Tokens of conversations and prompts."),
    "rlprompt_completion_tokens_total": Described("counter", "Tokens drawn."),
    "rlprompt_cancelled_requests_total": Described("counter", "Requests whose client has gone."),
    "rlprompt_failed_steps_total": Described(
        "counter", "Decode steps, or requests to vLLM, that failed."
    ),
    "rlprompt_engine_up": Described("gauge", "1 where the vLLM server can be asked."),
    "rlprompt_swaps": Described("gauge", "Times that a name has got other content."),
    "rlprompt_waiting_requests": Described("gauge", "Requests in the queue."),
    "rlprompt_running_rows": Described("gauge", "Answers that are being decoded."),
    "rlprompt_time_to_first_token_seconds": Described("histogram", "From request to first token."),
    "rlprompt_step_seconds": Described("histogram", "Decode steps."),
    "rlprompt_monitor_scored_total": Described("counter", "Answers that the monitor has scored."),
    "rlprompt_monitor_left_out_total": Described("counter", "Answers that it had no time for."),
    "rlprompt_monitor_alarm": Described("gauge", "1 where the monitor has alarmed."),
}


@dataclass(frozen=True)
class PromptServerOptions:
    """How a server serves."""

    address: Address = field(default_factory=Address)
    access: Access = field(default_factory=Access)
    requests: RequestLimits = field(default_factory=RequestLimits)
    queue: SchedulerLimits = field(default_factory=SchedulerLimits)
    max_body_bytes: int = 1_000_000
    deadline_seconds: float = 300.0
    """From a request to the end of its answer."""
    follow_seconds: float = 5.0
    """How often registries are asked for changes of aliases; 0 = never."""
    watch: WatchSettings | None = None
    """What is watched; needs rewards."""
    force: bool = False
    """Whether prompts of another base are loaded too."""
    kinds: Sequence[type[Prompt]] = ()
    """Classes of the user's own that prompts may be of."""
    catalog: Catalog | None = None
    """The registry that can be read."""
    log: RequestLog | None = None
    """Where requests for answers are written down; closed by its owner."""
    vllm: VllmSettings | None = None
    """The vLLM server that draws the answers; None = the base draws them here."""


class PromptServer(HttpServer):
    """Answers under the prompts of a shelf until `shutdown`."""

    def __init__(
        self,
        policy: Policy,
        prompts: Mapping[str, Source],
        options: PromptServerOptions,
        scorer: Scorer | None = None,
    ) -> None:
        """Load the prompts and bind the socket.

        Args:
            policy: the policy over the base.
            prompts: what is served, by name.
            options: how it is served.
            scorer: the rewards; None = none.

        Raises:
            InputError: a prompt cannot be loaded, or the address cannot be used.
        """
        self.metrics = Metrics(METRICS)
        self._options, self._scorer = options, scorer
        self.scheduler = _answerer(policy, options, self.metrics)
        try:
            self.shelf = Shelf(policy, self.scheduler, force=options.force, kinds=options.kinds)
            for name, source in prompts.items():
                self.shelf.place(name, source)
            self._policy = policy
            super().__init__(json_app(self._endpoints(), openai_error), options.address)
            self._watch: Watch | None = None
            if options.watch is not None and scorer is not None:
                self._watch = Watch(scorer, options.watch, self.shelf, self.metrics)
            self._grammars = Grammars(policy)
        except BaseException:
            self.scheduler.close()
            raise
        self._render = ThreadPoolExecutor(1, thread_name_prefix="rlprompt-render")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="rlprompt-follow", daemon=True)
        self.scheduler.post = self._post
        self.scheduler.start()
        self._follower.start()

    def shutdown(self) -> None:
        """Take no more requests, answer those in progress, and wait for the end of that."""
        self.scheduler.drain()
        super().shutdown()

    def close(self) -> None:
        """Free the address and end all threads; twice is fine."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self.scheduler.close()
        self._follower.join()
        self._render.shutdown(cancel_futures=True)
        self._grammars.close()
        if self._watch is not None:
            self._watch.close()
        super().close()

    def _endpoints(self) -> list[Endpoint]:
        files = [
            Endpoint("GET", "/" if path.name == "index.html" else f"/{path.name}", _file(path))
            for path in (sorted(_PLAYGROUND.iterdir()) if _PLAYGROUND.is_dir() else ())
            if path.is_file() and path.suffix in (".html", ".js", ".css", ".svg", ".png", ".ico")
        ]
        return [
            Endpoint("POST", "/v1/chat/completions", partial(self._complete, form=CHAT)),
            Endpoint("POST", "/v1/responses", partial(self._complete, form=RESPONSE)),
            Endpoint("GET", "/v1/models", self._models),
            Endpoint("GET", "/v1/models/{model:path}", self._model),
            Endpoint("POST", "/v1/rewards", self._rewards),
            Endpoint("GET", "/admin/prompts", self._prompts),
            Endpoint("POST", "/admin/prompts", self._load),
            Endpoint("DELETE", "/admin/prompts/{name}", self._unload),
            Endpoint("POST", "/admin/aliases", self._point),
            Endpoint("DELETE", "/admin/aliases/{name}", self._unpoint),
            Endpoint("GET", "/healthz", self._health),
            Endpoint("GET", "/readyz", self._ready),
            Endpoint("GET", "/metrics", self._metrics_text),
            *self._registry_endpoints(),
            *files,
        ]

    def _registry_endpoints(self) -> list[Endpoint]:
        catalog = self._options.catalog
        if catalog is None:
            return []
        admit = partial(self._options.access.admit, scope="prompts")
        return [*registry_endpoints(catalog, admit), *client_endpoints(catalog, admit)]

    # Answers.

    async def _complete(self, request: Request, form: Form) -> Response:
        record = RequestRecord(
            request.url.path,
            Trace.of(request.headers.getlist("traceparent")),
            self.metrics,
            self._options.log,
        )
        try:
            record.key = self._options.access.admit(request, "chat")
            body = await read_json(request, self._options.max_body_bytes)
            asked = form.parse(body, self._options.requests)
            record.model, served = await self._rendered(self._found, asked)
            return await self._answered(request, asked, served, form, record)
        except Refusal as refusal:
            record.end(refusal.status, refusal.code)
            refusal.headers.update(record.headers)
            raise
        except BaseException as error:
            record.end(_status_of(error))
            raise

    def _found(self, asked: ChatRequest) -> tuple[str, ServedPrompt]:
        """The model and its prompt; a system text of the client's stands on the base alone."""
        try:
            model, served = self.shelf.find(asked.model, asked.user)
        except UnknownModelError as error:
            raise Refusal(404, str(error), param="model", code="model_not_found") from error
        if asked.system is None:
            return model, served
        if model != self.shelf.base:
            raise Refusal(
                400,
                f"{model} brings its own system prompt, so a system message has no place beside "
                f"it; leave it out, or ask {self.shelf.base}",
                param="messages",
                code="system_message_not_allowed",
            )
        try:
            return model, self.shelf.under_text(asked.system)
        except InputError as error:
            raise Refusal(400, str(error), param="messages") from error

    async def _answered(
        self,
        request: Request,
        asked: ChatRequest,
        served: ServedPrompt,
        form: Form,
        record: RequestRecord,
    ) -> Response:
        if asked.answer_format is not None and self._options.vllm is not None:
            raise Refusal(
                400,
                "this server lets vLLM draw, and holds no answers to JSON there; ask for text, or "
                "serve with the native engine",
                param=asked.answer_format.param,
            )
        ids = await self._rendered(self._query_ids, asked, served)
        ask = self._ask(asked, served, ids, await self._grammars.of(asked.answer_format))
        prompt_tokens = served.prefix.num_tokens + len(ids)
        decode = self._policy.decode
        reply = Reply(
            asked, record.model, served.hash, prompt_tokens, decode, ask.sampling, id=record.id
        )
        record.reply = reply
        watched = self._watch is not None and self._watch.wants()
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        texts = [AnswerText(self._policy.slot.decode, asked.stop) for _ in range(asked.copies)]
        job = Job(
            ask,
            texts,
            events.put_nowait,
            time.monotonic() + self._options.deadline_seconds,
        )
        try:
            self.scheduler.submit(job)
        except Full as error:
            raise Refusal(
                503 if error.stopping else 429,
                error.sentence,
                {"Retry-After": str(error.retry_after), **reply.headers},
                code="server_stopping" if error.stopping else "queue_full",
            ) from error
        self.metrics.add("rlprompt_prompt_tokens_total", prompt_tokens)
        ended = partial(self._settle, served if watched else None)
        drawn = Drawing(job, reply, events, request.receive, ended, record)
        first = await drawn.first()
        if asked.stream:
            return EventStream(drawn, form, first)
        drawn.take(first)
        await drawn.rest()
        record.end(200)
        return answer(form.whole(reply), headers={**reply.headers, **record.headers})

    def _query_ids(self, asked: ChatRequest, served: ServedPrompt) -> list[int]:
        try:
            return self.shelf.query_ids(served, asked.messages)
        except InputError as error:
            raise Refusal(400, str(error), param="messages") from error

    def _ask(
        self,
        asked: ChatRequest,
        served: ServedPrompt,
        ids: list[int],
        grammar: JsonGrammar | None,
    ) -> Ask:
        """What is to be drawn, where there is room for it."""
        most = self.scheduler.max_positions
        used = served.prefix.num_tokens + len(ids)
        wanted = asked.max_tokens or 1
        if used + wanted > most:
            raise Refusal(
                400,
                f"the conversation has {used} tokens with its prompt, and with an answer of "
                f"{wanted} more than the {most} positions of {self.shelf.base}; shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        length = asked.max_tokens or min(self._options.requests.tokens, most - used)
        limits = self._options.queue
        if asked.copies > limits.rows or (used + length) * asked.copies > limits.positions:
            raise Refusal(
                400,
                f"{asked.copies} answers of {used + length} positions are more than this server "
                f"decodes at once ({limits.rows} answers, {limits.positions} positions); ask for "
                "less",
                param="n",
            )
        own = served.sampling
        kept = ("temperature", "top_k", "top_p", "min_p", "stop_token_ids")
        values = {key: getattr(own, key) for key in kept}
        sampling = SamplingSettings(**{**values, **asked.sampling, "max_tokens": length})
        return Ask(
            served.prefix,
            tuple(ids),
            sampling,
            asked.seed,
            asked.copies,
            asked.top_logprobs,
            grammar,
        )

    async def _rendered(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """The result of work with templates and tokenizers, which is done one by one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._render, partial(work, *arguments))

    def _post(self, events: list[Told]) -> None:
        """Hand the events of a step over to the event loop; called by the decoding thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                self._loop.call_soon_threadsafe(_hand_out, events)

    def _settle(self, watched: ServedPrompt | None, drawn: Drawing) -> None:
        """Free what is not wanted any more, or let the monitor have what it has chosen."""
        reply = drawn.reply
        if not reply.is_whole:
            self.scheduler.cancel(drawn.job)
        elif self._watch is not None and watched is not None and reply.model != self.shelf.base:
            name = reply.model.removeprefix(f"{self.shelf.base}@")
            for choice, ids in zip(reply.choices, drawn.tokens, strict=True):
                said = Answered(name, watched, reply.request.messages, choice.text, tuple(ids))
                self._watch.offer(said)

    # Models and rewards.

    async def _models(self, request: Request) -> Response:
        self._options.access.admit(request, "chat")
        return answer({"object": "list", "data": [_card(m) for m in self.shelf.models()]})

    async def _model(self, request: Request) -> Response:
        self._options.access.admit(request, "chat")
        model = request.path_params["model"]
        if model not in self.shelf.models():
            raise Refusal(
                404, f"there is no model {model[:80]!r} here", param="model", code="model_not_found"
            )
        return answer(_card(model))

    async def _rewards(self, request: Request) -> Response:
        self._options.access.admit(request, "chat")
        body = await read_json(request, self._options.max_body_bytes)
        if not isinstance(body, dict) or set(body) != {"messages", "completion"}:
            raise Refusal(400, "the body is no object with messages and completion; send those")
        if not isinstance(body["completion"], str):
            raise Refusal(400, "completion is no text; send a string", param="completion")
        parsed = parse_chat(
            {"model": self.shelf.base, "messages": body["messages"]}, self._options.requests
        )
        if self._scorer is None:
            return answer({"rewards": {}})
        try:
            scores = await asyncio.to_thread(
                self._scorer.score, parsed.messages, body["completion"]
            )
        except InputError as error:
            raise Refusal(500, f"a reward failed: {error}") from error
        return answer({"rewards": scores})

    # What administrators do.

    async def _prompts(self, request: Request) -> Response:
        self._options.access.admit(request, "admin")
        return answer({"prompts": await asyncio.to_thread(self.shelf.described)})

    async def _load(self, request: Request) -> Response:
        self._options.access.admit(request, "admin")
        name, source = await self._two_texts(request, "name", "source")
        content = await self._administered(self.shelf.place, name, source)
        return answer({"name": name, "hash": content})

    async def _unload(self, request: Request) -> Response:
        self._options.access.admit(request, "admin")
        name = request.path_params["name"]
        await self._administered(self.shelf.take_away, name)
        return answer({"name": name, "removed": True})

    async def _point(self, request: Request) -> Response:
        self._options.access.admit(request, "admin")
        alias, to = await self._two_texts(request, "alias", "to")
        await self._administered(self.shelf.point, alias, to)
        return answer({"alias": alias, "to": to})

    async def _unpoint(self, request: Request) -> Response:
        self._options.access.admit(request, "admin")
        alias = request.path_params["name"]
        await self._administered(self.shelf.point, alias, None)
        return answer({"alias": alias, "removed": True})

    async def _two_texts(self, request: Request, one: str, other: str) -> tuple[str, str]:
        body = await read_json(request, self._options.max_body_bytes)
        if not isinstance(body, dict) or set(body) != {one, other}:
            raise Refusal(400, f"the body is no object with {one} and {other}; send those two")
        if not all(isinstance(value, str) and value for value in body.values()):
            raise Refusal(400, f"{one} or {other} is no text; send strings")
        return body[one], body[other]

    async def _administered(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        try:
            return await asyncio.to_thread(work, *arguments)
        except InputError as error:
            raise Refusal(400, str(error)) from error

    # Operation.

    async def _health(self, request: Request) -> Response:
        return answer({"status": "ok", "version": __version__})

    async def _ready(self, request: Request) -> Response:
        why = self.scheduler.unready
        if why is not None:
            raise Refusal(503, why, {"Retry-After": "5"})
        return answer({"status": "ready"})

    async def _metrics_text(self, request: Request) -> Response:
        self._options.access.admit(request, "metrics")
        self.metrics.set("rlprompt_swaps", self.shelf.swaps)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def _follow(self) -> None:
        seconds = self._options.follow_seconds
        while not self._stopping.wait(seconds or None):
            for name in self.shelf.follow():
                logger.warning("'%s' follows its registry", name)


def _answerer(policy: Policy, options: PromptServerOptions, metrics: Metrics) -> Answerer:
    if options.vllm is not None:
        return VllmScheduler(policy, options.vllm, options.queue, metrics)
    policy.head_prefix()
    return Scheduler(ContinuousDecoder(policy), options.queue, metrics)


def _hand_out(events: list[Told]) -> None:
    for job, each in events:
        job.deliver(each)


def _status_of(error: BaseException) -> int:
    """The HTTP status that a client gets for an error that is no refusal."""
    if isinstance(error, ClientDisconnect):
        return 499
    return 503 if isinstance(error, asyncio.CancelledError) else 500


def _card(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "rlprompt"}


def _file(path: Path) -> Callable[[Request], Any]:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    headers = {
        "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; img-src 'self' "
        "data:",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    async def call(request: Request) -> Response:
        return Response(path.read_bytes(), headers=headers, media_type=kind)

    return call
