"""OpenAI-shaped answers: whole ones, chunks of a stream, and errors.

Rules kept here: pure: a value in, a JSON object out. Every error has the four fields of OpenAI's
`error` object; its HTTP status follows from the error's class and nothing else. `usage` counts
tokens that were generated, the one that ended the answer included; `cached_tokens` are prompt
tokens that were not computed again.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from snowskin.engines.conductor.errors import (
    BodyTimedOut,
    BodyTooLarge,
    InvalidParameter,
    ModelUnknown,
    RequestRefused,
)
from snowskin.engines.conductor.openai import Json
from snowskin.engines.errors import PromptTooLong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.engines.conductor.job import JobReport
    from snowskin.transport.errors import SnowskinError

JsonObject = dict[str, Json]

_HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 503,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class Endpoint(Enum):
    """Which of the two shapes."""

    COMPLETION = ("cmpl", "text_completion", "text_completion")
    CHAT = ("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(self, id_prefix: str, object_name: str, chunk_name: str) -> None:
        """The words that tell them apart."""
        self.id_prefix = id_prefix
        self.object_name = object_name
        self.chunk_name = chunk_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What all chunks of one answer have in common; `created_at` is in Unix seconds."""

    endpoint: Endpoint
    request_id: str
    model: str
    created_at: int
    with_usage: bool = False
    with_token_ids: bool = False

    def whole(
        self,
        text: str,
        token_ids: Sequence[int],
        *,
        finish_reason: str,
        report: JobReport,
        extra: JsonObject,
    ) -> JsonObject:
        """The answer to a request without `stream`."""
        choice: JsonObject = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        if self.endpoint is Endpoint.CHAT:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {
            **self._head(self.endpoint.object_name),
            "choices": [self._with_tokens(choice, token_ids)],
            "usage": usage(report),
            **extra,
        }

    def role_chunk(self) -> JsonObject:
        """The first chunk of a chat: whose turn it is."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def text_chunk(self, text: str, token_ids: Sequence[int]) -> JsonObject:
        """Some text, and the tokens that came since the last chunk."""
        return self._chunk(self._with_tokens(self._piece(text), token_ids))

    def last_chunk(self, finish_reason: str, extra: JsonObject) -> JsonObject:
        """The end of the text."""
        piece = self._piece("")
        if self.endpoint is Endpoint.CHAT:
            piece = {"delta": {}}
        return {**self._chunk(piece, finish_reason), **extra}

    def usage_chunk(self, report: JobReport) -> JsonObject:
        """The chunk that `stream_options.include_usage` asks for."""
        return {**self._head(self.endpoint.chunk_name), "choices": [], "usage": usage(report)}

    def _piece(self, text: str) -> JsonObject:
        return {"delta": {"content": text}} if self.endpoint is Endpoint.CHAT else {"text": text}

    def _with_tokens(self, piece: JsonObject, token_ids: Sequence[int]) -> JsonObject:
        return {**piece, "token_ids": list(token_ids)} if self.with_token_ids else piece

    def _chunk(self, piece: JsonObject, finish_reason: str | None = None) -> JsonObject:
        chunk: JsonObject = {
            **self._head(self.endpoint.chunk_name),
            "choices": [{"index": 0, **piece, "finish_reason": finish_reason, "logprobs": None}],
        }
        return {**chunk, "usage": None} if self.with_usage else chunk

    def _head(self, object_name: str) -> JsonObject:
        return {
            "id": f"{self.endpoint.id_prefix}-{self.request_id}",
            "object": object_name,
            "created": self.created_at,
            "model": self.model,
        }


def usage(report: JobReport) -> JsonObject:
    """OpenAI's `usage` object."""
    return {
        "prompt_tokens": report.num_prompt_tokens,
        "completion_tokens": report.num_generated_tokens,
        "total_tokens": report.num_prompt_tokens + report.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": report.num_cached_tokens or 0},
    }


def report_object(report: JobReport, request_id: str) -> JsonObject:
    """The `snowskin` object of an answer whose request asked for it: what it cost, and where."""
    return {"request_id": request_id, **dataclasses.asdict(report)}


def http_status(error: SnowskinError) -> int:
    """The HTTP status of an error; 500 where nobody but us can help."""
    if isinstance(error, BodyTooLarge):
        return 413
    if isinstance(error, BodyTimedOut):
        return 408  # the client was late, not we
    return _HTTP_STATUS.get(error.status, 500)


def error_headers(error: SnowskinError) -> dict[str, str]:
    """Retry-After in whole seconds, where a retry can succeed."""
    if error.retry_after_s is None or http_status(error) not in (429, 503):
        return {}
    return {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}


def error_of(error: SnowskinError) -> JsonObject:
    """The body that says what happened."""
    status = http_status(error)
    code, param = error.reason.lower(), None
    if isinstance(error, InvalidParameter):
        code, param = error.code, error.param
    elif isinstance(error, PromptTooLong):
        code = "context_length_exceeded"
    elif isinstance(error, ModelUnknown):
        code, param = "model_not_found", "model"
    elif isinstance(error, RequestRefused) and error.refusal is not None:
        code = str(error.refusal.reason)
    return error_object(status, str(error), code=code, param=param)


def error_object(status: int, message: str, *, code: str, param: str | None = None) -> JsonObject:
    """OpenAI's error body; the type follows from the HTTP status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def encoded(body: JsonObject) -> bytes:
    """JSON in UTF-8; what a peer sent and is no Unicode is replaced, an answer is always sendable."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "replace")


def event(body: JsonObject) -> bytes:
    """One server-sent event."""
    return b"data: " + encoded(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"
