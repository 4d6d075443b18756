"""The HTTP side of the server: OpenAI's chat completions and transcriptions, models, health, Prometheus metrics."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor

from jinja2 import TemplateError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import BatchFeature

from configuration_lsm import num_positions
from processing_lsm import LsmProcessor
from recipes.serving.clips import Limits, TooLargeError, read_clip
from recipes.serving.downloads import downloaded
from recipes.serving.engine import BusyError, Engine, Event, Job
from recipes.serving.questions import Question, RequestError, read_chat, read_json, read_transcription

logger = logging.getLogger(__name__)

DOWNLOADS = 32  # requests whose URLs are read at the same time
DECODERS = 2  # threads that decode clips and compute their features
STATUS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Metrics:
    """What Prometheus reads."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter("lsm_requests", "Finished requests", ["route", "status"], registry=self.registry)
        self.tokens = Counter("lsm_tokens", "Tokens", ["kind"], registry=self.registry)
        self.first = Histogram("lsm_first_token_seconds", "Time to the first text", registry=self.registry)
        self.whole = Histogram("lsm_answer_seconds", "Time to the end of the answer", registry=self.registry)
        for name, about, value in (
            ("lsm_waiting", "Requests that wait", lambda: len(engine.waiting)),
            ("lsm_running", "Requests that are answered", lambda: engine.running),
            ("lsm_model_seconds", "Time in which the model ran", lambda: engine.seconds),
        ):
            Gauge(name, about, registry=self.registry).set_function(value)


class Api:
    """The routes of the server.

    Args:
        engine: the running engine.
        processor: the processor of its LSM.
        name: name of the model, for clients.
        instruction: what the model is asked for a transcription.
        limits: limits of a request.
        key: key that clients must send; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        processor: LsmProcessor,
        name: str,
        instruction: str,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        key: str | None = None,
    ):
        self.engine, self.processor, self.name, self.instruction = engine, processor, name, instruction
        self.limits, self.key, self.started = limits, key, int(time.time())
        self.metrics, self.workers = Metrics(engine), ThreadPoolExecutor(DECODERS, "clips")
        self.positions = num_positions(engine.model.config.text_config)
        self.longest = max(map(len, processor.tokenizer.get_vocab()))  # characters of a token
        self.downloads = asyncio.Semaphore(DOWNLOADS)
        self.requests, self.most_requests = 0, engine.max_waiting + engine.max_batch
        routes = [
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/audio/transcriptions", self._guarded(self.transcribe), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{model:path}", self._guarded(self.models)),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
        ]
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._refused})

    # Routes

    async def chat(self, request: Request) -> Response:
        return await self._while_there(request, self._chat(read_json(await self._body(request))))

    async def _chat(self, body: dict) -> Response:
        self._check_model(body.get("model"))
        loop = asyncio.get_running_loop()
        question = await loop.run_in_executor(self.workers, read_chat, body, self.limits)
        del body  # it may be large, and a stream may be long
        answer = await self._ask(question)
        if question.stream:
            return _Stream(answer, self._chat_stream(answer, question.usage))
        text, finish = await answer.whole()
        return JSONResponse(
            {
                **answer.head("chat.completion"),
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": text, "refusal": None},
                        "logprobs": None,
                        "finish_reason": finish,
                    }
                ],
                "usage": answer.usage(),
            }
        )

    async def transcribe(self, request: Request) -> Response:
        return await self._while_there(request, self._transcribe(*await self._form(request)))

    async def _transcribe(self, form: dict[str, str], file: bytes) -> Response:
        self._check_model(form.get("model"))
        question = read_transcription(form, file, self.instruction, self.limits)
        answer = await self._ask(question)
        if question.stream:
            return _Stream(answer, self._transcript_stream(answer))
        text, _ = await answer.whole()
        if form.get("response_format") == "text":
            return PlainTextResponse(text + "\n")
        return JSONResponse({"text": text})

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "lsm"}
        if "model" in request.path_params:
            self._check_model(request.path_params["model"])
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        alive = self.engine.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        return PlainTextResponse(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    # What the routes share

    def _guarded(self, route):
        """Return the route with its key, its number of requests and its errors handled."""

        async def handle(request: Request) -> Response:
            status, began = 500, time.monotonic()
            try:
                self._check_key(request)
                if self.requests >= self.most_requests:
                    raise BusyError(f"{self.requests} requests are being served already; try again later.")
                self.requests += 1
                try:
                    response = await route(request)
                finally:
                    self.requests -= 1
                status = response.status_code
                return response
            except Exception as error:
                response = _error(error)
                status = response.status_code
                return response
            finally:
                self.metrics.requests.labels(route.__name__, status).inc()
                logger.info("%s %s %.3f s", route.__name__, status, time.monotonic() - began)

        return handle

    async def _refused(self, request: Request, error: Exception) -> Response:
        return _error(error)

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise HTTPException(401, "The API key is missing or wrong.")

    def _check_model(self, name: object) -> None:
        if name is not None and name != self.name:
            raise HTTPException(404, f"There is no model {str(name)[:80]!r}; this server has {self.name!r}.")

    async def _parts(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the body, as far as the limits allow."""
        if int(request.headers.get("content-length") or 0) > self.limits.body:
            raise TooLargeError(f"The body has more than {self.limits.body} bytes.")
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise TooLargeError(f"The body has more than {self.limits.body} bytes.")
            yield part

    async def _body(self, request: Request) -> bytes:
        with _upload_time():
            async with asyncio.timeout(self.limits.upload_seconds):
                return b"".join([part async for part in self._parts(request)])

    async def _form(self, request: Request) -> tuple[dict[str, str], bytes]:
        """Return the text fields and the file of a form."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise RequestError("A transcription is asked for with multipart/form-data.")
        with _upload_time():
            async with asyncio.timeout(self.limits.upload_seconds):
                form = await MultiPartParser(request.headers, self._parts(request), max_files=1, max_fields=20).parse()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(form.close)
            if not isinstance(file := form.get("file"), UploadFile):
                raise RequestError("'file' must be an audio file.", "file")
            texts = {name: value for name, value in form.items() if isinstance(value, str)}
            "".join([*texts, *texts.values()]).encode("utf-8")  # the form's charset may bring half characters
            return texts, await file.read()

    async def _while_there(self, request: Request, work: Coroutine[None, None, Response]) -> Response:
        """Return what `work` does after the request has arrived. It is cancelled if the client leaves.

        Raises:
            ClientDisconnect: the client has left.
            TimeoutError: the answer takes too long.
        """

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(work), asyncio.create_task(gone())]
        try:
            await asyncio.wait(tasks, timeout=self.limits.answer_seconds, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                return tasks[0].result()
            raise ClientDisconnect if tasks[1].done() else TimeoutError
        finally:
            for task in tasks:
                task.cancel()
            tasks.clear()  # an error knows this frame, and would keep itself and the body until a collection

    async def _ask(self, question: Question) -> "Answer":
        """Submit a question to the engine."""
        self._check_length(question.messages)
        loop = asyncio.get_running_loop()
        if any(isinstance(file, str) for file in question.files):
            async with self.downloads:
                question.files = await downloaded(question.files, self.limits)
        inputs = await loop.run_in_executor(self.workers, self._inputs, question)
        positions, length = self.positions, inputs["input_ids"].shape[1]
        if positions is not None and length >= positions:
            raise RequestError(f"The prompt takes {length} tokens, but the LLM has {positions} positions.", "messages")
        settings = dict(question.settings)
        if positions is not None:
            settings["max_tokens"] = min(settings["max_tokens"], positions - length)
        answer = Answer(self, length)
        answer.job = Job(inputs, answer.put, **settings)
        self.engine.submit(answer.job)
        self.metrics.tokens.labels("prompt").inc(length)
        return answer

    def _check_length(self, messages: list[dict]) -> None:
        """Refuse texts that cannot fit, before they are rendered and tokenised: that takes a minute for megabytes."""
        contents = (message["content"] for message in messages)
        parts = (
            part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)
        )
        length = sum(1 + len(part.get("text", "")) for part in parts)
        if self.positions is not None and length > self.positions * self.longest:
            reason = f"{length} characters, but the LLM has {self.positions} positions"
            raise RequestError(f"The prompt has {reason} of up to {self.longest} characters.", "messages")

    def _inputs(self, question: Question) -> BatchFeature:
        """Decode the clips and return the model inputs of a question."""
        rate = self.processor.feature_extractor.sampling_rate
        clips = [read_clip(file, self.limits, rate) for file in question.files]
        prompt = self.processor.apply_chat_template(question.messages, add_generation_prompt=True)
        return self.processor(text=prompt, audio=clips or None, return_tensors="pt")

    # Streams

    async def _chat_stream(self, answer: "Answer", usage: bool) -> AsyncIterator[dict]:
        head = answer.head("chat.completion.chunk")
        delta: dict = {"role": "assistant", "content": ""}
        yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}]}
        async for event in answer.events():
            delta = {"content": event.text} if event.text else {}
            yield {**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": event.finish}]}
        if usage:
            yield {**head, "choices": [], "usage": answer.usage()}

    async def _transcript_stream(self, answer: "Answer") -> AsyncIterator[dict]:
        text = ""
        async for event in answer.events():
            text += event.text
            if event.text:
                yield {"type": "transcript.text.delta", "delta": event.text}
        yield {"type": "transcript.text.done", "text": text}


class Answer:
    """The answer to a request, while it is written. If the client leaves, its job is cancelled."""

    def __init__(self, api: Api, prompt_tokens: int):
        self.api, self.prompt_tokens, self.tokens = api, prompt_tokens, 0
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue()
        self.began, self.id, self.created = time.monotonic(), f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.job: Job | None = None

    def put(self, event: Event) -> None:
        """Take an event from the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the server is being stopped, and its loop is closed
            self.loop.call_soon_threadsafe(self.queue.put_nowait, event)

    def leave(self) -> None:
        """Free the place in the engine, if the answer is not finished, and the clips. The job knows this answer: both
        would stay in memory until a collection."""
        if self.job is not None:
            self.api.engine.cancel(self.job)
            self.job = None

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events up to the end of the answer. Raises RuntimeError if the model failed."""
        first = True
        while True:
            event = await self.queue.get()
            if event.finish == "error":
                raise RuntimeError("the model failed")
            if first:
                self.api.metrics.first.observe(time.monotonic() - self.began)
            first, self.tokens = False, event.tokens
            yield event
            if event.finish is not None:
                self.api.metrics.whole.observe(time.monotonic() - self.began)
                self.api.metrics.tokens.labels("answer").inc(self.tokens)
                return

    async def whole(self) -> tuple[str, str]:
        """Return the text and why it ended."""
        try:
            events = [event async for event in self.events()]
            return "".join(event.text for event in events), events[-1].finish
        finally:
            self.leave()

    def head(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.api.name}

    def usage(self) -> dict:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}


class _Stream(StreamingResponse):
    """The events of an answer, as they are written. However it ends, also before its first event, it frees the place of
    the answer: a generator that was never begun has nothing that does."""

    def __init__(self, answer: Answer, events: AsyncIterator[dict]):
        super().__init__(self._lines(events), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.leave()

    async def _lines(self, events: AsyncIterator[dict]) -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(self.answer.api.limits.answer_seconds):
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
        except Exception as error:  # the status has been sent already
            yield f"data: {bytes(_error(error).body).decode()}\n\n"


@contextlib.contextmanager
def _upload_time():
    try:
        yield
    except TimeoutError as error:
        raise HTTPException(408, "The request did not arrive in time.") from error


def _error(error: Exception) -> JSONResponse:
    """Return the response to an error, in OpenAI's form. Only errors of the client say more than that there was one."""
    headers = {}
    match error:
        case HTTPException():
            status, message = error.status_code, error.detail
        case BusyError():
            status, message, headers = 429, str(error), {"retry-after": "1"}
        case TooLargeError():
            status, message = 413, str(error)
        case TimeoutError():
            status, message = 504, "The answer took too long."
        case ClientDisconnect():
            status, message = 499, "The client has left."
        case RecursionError():
            status, message = 400, "The request is nested too deeply."
        case ValueError() | TemplateError() | MultiPartException():
            status, message = 400, str(error)
        case _:
            logger.error("a request failed", exc_info=error)
            status, message = 500, "The server failed; its log says why."
    kind = STATUS.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"message": message, "type": kind, "param": getattr(error, "param", None), "code": None}
    if status == 413 or status == 408:  # the rest of the body is not read
        headers["connection"] = "close"
    return JSONResponse({"error": content}, status, headers)
