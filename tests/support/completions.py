"""Asking a cluster as its users do, over HTTP, and what it says about the work that it took."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

TIMEOUT_S = 120.0
MAX_CONNECTIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back; `prefill`, `decode` and `stats` are the server's own account."""

    token_ids: tuple[int, ...]
    text: str
    num_prompt_tokens: int
    num_cached_tokens: int
    stats: Mapping[str, Any]

    @property
    def prefill(self) -> Mapping[str, Any]:
        """Of the prefill instance."""
        account: Mapping[str, Any] = self.stats["prefill"]
        return account

    @property
    def decode(self) -> Mapping[str, Any]:
        """Of the decode instance."""
        account: Mapping[str, Any] = self.stats["decode"]
        return account


class Asker:
    """Asks one cluster."""

    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self._http = http
        self._model = model

    async def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        use_cache: bool = True,
        is_streamed: bool = False,
        **fields: Any,
    ) -> Answer:
        """`/v1/completions` of token ids; greedy but for `fields`."""
        body = {"prompt": list(prompt), "max_tokens": max_tokens, **fields}
        return await self._ask("/v1/completions", body, use_cache, is_streamed)

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        *,
        is_streamed: bool = False,
        **fields: Any,
    ) -> Answer:
        """`/v1/chat/completions`; greedy but for `fields`."""
        body = {"messages": list(messages), "max_tokens": max_tokens, **fields}
        return await self._ask("/v1/chat/completions", body, True, is_streamed)

    async def _ask(
        self, path: str, body: Mapping[str, Any], use_cache: bool, is_streamed: bool
    ) -> Answer:
        body = {
            "model": self._model,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **body,
        }
        headers = {"x-snowskin-stats": "1", "x-snowskin-cache": "on" if use_cache else "off"}
        if is_streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        response = await self._http.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return _answer(_events(response.text) if is_streamed else [response.json()])


def answer_of(response: Mapping[str, Any]) -> Answer:
    """An answer that was not streamed."""
    return _answer([response])


def _events(text: str) -> list[Mapping[str, Any]]:
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert data[-1] == "[DONE]", f"the stream ended with {data[-1]}"
    return [json.loads(line) for line in data[:-1]]


def _answer(objects: Sequence[Mapping[str, Any]]) -> Answer:
    choices = [choice for each in objects for choice in each["choices"]]
    (usage,) = [each["usage"] for each in objects if each.get("usage")]
    (stats,) = [each["snowskin"] for each in objects if "snowskin" in each]
    return Answer(
        token_ids=tuple(token for choice in choices for token in choice.get("token_ids", ())),
        text="".join(_text(choice) for choice in choices),
        num_prompt_tokens=usage["prompt_tokens"],
        num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
        stats=stats,
    )


def _text(choice: Mapping[str, Any]) -> str:
    said = choice.get("message") or choice.get("delta") or {}
    return str(said.get("content", choice.get("text", "")))


@asynccontextmanager
async def asking(http_address: str) -> AsyncIterator[Asker]:
    """An `Asker` of the cluster at `host:port`."""
    async with httpx.AsyncClient(
        base_url=f"http://{http_address}",
        timeout=TIMEOUT_S,
        # None is kept: a connection that stays would look left behind by whichever test opened it.
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=0),
        trust_env=False,
        verify=False,
    ) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        yield Asker(http, model)
