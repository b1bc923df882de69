"""A pyramid behind the HTTP interface that OpenAI's clients speak: completions and chats, streamed or whole.

    pip install 'pyramid-rt[serve]'
    python examples/openai_server.py --weights weights/smollm2 --port 8000

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="pyramid", prompt="def f(", max_tokens=32)

One sequence is decoded at a time; requests queue, and one whose client has gone is dropped within a round. For
several GPUs or machines see ray_serve.py, which serves the same two functions.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

import pyramid_rt
from pyramid_rt import BusyError, GenerationResult, InputError, Pyramid, PyramidError, SamplingParams

MODEL = "pyramid"
# Fields of a request that are options of `generate`, by our names; the last ones come in `extra_body`.
OPTIONS = {
    "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "temperature": "temperature",
    "top_p": "top_p", "seed": "seed", "stop": "stop", "top_k": "top_k", "min_p": "min_p", "method": "method",
    "stop_token_ids": "stop_token_ids", "ignore_eos": "ignore_eos",
}  # fmt: skip
# Fields that change the answer and are not offered, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none",), "response_format": ({"type": "text"},), "suffix": ("",),
    "echo": (False,), "logprobs": (False, 0), "top_logprobs": (0,), "functions": ([],),
}  # fmt: skip
# Fields that say nothing about the answer.
IGNORED = frozenset({"user", "store", "metadata", "service_tier", "parallel_tool_calls", "stream_options"})


class RequestError(Exception):
    """A request that is refused: what is said, and the field that is wrong."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class Call:
    """A checked request."""

    chat: bool
    prompt: Any
    params: SamplingParams
    stream: bool
    usage: bool  # whether a stream ends with the number of tokens
    model: str
    id: str
    created: int


async def completion(rt: Pyramid, request: Request) -> Response:
    """Answer POST /v1/completions."""
    return await _answer(rt, request, chat=False)


async def chat_completion(rt: Pyramid, request: Request) -> Response:
    """Answer POST /v1/chat/completions."""
    return await _answer(rt, request, chat=True)


def create_app(rt: Pyramid) -> FastAPI:
    """The application around a pyramid, which it closes at its end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(rt.close)

    app = FastAPI(title="pyramid_rt", lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await completion(rt, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await chat_completion(rt, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "me"}]}

    return app


async def _answer(rt: Pyramid, request: Request, *, chat: bool) -> Response:
    try:
        call = _parsed(await _body(request), chat=chat)
        if call.stream:
            # Checked now, so that a mistake is an answer with its status and not the first line of a stream.
            stream = rt.astream(call.prompt, call.params)
            return StreamingResponse(_events(call, stream), media_type="text/event-stream")
        result = await _unless_gone(request, rt.agenerate(call.prompt, call.params))
    except RequestError as error:
        return _refusal(400, "invalid_request_error", str(error), error.param)
    except InputError as error:
        return _refusal(400, "invalid_request_error", str(error))
    except BusyError as error:
        return _refusal(503, "server_error", str(error))
    except PyramidError as error:
        return _refusal(500, "server_error", str(error))
    if result is None:
        return Response(status_code=499)  # nobody is there to read it
    return JSONResponse(_whole(call, result))


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, found {type(body).__name__}")
    return body


def _parsed(body: dict[str, Any], *, chat: bool) -> Call:
    """Check everything about a request; options are checked by the pyramid's own rules."""
    subject = "messages" if chat else "prompt"
    if not body.get(subject):
        raise RequestError(f"{subject} is missing", subject)
    options = {}
    for name, value in body.items():
        if value is None or name in IGNORED or name in ("model", "stream", subject):
            continue
        if name in OPTIONS:
            options[OPTIONS[name]] = value
        elif value not in NEUTRAL.get(name, ()):
            raise RequestError(f"{name} is not offered here, found {json.dumps(value)[:80]}", name)
    for name in ("stream", "model"):
        kind = bool if name == "stream" else str
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise RequestError(f"{name} must be a {kind.__name__}, found {body[name]!r}", name)
    prompt = body[subject]
    if not chat and isinstance(prompt, list) and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise RequestError(f"one prompt at a time, found {len(prompt)}", subject)
        prompt = prompt[0]
    stream_options = body.get("stream_options")
    return Call(
        chat=chat,
        prompt=prompt,
        params=SamplingParams.build(options),
        stream=bool(body.get("stream")),
        usage=isinstance(stream_options, dict) and bool(stream_options.get("include_usage")),
        model=body.get("model") or MODEL,
        id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
    )


async def _unless_gone(request: Request, work: Any) -> GenerationResult | None:
    """The result of some work, or None once the client has gone; then the work is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=0.1)
            if not task.done() and await request.is_disconnected():
                return None
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _events(call: Call, stream: pyramid_rt.AsyncStream) -> AsyncIterator[str]:
    """Server-sent events. The server closes this when the client goes, and with it the stream."""
    try:
        async with stream:
            if call.chat:
                yield _event(_part(call, {"role": "assistant", "content": ""}))
            async for piece in stream:
                if piece:
                    yield _event(_part(call, {"content": piece} if call.chat else piece))
        result = stream.result
        yield _event(_part(call, {} if call.chat else "", _reason(result)))
        if call.usage:
            yield _event({**_part(call, {}), "choices": [], "usage": result.usage})
    except PyramidError as error:
        yield _event(_error("server_error", str(error)))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _whole(call: Call, result: GenerationResult) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": _reason(result), "logprobs": None}
    if call.chat:
        choice["message"] = {"role": "assistant", "content": result.text}
    else:
        choice["text"] = result.text
    kind = "chat.completion" if call.chat else "text_completion"
    return {**_head(call, kind), "choices": [choice], "usage": result.usage}


def _part(call: Call, content: Any, reason: str | None = None) -> dict[str, Any]:
    """A piece of a stream: a delta of a chat's message, or more text."""
    choice = {
        "index": 0,
        "finish_reason": reason,
        "logprobs": None,
        "delta" if call.chat else "text": content,
    }
    kind = "chat.completion.chunk" if call.chat else "text_completion"
    return {**_head(call, kind), "choices": [choice]}


def _head(call: Call, kind: str) -> dict[str, Any]:
    return {"id": call.id, "object": kind, "created": call.created, "model": call.model}


def _reason(result: GenerationResult) -> str:
    return "stop" if result.finish_reason == "stop" else "length"


def _error(kind: str, message: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _refusal(status: int, kind: str, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(_error(kind, message, param), status_code=status)


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve a pyramid to OpenAI's clients.")
    parser.add_argument(
        "--weights", default=str(pyramid_rt.demo_weights()), help="weights directory (the demo's)"
    )
    parser.add_argument("--device", help="cuda or cpu; CUDA where there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000)")
    given = parser.parse_args()
    try:
        rt = pyramid_rt.load(given.weights, device=given.device)
    except PyramidError as error:
        parser.error(str(error))
    print(f"listening at http://{given.host}:{given.port}/v1; Ctrl-C ends it", flush=True)
    # One Ctrl-C is enough: streams that are still open are cut off.
    uvicorn.run(
        create_app(rt),
        host=given.host,
        port=given.port,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )


if __name__ == "__main__":
    main()
