"""An instance's standing with the conductor: announced, and reported on, for as long as it runs.

Rules kept here: an unreachable conductor never stops an instance; it is tried again until it
answers; a conductor that does not know the instance (it has restarted) is told all anew; the log
says once that it is gone, or that it refuses, and once that it is back.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from snowskin.engines.service import load_to
from snowskin.kvstore.rpc import open_channel, translating
from snowskin.kvstore.telemetry import get_logger
from snowskin.transport.errors import SnowskinError
from snowskin.v1 import conductor_pb2, conductor_pb2_grpc

if TYPE_CHECKING:
    from snowskin.engines.service import Instance

CALL_TIMEOUT_S = 2.0
BACKOFF_S = 0.25
MIN_INTERVAL_S = 0.02  # whatever a conductor asks for

EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104  compared with, not listened on

log = get_logger(__name__)


def told_host(host: str, *, advertise_host: str = "") -> str:
    """What the conductor connects to: for who listens on all addresses, this host's name, if that has one."""
    if advertise_host or host not in EVERY_ADDRESS:
        return advertise_host or host
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        log.warning("the name of this host has no address: set advertise_host", name=name)
        return host
    return name


class Registration:
    """Keeps one instance registered; `run` is a task of its process.

    Attributes:
        connected: whether the conductor answered last, and knows the instance.
    """

    def __init__(
        self, conductor: str, facts: conductor_pb2.RegisterRequest, instance: Instance
    ) -> None:
        """`facts` is what Register sends, the load apart."""
        self.connected = False
        self._conductor = conductor
        self._facts = facts
        self._instance = instance
        self._hurry = asyncio.Event()
        self._reported = asyncio.Event()

    async def run(self) -> None:
        """Registers and reports until cancelled."""
        channel = open_channel(self._conductor)
        try:
            stub = conductor_pb2_grpc.ConductorStub(channel)
            interval_s: float | None = None
            trouble = ""
            while True:
                try:
                    with translating(f"conductor {self._conductor}"):
                        if interval_s is None:
                            interval_s = await self._register(stub)
                        elif not await self._report(stub):
                            interval_s = None
                            self.connected = False
                            continue
                except SnowskinError as error:
                    self.connected = False
                    is_refused = error.status == "FAILED_PRECONDITION"
                    event = "registration refused" if is_refused else "conductor unreachable"
                    if event != trouble:
                        log.warning(event, error=str(error))
                    trouble = event
                    await self._pause(BACKOFF_S)
                else:
                    if trouble:
                        log.info("conductor back", conductor=self._conductor)
                    trouble = ""
                    self.connected = True
                    await self._pause(interval_s)
        finally:
            await channel.close(None)

    async def report_now(self, timeout_s: float) -> None:
        """Reports at once, for a change that cannot wait; gives up silently after `timeout_s`."""
        self._reported.clear()
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._reported.wait()
        except TimeoutError:
            log.warning("change not reported in time", seconds=timeout_s)

    async def _register(self, stub: conductor_pb2_grpc.ConductorStub) -> float:
        request = conductor_pb2.RegisterRequest()
        request.CopyFrom(self._facts)
        request.load.CopyFrom(load_to(self._instance.load()))
        response = await stub.Register(request, timeout=CALL_TIMEOUT_S)
        log.info("registered", conductor=self._conductor)
        interval_s: float = response.report_interval_ms / 1000
        return max(MIN_INTERVAL_S, interval_s)

    async def _report(self, stub: conductor_pb2_grpc.ConductorStub) -> bool:
        request = conductor_pb2.ReportRequest(
            instance_id=self._facts.instance_id,
            instance_epoch=self._facts.instance_epoch,
            load=load_to(self._instance.load()),
            draining=self._instance.draining,
        )
        response = await stub.Report(request, timeout=CALL_TIMEOUT_S)
        if response.known:
            self._reported.set()
        return bool(response.known)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._hurry.wait()
        except TimeoutError:
            return
        self._hurry.clear()
