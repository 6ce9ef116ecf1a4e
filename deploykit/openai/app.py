"""The routes. ``create_app`` builds them for the models of one Triton server."""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deploykit.artifacts import installed_versions
from deploykit.openai.admission import HEALTH, Admission, error_response, json_response
from deploykit.openai.calls import AccessLog, Call, call_of
from deploykit.openai.chat import chat_completion, chat_events
from deploykit.openai.chat_request import ChatBody
from deploykit.openai.collect_answers import event
from deploykit.openai.completion_request import CompletionBody
from deploykit.openai.completions import completion, completion_events
from deploykit.openai.disconnect import event_stream, while_connected
from deploykit.openai.document import openapi_document
from deploykit.openai.errors import ApiError
from deploykit.openai.generator import GenerationRequest, Generator, Piece
from deploykit.openai.limits import Keys, Limits
from deploykit.openai.metrics import PortMetrics
from deploykit.openai.predictors import Predictors, TextsBody
from deploykit.openai.read_body import Body, read_body
from deploykit.openai.response_request import ResponseBody, own_names
from deploykit.openai.responses import response, response_events
from deploykit.openai.sampling_fields import MOST_TOKENS
from deploykit.openai.triton_routes import TritonRoutes
from deploykit.tasks.protocol import Predictor, Task, TaskFacts
from deploykit.tasks.registry import get_task, task_names, task_of
from deploykit.tasks.text_generation.facts import TextGeneration

log = logging.getLogger(__name__)

_CLIENT_CLOSED_REQUEST = 499
_ONLY_TRACES = {"metrics": False, "logs": False, "operation_spans": False, "auto_configure": False}


def create_app(
    models: Mapping[str, TaskFacts],
    generator: Generator,
    open_model: Callable[[str], Predictor],
    *,
    created: int,
    metrics_url: str = "",
    keys: Keys | None = None,
    triton: TritonRoutes | None = None,
    metrics: PortMetrics | None = None,
    access_log: AccessLog | None = None,
    traces: Any = None,
) -> FastAPI:
    """Return the app. ``models`` are those served, ``created`` the time they were started, in seconds since 1970.

    ``generator`` answers for language models; ``open_model`` connects to a model of another task. ``keys`` say who may
    use what. With ``triton``, the routes of Triton's HTTP API are answered too. Requests are counted in ``metrics``, and
    traced with ``traces``, a TracerProvider.
    """
    predictors = Predictors(open_model)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await generator.close()
        if triton is not None:
            await triton.close()
        if access_log is not None:
            access_log.close()
        await asyncio.to_thread(predictors.close)
        if traces is not None:
            await asyncio.to_thread(traces.shutdown)

    tracing: dict[str, Any] = {} if traces is None else {"telemetry": {**_ONLY_TRACES, "tracer_provider": traces}}
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, **tracing)
    _add_errors(app)
    counted = metrics or PortMetrics()
    app.add_middleware(Admission, keys=keys or Keys(), metrics=counted, log=access_log)
    if triton is not None:
        triton.add_to(app)

    def listed(name: str) -> dict[str, Any]:
        facts = models[name]
        return {"id": name, "object": "model", "created": created, "owned_by": "deploykit", "task": facts.name}

    def require(call: Call, name: str, route: str, verb: str) -> None:
        if name not in models:
            raise _unknown_model(name)
        call.model = name
        task = task_of(models[name])
        if route not in _routes(task):
            where = f"ask it at {' or '.join(_routes(task))}"
            raise ApiError(
                f"the model {name} {task.does}, it does not {verb}; {where}", param="model", code="wrong_task"
            )

    def ask(
        call: Call, prompts: Sequence[GenerationRequest], rows: int, param: str
    ) -> list[AsyncGenerator[Piece, None]]:
        """Ask a language model for ``rows`` answers, within the caller's limits."""
        call.rows = rows
        call.limits.check_rows(rows, param)
        limited = [_limited(asked, call.limits, models[asked.model]) for asked in prompts]
        return [call.counted(generator.generate(asked)) for asked in limited]

    @app.get(HEALTH)
    async def health() -> Response:
        ready = await generator.ready()
        return json_response({"status": "ok" if ready else "not ready"}, 200 if ready else 503)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        tritons = await asyncio.to_thread(_get, metrics_url)
        counted.triton_up.set(1 if tritons else 0)
        return Response(tritons + counted.text().encode(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [listed(name) for name in models]})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        if name not in models:
            raise _unknown_model(name)
        return json_response(listed(name))

    @app.post(_CHAT)
    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        call = call_of(request)
        require(call, body.model, _CHAT, "generate text")
        [pieces] = ask(call, [body.asked()], body.n, "n")
        if body.stream:
            return await event_stream(request, _with_errors(call, chat_events(body, pieces)))
        return json_response(await while_connected(request.receive, chat_completion(body, pieces)))

    @app.post(_COMPLETIONS)
    async def complete(request: Request) -> Response:
        body = await read_body(request, CompletionBody)
        call = call_of(request)
        require(call, body.model, _COMPLETIONS, "generate text")
        prompts = ask(call, body.asked(), len(body.prompt) * max(body.n, body.best_of or 1), "prompt")
        if body.stream:
            return await event_stream(request, _with_errors(call, completion_events(body, prompts)))
        return json_response(await while_connected(request.receive, completion(body, prompts)))

    @app.post(_RESPONSES)
    async def respond(request: Request) -> Response:
        body = await read_body(request, ResponseBody)
        call = call_of(request)
        require(call, body.model, _RESPONSES, "generate text")
        with own_names():
            [pieces] = ask(call, [body.chat.asked()], 1, "input")
        if body.stream:
            return await event_stream(request, _with_errors(call, response_events(body, pieces)))
        return json_response(await while_connected(request.receive, response(body, pieces)))

    def answers(task: Task, route: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            body = await read_body(request, TextsBody)
            call = call_of(request)
            require(call, body.model, route, task.verb)
            call.rows = len(body.input)
            call.limits.check_rows(call.rows, "input")
            return json_response(await predictors.answer(body))

        return answer

    bodies: dict[str, type[Body]] = {_CHAT: ChatBody, _COMPLETIONS: CompletionBody, _RESPONSES: ResponseBody}
    for task in map(get_task, task_names()):
        if not _generates(task):
            for route in _routes(task):
                app.add_api_route(route, answers(task, route), methods=["POST"])
                bodies[route] = TextsBody
    document = openapi_document(installed_versions()["deploykit"], bodies, _GENERATING)

    @app.get("/openapi.json")
    async def show_document() -> Response:
        return json_response(document)

    return app


_CHAT, _COMPLETIONS, _RESPONSES = _GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def _generates(task: Task) -> bool:
    return task.facts.graph_kind == "decoder"


def _routes(task: Task) -> tuple[str, ...]:
    """Return the routes of a task: /v1/classify for one whose verb is "classify"."""
    return _GENERATING if _generates(task) else (f"/v1/{task.verb.split()[0]}",)


def _limited(asked: GenerationRequest, limits: Limits, facts: TaskFacts) -> GenerationRequest:
    """Return ``asked`` with the caller's limit of tokens. Raises ApiError if it requests more."""
    default = facts.sampling.max_new_tokens if isinstance(facts, TextGeneration) else MOST_TOKENS
    most = limits.most_tokens(asked.sampling.get("max_new_tokens"), default)
    return asked if most is None else replace(asked, sampling={**asked.sampling, "max_new_tokens": most})


async def _with_errors(call: Call, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Yield ``events``; an error after the first event becomes the last event, an earlier error is raised."""
    begun = False
    async with aclosing(events):
        try:
            async for one in events:
                yield one
                begun = True
        except ApiError as error:
            if not begun:
                raise
            call.error = error.code or str(error.status)
            yield event(error.body())
        except Exception:
            if not begun:
                raise
            log.exception("a stream failed")
            call.error = "500"
            yield event(ApiError("the server failed", 500).body())


def _unknown_model(name: str) -> ApiError:
    return ApiError(
        f"the model {name!r} is not served here; GET /v1/models lists those that are",
        404,
        param="model",
        code="model_not_found",
    )


def _add_errors(app: FastAPI) -> None:
    """Give every error the API's form."""

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        call_of(request).error = error.code or ""
        return error_response(request.url.path, error)

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code == 404:
            routes = sorted(path for path in {getattr(route, "path", "") for route in app.routes} if "{" not in path)
            told += f"; the routes here are {', '.join(routes)}"
        fault = ApiError(told, error.status_code)
        return error_response(request.url.path, fault, error.headers)

    async def fail(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(request.url.path, ApiError("the server failed", 500))

    async def closed(request: Request, error: Exception) -> Response:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)  # nobody receives it

    app.add_exception_handler(ApiError, refuse)
    app.add_exception_handler(HTTPException, no_route)
    app.add_exception_handler(ClientDisconnect, closed)
    app.add_exception_handler(Exception, fail)


def _get(url: str) -> bytes:
    """Return the answer of Triton's metrics port; b"" while Triton does not run."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=5.0)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return b""
    finally:
        connection.close()
