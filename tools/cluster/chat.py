"""One streamed chat request, timed as its user sees it.

Rules kept here: TTFT counts from the first byte of the request to the first chunk with a token, TBT from chunk to
chunk; token ids and numbers are the server's own words; an answer that does not come to its `[DONE]` is an error.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from snowskin.tools.cluster.errors import RequestFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_DATA = "data:"
_DONE = "[DONE]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back.

    Attributes:
        gaps_s: seconds between two chunks with tokens, one a token.
        stats: the server's own account (`x-snowskin-stats`), empty if it sent none.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    ttft_s: float
    gaps_s: tuple[float, ...]
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tbt_s(self) -> float:
        """Median of the gaps; 0 where the answer has one token."""
        return statistics.median(self.gaps_s) if self.gaps_s else 0.0


class _Collector:
    """Puts an answer together from the chunks of its stream."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._arrived_s: list[float] = []
        self._finish_reason = ""
        self._is_done = False
        self._error = ""
        self._usage: Mapping[str, Any] = {}
        self._stats: Mapping[str, Any] = {}

    def add(self, data: str, now_s: float) -> None:
        """Takes the data of one event."""
        if data == _DONE:
            self._is_done = True
            return
        chunk: Mapping[str, Any] = json.loads(data)
        if "error" in chunk:
            self._error = f"the stream ended with: {chunk['error'].get('message')}"
        self._usage = chunk.get("usage") or self._usage
        self._stats = chunk.get("snowskin") or self._stats
        for choice in chunk.get("choices", ()):
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            token_ids = choice.get("token_ids") or chunk.get("token_ids") or ()
            self._token_ids += token_ids
            self._arrived_s += [now_s] * len(token_ids)
            text = choice.get("delta", {}).get("content") or ""
            if text:
                self._texts.append(text)
                self._on_text(text)

    def answer(self, began_s: float) -> Answer:
        """The whole, once the stream has ended; RequestFailed where it is not whole."""
        if self._error or not self._is_done:
            raise RequestFailed(self._error or "the stream ended before [DONE]")
        if not self._arrived_s or not self._finish_reason:
            raise RequestFailed("the stream ended without a token or without a finish reason")
        details = self._usage.get("prompt_tokens_details") or {}
        pairs = zip(self._arrived_s, self._arrived_s[1:], strict=False)
        return Answer(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish_reason,
            num_prompt_tokens=self._usage.get("prompt_tokens", 0),
            num_cached_tokens=details.get("cached_tokens", 0),
            ttft_s=self._arrived_s[0] - began_s,
            gaps_s=tuple(later - earlier for earlier, later in pairs),
            stats=self._stats,
        )


async def stream_chat(
    client: httpx.AsyncClient,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    max_tokens: int,
    use_cache: bool,
    on_text: Callable[[str], None] = lambda _text: None,
) -> Answer:
    """Sends one greedy request and reads its stream to the end.

    Args:
        client: with the cluster's base URL.
        model: its name.
        messages: the conversation.
        max_tokens: to generate at most.
        use_cache: False sends `x-snowskin-cache: off`.
        on_text: gets each piece of text as it arrives.

    Raises:
        RequestFailed: the server refused, or the stream broke.
    """
    body = {
        "model": model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    headers = {"x-snowskin-stats": "1", "x-snowskin-cache": "on" if use_cache else "off"}
    collector = _Collector(on_text)
    began_s = time.monotonic()
    try:
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, headers=headers
        ) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise RequestFailed(f"HTTP {response.status_code}: {_message(text)}")
            # To the end, also past an error: leaving httpx's generators halfway leaves them to the collector.
            async for line in response.aiter_lines():
                if line.startswith(_DATA):
                    collector.add(line[len(_DATA) :].strip(), time.monotonic())
    except httpx.HTTPError as error:
        raise RequestFailed(f"the connection broke: {error!r}") from error
    return collector.answer(began_s)


def _message(text: str) -> str:
    """The sentence of an OpenAI-shaped error body, or the body."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200]
