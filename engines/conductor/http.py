"""The HTTP front: OpenAI's endpoints over the pipeline, and `/healthz`.

Rules kept here: every answer is JSON in OpenAI's shape, errors, 404 and 405 included, and carries
`x-request-id`; an error before the first token is an HTTP status, one after it an event of the
stream, which then ends without `[DONE]`; a client that goes away, or does not read, ends its job
and everything that the job held.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from snowskin.engines.conductor.answer_text import AnswerText
from snowskin.engines.conductor.errors import InvalidParameter, ModelUnknown
from snowskin.engines.conductor.intake import (
    REQUEST_ID_HEADER,
    ServedModel,
    body_of,
    headers_of,
    job_of,
    request_id_of,
)
from snowskin.engines.conductor.job import Finished, FirstToken, Job, JobReport
from snowskin.engines.conductor.openai import (
    ChatRequest,
    CompletionRequest,
    parse_chat,
    parse_completion,
)
from snowskin.engines.conductor.openai_answers import (
    DONE,
    Answer,
    Endpoint,
    JsonObject,
    encoded,
    error_headers,
    error_object,
    error_of,
    event,
    http_status,
    report_object,
)
from snowskin.engines.conductor.run import STOP
from snowskin.engines.conductor.sse import ClientGone, EventStream, while_connected
from snowskin.kvstore.metrics import Metrics
from snowskin.kvstore.telemetry import bind_request, get_logger, metrics_response
from snowskin.transport.errors import SnowskinError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from starlette.types import ASGIApp

    from snowskin.engines.conductor.metrics import ConductorMetrics
    from snowskin.engines.conductor.pipeline import Pipeline
    from snowskin.engines.conductor.run import Run
    from snowskin.kvstore.clock import Clock

CLIENT_GONE = 499  # nobody reads it; the word is nginx's

Handler = Callable[[HttpRequest], Awaitable[Response]]

log = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A request that is understood: what to run, and how to answer."""

    job: Job
    answer: Answer
    stops: tuple[str, ...]
    with_stats: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What some tokens add to an answer; the last one has the finish reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str = ""


class HttpFront:
    """The routes and what they need."""

    def __init__(
        self,
        pipeline: Pipeline,
        model: ServedModel,
        clock: Clock,
        *,
        metrics: Metrics | None = None,
        counts: ConductorMetrics | None = None,
    ) -> None:
        """Answers for one model; `counts` are part of `metrics`."""
        self._metrics = metrics
        self._counts = counts
        self._pipeline = pipeline
        self._model = model
        self._clock = clock

    def app(self) -> ASGIApp:
        """The ASGI application."""
        app = Starlette(
            routes=[
                Route("/v1/completions", _guarded(self._completion), methods=["POST"]),
                Route("/v1/chat/completions", _guarded(self._chat), methods=["POST"]),
                Route("/v1/models", _guarded(self._models), methods=["GET"]),
                Route("/v1/models/{name:path}", _guarded(self._one_model), methods=["GET"]),
                Route("/healthz", _guarded(self._health), methods=["GET"]),
                Route("/metrics", _guarded(self._scrape), methods=["GET"]),
            ],
            exception_handlers={HTTPException: _no_such_route},
        )
        return app if self._counts is None else self._counts.counted(app)

    # --- endpoints

    async def _completion(self, request: HttpRequest) -> Response:
        return await self._generate(request, Endpoint.COMPLETION, parse_completion)

    async def _chat(self, request: HttpRequest) -> Response:
        return await self._generate(request, Endpoint.CHAT, parse_chat)

    async def _generate(
        self,
        request: HttpRequest,
        endpoint: Endpoint,
        parse: Callable[[bytes], CompletionRequest | ChatRequest],
    ) -> Response:
        arrived_at_s = self._clock.now_s()
        headers = headers_of(request)
        # Read first, and only read: who is refused in the middle of sending may not see why.
        body = await body_of(request)
        with self._pipeline.intake():
            wanted = parse(body)
            job = await job_of(wanted, headers, self._model, arrived_at_s=arrived_at_s)
        asked = _Asked(
            job=job,
            answer=Answer(
                endpoint=endpoint,
                request_id=job.request_id,
                model=self._model.name,
                created_at=int(time.time()),
                with_usage=wanted.include_usage,
                with_token_ids=bool(wanted.return_token_ids),
            ),
            stops=wanted.stop,
            with_stats=headers.with_stats,
        )
        if wanted.stream:
            return EventStream(
                partial(self._events, asked), partial(_error, job.request_id), job.request_id
            )
        return await while_connected(request.receive, self._whole(asked))

    async def _models(self, request: HttpRequest) -> Response:
        return _json(request_id_of(request), {"object": "list", "data": [self._model_object()]})

    async def _one_model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self._model.name:
            raise ModelUnknown(
                f"the model {name[:100]!r} is not served here", hint=f"use {self._model.name!r}"
            )
        return _json(request_id_of(request), self._model_object())

    async def _health(self, request: HttpRequest) -> Response:
        if set(request.query_params) - {"live"}:
            raise InvalidParameter(
                "/healthz takes one query parameter", param="live", hint="?live=1, or none"
            )
        if request.query_params.get("live") == "1":
            return _json(request_id_of(request), {"ok": True})
        view = self._pipeline.scheduler.view()
        missing = view.missing_roles()
        reason = f"no ready instance: {', '.join(missing)}" if missing else ""
        if not missing and view.shape() is None:
            reason = "the prefill and the decode instances do not share a layout"
        if self._pipeline.is_draining:
            reason = "shutting down"
        facts: JsonObject = {"ok": not reason, "num_requests": view.num_requests}
        if reason:
            facts["reason"] = reason
        return _json(request_id_of(request), facts, status=503 if reason else 200)

    async def _scrape(self, _request: HttpRequest) -> Response:
        return metrics_response(self._metrics or Metrics("conductor"))

    def _model_object(self) -> JsonObject:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._model.created_at,
            "owned_by": "snowskin",
        }

    # --- answers

    async def _whole(self, asked: _Asked) -> Response:
        async with self._pipeline.run(asked.job) as run:
            texts, token_ids, finish_reason = [], list[int](), ""
            async for piece in self._pieces(run, asked):
                texts.append(piece.text)
                token_ids += piece.token_ids
                finish_reason = piece.finish_reason or finish_reason
            report = _read_report(run, len(token_ids))
        body = asked.answer.whole(
            "".join(texts),
            token_ids,
            finish_reason=finish_reason,
            report=report,
            extra=_extra(asked, report),
        )
        return _json(asked.job.request_id, body)

    @asynccontextmanager
    async def _events(self, asked: _Asked) -> AsyncIterator[AsyncIterator[bytes]]:
        """The job, running, as the events of its answer."""
        async with (
            self._pipeline.run(asked.job) as run,
            aclosing(self._streamed(run, asked)) as events,
        ):
            yield events

    async def _streamed(self, run: Run, asked: _Asked) -> AsyncGenerator[bytes, None]:
        """One `bytes` an event; errors before the first token are raised."""
        answer, num_tokens, begun = asked.answer, 0, False
        try:
            async for piece in self._pieces(run, asked):
                num_tokens += len(piece.token_ids)
                if not begun and answer.endpoint is Endpoint.CHAT:
                    yield event(answer.role_chunk())
                begun = True
                if piece.text or (piece.token_ids and answer.with_token_ids):
                    yield event(answer.text_chunk(piece.text, piece.token_ids))
                if piece.finish_reason:
                    report = _read_report(run, num_tokens)
                    yield event(answer.last_chunk(piece.finish_reason, _extra(asked, report)))
        except SnowskinError as error:
            if not begun:
                raise
            yield event(error_of(error))
            return
        if answer.with_usage:
            yield event(answer.usage_chunk(_read_report(run, num_tokens)))
        yield DONE

    async def _pieces(self, run: Run, asked: _Asked) -> AsyncIterator[_Piece]:
        """The run's events as text, up to the end or to a stop string."""
        text = AnswerText(
            self._model.tokenizer,
            stops=asked.stops,
            stop_token_ids=asked.job.sampling.stop_token_ids,
        )
        async for happened in run:
            if isinstance(happened, Finished):
                rest = text.flush()
                reason = STOP if text.matched else happened.finish_reason
                yield _Piece(text=rest, token_ids=(), finish_reason=reason)
                return
            tokens = (
                (happened.token_id,) if isinstance(happened, FirstToken) else happened.token_ids
            )
            added, num_read = "", 0
            for token_id in tokens:
                added += text.push(token_id)
                num_read += 1
                if text.matched:
                    break
            if text.matched:
                run.enough()
                yield _Piece(text=added, token_ids=tokens[:num_read], finish_reason=STOP)
                return
            yield _Piece(text=added, token_ids=tokens)


def _guarded(handler: Handler) -> Handler:
    """Turns what a handler raises into an answer, and binds the request's id to the logs."""

    async def answer(request: HttpRequest) -> Response:
        request_id = request_id_of(request)
        with bind_request(request_id):
            try:
                return await handler(request)
            except SnowskinError as error:
                return _error(request_id, error)
            except (ClientGone, ClientDisconnect):
                log.info("client gone")
                return Response(status_code=CLIENT_GONE)
            except Exception as error:
                log.error("http request broke", path=request.url.path, exc_info=error)
                body = error_object(500, "internal error", code="internal")
                return _json(request_id, body, status=500)

    return answer


async def _no_such_route(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for these only"
    path = request.url.path[:200]
    message, code = f"{request.method} {path}: {error.detail}", "bad_request"
    if error.status_code == 404:
        message, code = f"{path} is not an endpoint", "unknown_url"
    elif error.status_code == 405:
        message, code = f"{request.method} is not allowed on {path}", "method_not_allowed"
    body = error_object(error.status_code, message, code=code)
    return _json(request_id_of(request), body, status=error.status_code, headers=error.headers)


def _error(request_id: str, error: SnowskinError) -> Response:
    return _json(
        request_id, error_of(error), status=http_status(error), headers=error_headers(error)
    )


def _json(
    request_id: str,
    body: JsonObject,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return Response(
        encoded(body),
        status_code=status,
        media_type="application/json",
        headers={**(headers or {}), REQUEST_ID_HEADER: request_id},
    )


def _read_report(run: Run, num_tokens: int) -> JobReport:
    """The report as its reader sees it: tokens behind a stop string were never its."""
    return replace(run.report, num_generated_tokens=num_tokens)


def _extra(asked: _Asked, report: JobReport) -> JsonObject:
    if not asked.with_stats:
        return {}
    return {"snowskin": report_object(report, asked.job.request_id)}
