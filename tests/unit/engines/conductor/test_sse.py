"""Streams of events: what is logged while one is sent belongs to its request."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import structlog

from snowskin.engines.conductor import sse


class RecordingLog:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, event: str) -> None:
        bound = structlog.contextvars.get_contextvars()
        self.lines.append((event, bound.get("request_id", "")))


@asynccontextmanager
async def silent():
    async def events():
        await asyncio.Event().wait()
        yield b""

    yield events()


async def test_a_client_that_goes_away_from_a_stream_is_logged_with_its_request(monkeypatch):
    log = RecordingLog()
    monkeypatch.setattr(sse, "log", log)

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise AssertionError(f"nothing to send: {message}")

    def refuse(error):
        raise AssertionError("nothing went wrong") from error

    await sse.EventStream(silent, refuse, "r1")({"type": "http"}, receive, send)
    assert log.lines == [("client gone", "r1")]
