"""From an HTTP request to a job: headers, body, tokens, and what was left open.

Rules kept here: what is wrong is refused before the model's instances hear of it; a body is never
read beyond its limit, nor waited for without end; what a job needs of chance (its id, seed, salt)
is drawn here, once. Long texts are tokenised off the loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snowskin.engines.conductor.errors import (
    BodyTimedOut,
    BodyTooLarge,
    InvalidParameter,
    ModelUnknown,
)
from snowskin.engines.conductor.job import Job, Sampling
from snowskin.engines.conductor.openai import ChatRequest, CompletionRequest
from snowskin.engines.errors import BadPrompt
from snowskin.kvstore.tracing import TRACEPARENT_HEADER, TRACESTATE_HEADER

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest

    from snowskin.engines.model.tokenizer import Tokenizer


REQUEST_ID_HEADER = "x-request-id"
CACHE_HEADER = "x-snowskin-cache"
STATS_HEADER = "x-snowskin-stats"
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,96}")
MAX_BODY_NBYTES = 8 << 20
BODY_TIMEOUT_S = 30.0
OFF_LOOP_CHARACTERS = 2_000
DEFAULT_TEMPERATURE = 1.0  # as OpenAI's
MAX_SEED = 2**64 - 1
# Names are short and few: without a key a list of likely ones would undo the hash.
_USER_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Headers:
    """What the headers of a request say."""

    request_id: str
    use_cache: bool
    with_stats: bool
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model as the front needs it.

    Attributes:
        vocab_size: token ids of a prompt are below it.
        created_at: when this conductor began to serve it, Unix seconds.
    """

    name: str
    tokenizer: Tokenizer
    vocab_size: int
    created_at: int


def request_id_of(request: HttpRequest) -> str:
    """The id that the request brings, if it is one, or a new one; for answers to any request."""
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def headers_of(request: HttpRequest) -> Headers:
    """The headers that we know.

    Raises:
        InvalidParameter: one has a value that means nothing.
    """
    given = request.headers.get(REQUEST_ID_HEADER)
    if given is not None and not REQUEST_ID.fullmatch(given):
        raise InvalidParameter(
            f"the header {REQUEST_ID_HEADER} is not an id",
            param=REQUEST_ID_HEADER,
            hint="use 1 to 96 letters, digits and . _ : -",
        )
    cache = _one_of(request, CACHE_HEADER, {"on": True, "off": False}, absent="on")
    stats = _one_of(request, STATS_HEADER, {"0": False, "1": True}, absent="0")
    return Headers(
        request_id=request_id_of(request),
        use_cache=cache,
        with_stats=stats,
        traceparent=request.headers.get(TRACEPARENT_HEADER, ""),
        tracestate=request.headers.get(TRACESTATE_HEADER, ""),
    )


async def body_of(request: HttpRequest) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: it is, or says that it is, larger than accepted.
        BodyTimedOut: it did not come in time.
    """
    chunks, nbytes = [], 0
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > MAX_BODY_NBYTES:
        raise _too_large(f"{declared[:20]} bytes")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                nbytes += len(chunk)
                if nbytes > MAX_BODY_NBYTES:
                    raise _too_large("larger")
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTimedOut(
            f"the body did not come within {BODY_TIMEOUT_S} s: {nbytes} bytes did",
            hint="send it faster",
        ) from None
    return b"".join(chunks)


async def job_of(
    request: CompletionRequest | ChatRequest,
    headers: Headers,
    model: ServedModel,
    *,
    arrived_at_s: float,
) -> Job:
    """The job that a request asks for.

    Raises:
        ModelUnknown: it asks for another model.
        InvalidParameter, BadPrompt: there is nothing to generate from.
    """
    if request.model != model.name:
        raise ModelUnknown(
            f"the model {request.model[:100]!r} is not served here", hint=f"use {model.name!r}"
        )
    tokenizer = model.tokenizer
    seed = secrets.randbits(64) if request.seed is None else request.seed & MAX_SEED
    temperature = DEFAULT_TEMPERATURE if request.temperature is None else request.temperature
    return Job(
        request_id=headers.request_id,
        token_ids=await _tokens(request, model),
        sampling=Sampling(
            temperature=temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=seed,
            stop_token_ids=() if request.ignore_eos else tuple(tokenizer.eos_token_ids),
        ),
        max_tokens=request.wanted_tokens,
        default_max_tokens=request.default_tokens,
        use_cache=headers.use_cache,
        salt=secrets.token_hex(16),
        arrived_at_s=arrived_at_s,
        traceparent=headers.traceparent,
        tracestate=headers.tracestate,
        user=_pseudonym(request.user) if request.user else "",
    )


def _pseudonym(user: str) -> str:
    """Twelve hex digits: the same for one user until this process ends, and of no use beyond it."""
    return hashlib.blake2b(user.encode(), digest_size=6, key=_USER_KEY).hexdigest()


async def _tokens(request: CompletionRequest | ChatRequest, model: ServedModel) -> list[int]:
    tokenizer = model.tokenizer
    if isinstance(request, ChatRequest):
        messages = [{"role": each.role, "content": each.content} for each in request.messages]
        length = sum(len(each.content) for each in request.messages)
        try:
            if length > OFF_LOOP_CHARACTERS:
                return await asyncio.to_thread(tokenizer.encode_chat, messages)
            return tokenizer.encode_chat(messages)
        except BadPrompt as error:
            raise InvalidParameter(error.message, param="messages", hint=error.hint) from error
    prompt = request.prompt
    if isinstance(prompt, tuple):
        token_ids = list(prompt)
        largest = max(token_ids, default=0)
        if largest >= model.vocab_size:
            raise InvalidParameter(
                f"prompt: token {largest} is outside the vocabulary of {model.vocab_size}",
                param="prompt",
                hint="use the tokenizer of this model",
            )
    elif len(prompt) > OFF_LOOP_CHARACTERS:
        token_ids = await asyncio.to_thread(tokenizer.encode, prompt)
    else:
        token_ids = tokenizer.encode(prompt)
    if not token_ids:
        raise InvalidParameter("prompt: it is empty", param="prompt", hint="send some text")
    return token_ids


def _one_of(request: HttpRequest, name: str, values: dict[str, bool], *, absent: str) -> bool:
    given = request.headers.get(name, absent)
    if given not in values:
        raise InvalidParameter(
            f"the header {name} is {given[:40]!r}",
            param=name,
            hint=f"use {' or '.join(values)}",
        )
    return values[given]


def _too_large(what: str) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {what}, at most {MAX_BODY_NBYTES} bytes are accepted",
        hint="shorten the prompt",
    )
