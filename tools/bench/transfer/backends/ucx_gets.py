"""UCX itself, tuned, through our thin `transport/ucp`: one-sided gets in pieces, a few in flight.

This is UCX as a peer, not our `ucx` transport: nobody checks anything, which over TCP means that the reader may read
all of the owner's memory. Both live on the loopback device, for the length of the benchmark.
"""

from __future__ import annotations

import select
import threading
import time
from typing import TYPE_CHECKING

from snowskin.tools.bench.transfer.backends.api import ContestantMissing
from snowskin.transport.errors import TransportUnavailable
from snowskin.transport.ucp.api import Span, UcpFeature, UcpMemoryType
from snowskin.transport.ucp.binding import open_context, why_unavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snowskin.tools.bench.transfer.backends.api import (
        Begin,
        Offer,
        Options,
        Pull,
        SharedMemory,
    )
    from snowskin.transport.runs import Run
    from snowskin.transport.ucp.api import UcpContext, UcpFailure, UcpWorker

TUNED = {
    "TLS": "tcp",
    "NET_DEVICES": "lo",
    "TCP_RX_SEG_SIZE": "1m",
    "TCP_TX_SEG_SIZE": "64k",
}
GET_NBYTES = 1 << 20
MAX_IN_FLIGHT = 8
PULL_TIMEOUT_S = 60.0
LOOK_S = 0.05


def _open() -> UcpContext:
    if missing := why_unavailable():
        raise ContestantMissing(missing)
    try:
        return open_context(TUNED, UcpFeature.REMOTE_MEMORY | UcpFeature.WAKEUP)
    except TransportUnavailable as error:
        raise ContestantMissing(str(error)) from error


def _nothing(*_: object) -> None:
    """No messages come; a failed endpoint is seen at the next get."""


class UcxOwner:
    """A worker that progresses in a thread of its own, which UCX needs to serve gets over TCP."""

    def __init__(self, pool: SharedMemory, options: Options) -> None:
        """Registers the pool, starts the thread."""
        self._context = _open()
        span = Span(pool.address, pool.bytes.nbytes)
        self._memory = self._context.map(span, UcpMemoryType.HOST)
        self._closing = threading.Event()
        self._ready = threading.Event()
        self._address = b""
        self._thread = threading.Thread(target=self._serve, name="ucx-serve", daemon=True)
        self._thread.start()
        if not self._ready.wait(PULL_TIMEOUT_S):
            raise ContestantMissing("UCX opened no worker")
        self.offer: Offer = {
            "worker": self._address.hex(),
            "key": self._memory.pack().hex(),
            "address": pool.address,
        }

    def _serve(self) -> None:
        worker = self._context.open_worker(_nothing)
        self._address = worker.address
        self._ready.set()
        poll = select.poll()
        poll.register(worker.event_fd, select.POLLIN)
        while not self._closing.is_set():
            while worker.progress():
                pass
            if worker.arm():
                poll.poll(LOOK_S * 1000)
        worker.close()

    def close(self) -> None:
        """Ends the thread, then UCX."""
        self._closing.set()
        self._thread.join(PULL_TIMEOUT_S)
        self._memory.unmap()
        self._context.close()


class UcxReader:
    """Posts gets and progresses until they are done."""

    def __init__(
        self, offer: Offer, pool: SharedMemory, landing: SharedMemory, options: Options
    ) -> None:
        """Connects; the landing memory stays registered, so that gets find it in the cache."""
        self._context = _open()
        self._landing = landing
        span = Span(landing.address, landing.bytes.nbytes)
        self._memory = self._context.map(span, UcpMemoryType.HOST)
        self._worker: UcpWorker = self._context.open_worker(_nothing)
        endpoint = self._worker.connect(bytes.fromhex(str(offer["worker"])), _nothing)
        self._key = endpoint.unpack(bytes.fromhex(str(offer["key"])))
        self._remote_address = int(offer["address"])

    def prepare(self, runs: Sequence[Run], begin: Begin | None) -> Pull:
        """Gets of at most 1 MiB, eight in flight."""
        if begin:
            raise ContestantMissing("gets end in any order")
        gets = [
            (
                Span(
                    self._landing.address + local + start,
                    min(GET_NBYTES, size - start),
                ),
                self._remote_address + remote + start,
            )
            for remote, local, size in runs
            for start in range(0, size, GET_NBYTES)
        ]
        get, progress = self._key.get, self._worker.progress

        def pull() -> None:
            num_ended = 0
            failures: list[UcpFailure] = []

            def done(failure: UcpFailure | None) -> None:
                nonlocal num_ended
                num_ended += 1
                if failure:
                    failures.append(failure)

            give_up_at_s = time.monotonic() + PULL_TIMEOUT_S
            for num_posted, (local, address) in enumerate(gets):
                while num_posted - num_ended >= MAX_IN_FLIGHT and not failures:
                    progress()
                    if time.monotonic() > give_up_at_s:
                        raise ConnectionError(f"{num_ended} of {len(gets)} gets ended in time")
                get(local, address, done)
            while num_ended < len(gets) and time.monotonic() < give_up_at_s:
                progress()
            if failures or num_ended < len(gets):
                raise ConnectionError(f"{len(failures)} of {len(gets)} gets failed: {failures[:1]}")

        return pull

    def close(self) -> None:
        """Closes the worker, then UCX."""
        self._worker.close()
        self._memory.unmap()
        self._context.close()


open_owner = UcxOwner
open_reader = UcxReader
