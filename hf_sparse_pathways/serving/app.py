"""The HTTP side: OpenAI's endpoints for chats, completions and models, and ``/health``.

The event loop only reads requests and passes text on; prompts are encoded and text is generated on
other threads. Beside each answer a task waits until its client has gone, or has it: then the
generation is stopped.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hf_sparse_pathways.serving.answers import (
    LAST_EVENT,
    Answer,
    error_object,
    event,
    model_list,
)
from hf_sparse_pathways.serving.generation import Generation
from hf_sparse_pathways.serving.requests import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    RequestError,
    parse_request,
)
from hf_sparse_pathways.serving.service import Service

MOST_BYTES = 4 * 2**20
"""Of a request's body."""


def make_app(service: Service) -> FastAPI:
    """Return the application that serves a model; it ends the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.watchers = set()
    started = int(time.time())

    @app.exception_handler(RequestError)
    async def tell(_: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error_object(error), status_code=error.status)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        told = f"{request.method} {request.url.path}: {error.detail}"
        refused = RequestError(told, status=error.status_code)
        return JSONResponse(
            error_object(refused), status_code=error.status_code, headers=error.headers
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse(model_list(service.names, started))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest)

    return app


async def _answer(service: Service, request: Request, kind: type[GenerationRequest]) -> Response:
    """Answer a request, whole or in a stream."""
    asked = parse_request(kind, await _read_body(request))
    prompt = await run_in_threadpool(service.encode, asked)
    chat = isinstance(asked, ChatRequest)
    answer = Answer(model=asked.model, chat=chat, prompt_tokens=len(prompt))
    generation = service.start(asked, prompt)
    _watch(request, generation)
    if asked.stream:
        counted = bool(asked.stream_options and asked.stream_options.include_usage)
        events = _events(generation, answer, counted=counted)
        return StreamingResponse(events, media_type="text/event-stream")
    try:
        text = "".join([piece async for piece in generation.pieces()])
    except Exception as error:  # noqa: BLE001  it is logged where it was raised
        return JSONResponse(error_object(error), status_code=500)
    whole = answer.whole(text, generation.finish_reason, generation.tokens)
    return JSONResponse(whole)


async def _events(generation: Generation, answer: Answer, *, counted: bool) -> AsyncIterator[str]:
    """Yield an answer as the events of a stream."""
    if answer.chat:
        yield event(answer.first())
    try:
        async for piece in generation.pieces():
            yield event(answer.piece(piece))
    except Exception as error:  # noqa: BLE001  it is logged where it was raised
        yield event(error_object(error))
        return
    yield event(answer.piece("", generation.finish_reason))
    if counted:
        yield event(answer.counted(generation.tokens))
    yield LAST_EVENT


def _watch(request: Request, generation: Generation) -> None:
    """Stop a generation once its client has gone, even one that never read the first word."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        generation.stop()

    watcher = asyncio.create_task(wait())
    watchers = request.app.state.watchers  # the loop itself does not keep a task alive
    watchers.add(watcher)
    watcher.add_done_callback(watchers.discard)


async def _read_body(request: Request) -> bytes:
    """Read a request's body.

    Raises:
        RequestError: It is not JSON by its header, or too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a web page cannot send elsewhere without being asked
        raise RequestError(
            f"The body has to be JSON: send 'content-type: application/json', not {kind!r}.",
            status=415,
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise RequestError(f"The body has more than {MOST_BYTES} bytes.", status=413)
    return bytes(body)
