"""A streamed chat request against scripted servers."""

from __future__ import annotations

import json

import httpx
import pytest

from snowskin.tools.cluster.chat import stream_chat
from snowskin.tools.cluster.errors import RequestFailed


def chunk(content=None, *, token_ids=(), finish_reason=None, **more):
    delta = {"content": content} if content is not None else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "token_ids": token_ids}
    return {"choices": [choice], **more}


GOOD = [
    chunk("a", token_ids=[1]),
    chunk("", token_ids=[2]),
    chunk("é", token_ids=[3, 4]),
    chunk(finish_reason="length"),
    {
        "choices": [],
        "usage": {"prompt_tokens": 40, "prompt_tokens_details": {"cached_tokens": 32}},
        "snowskin": {"prefill": {"pull_s": 1.0}},
    },
]


def sse(chunks, *, done=True):
    lines = [f"data: {json.dumps(each)}\n\n" for each in chunks]
    return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n" if done else ""])


async def ask(answer, *, use_cache=True, pieces=None):
    """Sends one request to a server that answers with `answer`; returns it and what was asked."""
    seen = []

    def handle(request):
        seen.append(request)
        return answer if isinstance(answer, httpx.Response) else httpx.Response(200, text=answer)

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(handle), base_url="http://cluster"
    ) as client:
        result = await stream_chat(
            client,
            "tiny",
            [{"role": "user", "content": "hi"}],
            max_tokens=4,
            use_cache=use_cache,
            on_text=(pieces if pieces is not None else []).append,
        )
    return result, seen[0]


async def test_text_tokens_and_the_servers_numbers_are_collected():
    pieces = []
    answer, _ = await ask(sse(GOOD), pieces=pieces)
    assert (answer.text, pieces) == ("aé", ["a", "é"])
    assert answer.token_ids == (1, 2, 3, 4)
    assert answer.finish_reason == "length"
    assert (answer.num_prompt_tokens, answer.num_cached_tokens) == (40, 32)
    assert answer.stats == {"prefill": {"pull_s": 1.0}}
    assert len(answer.gaps_s) == 3
    assert answer.gaps_s[-1] == 0.0
    assert answer.ttft_s > 0


@pytest.mark.parametrize(("use_cache", "expected"), [(True, "on"), (False, "off")])
async def test_the_cache_header_and_greedy_sampling_are_asked_for(use_cache, expected):
    _, request = await ask(sse(GOOD), use_cache=use_cache)
    body = json.loads(request.content)
    assert request.headers["x-snowskin-cache"] == expected
    assert request.headers["x-snowskin-stats"] == "1"
    assert (body["temperature"], body["stream"], body["return_token_ids"]) == (0, True, True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (sse(GOOD, done=False), r"before \[DONE\]"),
        (sse([chunk(finish_reason="stop")]), "without a token"),
        (sse([*GOOD[:2]]), "finish reason"),
        (sse([GOOD[0], {"error": {"message": "decode is gone"}}]), "decode is gone"),
        (httpx.Response(429, json={"error": {"message": "too many"}}), "HTTP 429: too many"),
        (httpx.Response(502, text="bad gateway"), "HTTP 502: bad gateway"),
    ],
)
async def test_an_answer_that_is_not_whole_is_an_error_with_its_reason(answer, expected):
    with pytest.raises(RequestFailed, match=expected):
        await ask(answer)


async def test_a_connection_that_breaks_is_an_error():
    def refuse(request):
        raise httpx.ConnectError("refused", request=request)

    async with httpx.AsyncClient(
        transport=httpx.MockTransport(refuse), base_url="http://cluster"
    ) as client:
        with pytest.raises(RequestFailed, match="refused"):
            await stream_chat(client, "tiny", [], max_tokens=1, use_cache=True)
