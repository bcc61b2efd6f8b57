"""OpenAI-shaped requests: what is accepted, and a sentence for everything that is not.

Rules kept here: nothing is ignored. A parameter that OpenAI does not have is unknown; one that it
has and we do not is "not supported", unless its value is what its absence means; both are refused
by name. Null is "not given". Types are strict: the string "5" is no number. Source: the public API
reference of /v1/completions and /v1/chat/completions. Extensions: `ignore_eos`, `return_token_ids`,
`top_k` (0 and -1: all). `user` changes no answer; it is logged as a keyed hash, to tell users apart
and not to know them.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)

from snowskin.engines.conductor.errors import InvalidParameter

MAX_STOPS = 4
MAX_STOP_LENGTH = 256
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's

Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

# What OpenAI has and we do not -> the values that mean the same as leaving it out.
_UNSUPPORTED: dict[str, tuple[Json, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "n": (1,),
    "presence_penalty": (0,),
    "suffix": ("",),
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_cache_key": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
# Likewise, of one message of a conversation.
_UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Json, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode: it holds half of a surrogate pair") from None
    return value


def _stops(value: object) -> tuple[str, ...]:
    stops = value if isinstance(value, list) else [] if value is None else [value]
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} strings, at most {MAX_STOPS} are supported")
    for stop in stops:
        if not 0 < len(_text(stop)) <= MAX_STOP_LENGTH:
            raise ValueError(f"a stop string has 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _prompt(value: object) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of token ids")
    if any(isinstance(each, list | str) for each in value):
        raise ValueError("holds several prompts: batches are not supported, send one request each")
    if not all(type(each) is int and 0 <= each < 2**32 for each in value):
        raise ValueError("must be a string or a list of token ids")
    return tuple(value)


def _content(value: object) -> str:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    texts = []
    for part in value:
        if (
            not isinstance(part, dict)
            or part.get("type") != "text"
            or set(part) != {"type", "text"}
        ):
            raise ValueError('only parts {"type": "text", "text": ...} are supported')
        texts.append(_text(part["text"]))
    return "".join(texts)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How to stream; `include_usage` adds a last chunk with `usage` and no choice."""

    include_usage: bool | None = None


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]


class GenerationRequest(_Strict):
    """What both endpoints take."""

    model: Annotated[str, BeforeValidator(_text)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    # vLLM's clients say -1 for "all".
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, BeforeValidator(_text)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of `usage`."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """/v1/completions."""

    prompt: Annotated[str | tuple[int, ...], PlainValidator(_prompt)]

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens to generate at most; None takes `default_tokens`, as far as the context allows."""
        return self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """Where the request does not say."""
        return DEFAULT_COMPLETION_TOKENS


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None

    @property
    def wanted_tokens(self) -> int | None:
        """Tokens to generate at most; None leaves it to the conductor."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def default_tokens(self) -> int | None:
        """Where the request does not say: the conductor's default."""
        return None


def parse_completion(body: bytes) -> CompletionRequest:
    """The request in `body`; InvalidParameter names what is wrong with it."""
    return _validated(CompletionRequest, _object(body))


def parse_chat(body: bytes) -> ChatRequest:
    """The request in `body`; InvalidParameter names what is wrong with it."""
    fields = _object(body)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _without_unsupported(message, _UNSUPPORTED_IN_MESSAGE, f"messages[{index}].")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    request = _validated(ChatRequest, fields)
    limits = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidParameter(
            f"max_tokens is {request.max_tokens} and max_completion_tokens is "
            f"{request.max_completion_tokens}",
            param="max_completion_tokens",
            hint="they mean the same: give one",
        )
    return request


def _object(body: bytes) -> dict[str, Json]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidParameter(
            f"the body is not JSON: {reason}", code="invalid_json", hint="send a JSON object"
        ) from None
    if not isinstance(found, dict):
        raise InvalidParameter("the body is not a JSON object", code="invalid_json")
    return found


def _without_unsupported(
    fields: dict[str, Json], unsupported: dict[str, tuple[Json, ...]], path: str = ""
) -> dict[str, Json]:
    """Refuses what we do not do; drops what says in words what its absence means."""
    kept = {}
    for name, value in fields.items():
        if name not in unsupported:
            kept[name] = value
        elif value is not None and not _is_one_of(value, unsupported[name]):
            raise InvalidParameter(
                f"{path}{name} is not supported",
                param=f"{path}{name}",
                code="unsupported_parameter",
                hint="leave it out",
            )
    return kept


def _is_one_of(value: Json, neutral: tuple[Json, ...]) -> bool:
    # bool is an int to Python, not to a caller: `"n": true` is no 1
    return any(
        isinstance(value, bool) is isinstance(each, bool) and value == each for each in neutral
    )


_RequestT = TypeVar("_RequestT", bound=GenerationRequest)


def _validated(kind: type[_RequestT], fields: dict[str, Json]) -> _RequestT:
    known = _without_unsupported(fields, _UNSUPPORTED)
    given = {
        name: value
        for name, value in known.items()
        if value is not None or name not in kind.model_fields
    }
    try:
        request = kind.model_validate(given)
    except ValidationError as error:
        raise _as_invalid_parameter(error) from None
    if request.stream_options is not None and not request.stream:
        raise InvalidParameter(
            "stream_options is given and stream is not true",
            param="stream_options",
            hint="set stream, or leave stream_options out",
        )
    return request


def _as_invalid_parameter(error: ValidationError) -> InvalidParameter:
    first = error.errors(include_url=False, include_input=False)[0]
    param = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return InvalidParameter(
            f"{param} is unknown", param=param, code="unknown_parameter", hint="leave it out"
        )
    if first["type"] == "missing":
        return InvalidParameter(
            f"{param} is missing", param=param, code="missing_required_parameter"
        )
    reason = first["msg"].removeprefix("Value error, ")
    return InvalidParameter(f"{param}: {reason[:1].lower()}{reason[1:]}", param=param)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    # A key of the body may hold half of a surrogate pair; an error must still be sendable.
    return path[:200].encode("utf-8", "replace").decode()
