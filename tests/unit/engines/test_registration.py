"""What an instance's log says of its standing: each trouble once, whatever came before it."""

from __future__ import annotations

import asyncio

from snowskin.engines import registration
from snowskin.engines.conductor.errors import ModelMismatch
from snowskin.engines.registration import Registration
from snowskin.kvstore.errors import NodeUnavailable
from snowskin.v1 import conductor_pb2


class RecordingLog:
    def __init__(self):
        self.events = []

    def warning(self, event, **_fields):
        self.events.append(event)

    def info(self, event, **_fields):
        self.events.append(event)


class IdleInstance:
    draining = False

    def load(self):
        raise AssertionError("nobody asks")


async def test_a_refusal_is_logged_also_by_an_instance_that_had_no_conductor_before(monkeypatch):
    log = RecordingLog()
    monkeypatch.setattr(registration, "log", log)
    monkeypatch.setattr(registration, "BACKOFF_S", 0.0)
    answers = [NodeUnavailable("nobody"), NodeUnavailable("nobody"), ModelMismatch("of m")] * 2
    done = asyncio.Event()

    async def register(self, _stub):
        if answers:
            raise answers.pop(0)
        done.set()
        return 60.0

    monkeypatch.setattr(Registration, "_register", register)
    standing = Registration("127.0.0.1:1", conductor_pb2.RegisterRequest(), IdleInstance())
    running = asyncio.create_task(standing.run())
    async with asyncio.timeout(10):
        await done.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert log.events == [
        "conductor unreachable", "registration refused",
        "conductor unreachable", "registration refused", "conductor back",
    ]  # fmt: skip
