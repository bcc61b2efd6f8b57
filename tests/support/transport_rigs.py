"""An owner and a reader of each backend in this process, for the contract suite; one entry of `BACKENDS` each.

The clock stands still and tests move it, where nothing but memory is between the two sides; where sockets are, it is
real time that tests can move on.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from snowskin.kvstore.pool.arena import Arena
from snowskin.transport.addresses import Address
from snowskin.transport.copying import INLINE_NBYTES
from snowskin.transport.lending import Lending
from snowskin.transport.loopback import LoopbackNetwork, LoopbackTransport
from snowskin.transport.memory import Lendable, Memfd
from snowskin.transport.ordered import NUM_WORKERS
from snowskin.transport.shm import ShmTransport
from snowskin.transport.tcp.settings import TcpSettings
from snowskin.transport.tcp.transport import TcpTransport
from snowskin.transport.ucp.binding import why_unavailable
from snowskin.transport.ucx.settings import UcxSettings
from snowskin.transport.ucx.transport import NUM_WORKERS as NUM_UCX_WORKERS
from snowskin.transport.ucx.transport import UcxTransport

if TYPE_CHECKING:
    from collections.abc import Callable

    from snowskin.transport.api import (
        Completion,
        Range,
        RegionDescriptor,
        RemoteRegion,
        Transport,
    )

NBYTES = 64 * 1024
LARGE_NBYTES = 4 * INLINE_NBYTES
HUGE_NBYTES = 24 << 20
BUFFER_NBYTES = 1 << 20
FAR_S = 1e9
WAIT_S = 5.0


@dataclass(frozen=True)
class Backend:
    """How the contract suite makes and sees a backend.

    Attributes:
        make: owner and reader that can reach each other, on a clock.
        is_real: whether it waits on sockets, and so needs a clock that goes on.
        num_at_once: how many transfers of `pull_async` run before others wait.
        knows_memory: whether `attach` sees the memory itself, and so refuses what is not as described.
        has_links: whether notes need a link that travels beside the descriptor.
        has_views: whether attached regions can be read in place.
        lends: whether the owner's memory is registered as `Lendable`.
        why_not: what is missing here to run it; None where nothing is.
    """

    make: Callable[[Callable[[], float]], tuple[Transport, Transport]]
    is_real: bool = True
    num_at_once: int = NUM_WORKERS
    knows_memory: bool = False
    has_links: bool = False
    has_views: bool = False
    lends: bool = False
    why_not: str | None = None


def _loopback(now_s: Callable[[], float]) -> tuple[Transport, Transport]:
    network = LoopbackNetwork()
    return LoopbackTransport(network, now_s=now_s), LoopbackTransport(network, now_s=now_s)


def _shm(now_s: Callable[[], float]) -> tuple[Transport, Transport]:
    return ShmTransport(now_s=now_s), ShmTransport(now_s=now_s)


def _tcp(
    now_s: Callable[[], float], *, lend_from_nbytes: int = TcpSettings().lend_from_nbytes
) -> tuple[Transport, Transport]:
    # Buffers of a size of their own, so that a test knows how much can be on the way.
    here = TcpSettings(
        listen=(Address("127.0.0.1", 0),),
        send_buffer_nbytes=BUFFER_NBYTES,
        lend_from_nbytes=lend_from_nbytes,
        lend_to_this_host=True,
    )
    there = TcpSettings(receive_buffer_nbytes=BUFFER_NBYTES, done_from_nbytes=lend_from_nbytes)
    reader = TcpTransport(there, now_s=now_s, inline_nbytes=INLINE_NBYTES)
    return TcpTransport(here, now_s=now_s), reader


def _ucx(now_s: Callable[[], float], *, one_sided: bool) -> tuple[Transport, Transport]:
    here = UcxSettings(net_devices="lo", trusted_network=one_sided, connect_timeout_s=0.7)
    return UcxTransport(here, now_s=now_s), UcxTransport(here, now_s=now_s)


BACKENDS: dict[str, Backend] = {
    "loopback": Backend(make=_loopback, is_real=False, knows_memory=True, has_views=True),
    "shm": Backend(make=_shm, is_real=False, knows_memory=True, has_links=True, has_views=True),
    "tcp": Backend(make=_tcp),
    "tcp-by-reference": Backend(make=lambda now_s: _tcp(now_s, lend_from_nbytes=4096), lends=True),
    "ucx": Backend(
        make=lambda now_s: _ucx(now_s, one_sided=False),
        num_at_once=NUM_UCX_WORKERS,
        why_not=why_unavailable(),
    ),
    "ucx-one-sided": Backend(
        make=lambda now_s: _ucx(now_s, one_sided=True),
        num_at_once=NUM_UCX_WORKERS,
        why_not=why_unavailable(),
    ),
}


class Rig:
    """An owner and a reader of one backend, with one region between them and one to land in.

    Attributes:
        scheme: name of the backend in `BACKENDS`.
        owner, reader: the transports.
        owned: the owner's region, filled with what looks random.
        target: where the reader lands; `local` is its region.
    """

    def __init__(self, scheme: str, nbytes: int = NBYTES) -> None:
        self.scheme = scheme
        self.backend = BACKENDS[scheme]
        self.nbytes = nbytes
        self._moved_s = 100.0
        self.owner, self.reader = self.backend.make(self.now_s)
        lends = self.backend.lends
        self.arena = Arena(nbytes, name="rig", tenant="t", huge_pages="never" if lends else "auto")
        self.fd = self.arena.open_read_write()
        memory: object = Memfd(fd=self.fd)
        self.lending = None
        if lends:
            self.lending = Lending(self.fd, self.arena.nbytes, unit_nbytes=mmap.PAGESIZE)
            memory = Lendable(memory=memory, lending=self.lending)
        self.owned = self.owner.register(memory)
        self.owned.buffer[:] = np.random.default_rng(7).integers(0, 256, nbytes, dtype=np.uint8)
        self.target = np.zeros(nbytes, dtype=np.uint8)
        self.local = self.reader.register(self.target)
        self._link_fds: dict[bytes, int] = {}

    def now_s(self) -> float:
        """The clock of both sides."""
        return self._moved_s + (time.monotonic() if self.backend.is_real else 0.0)

    def advance(self, seconds: float) -> None:
        """Moves it on."""
        self._moved_s += seconds

    def describe(
        self,
        *,
        writable: bool = True,
        ranges: list[Range] | None = None,
        epoch: int = 0,
        generation: int = 0,
        expires_in_s: float = float("inf"),
        on_done: Callable[[Completion], None] | None = None,
    ) -> RegionDescriptor:
        """Grants the owner's region, with its link where the backend has any; all of it and for writing by default."""
        descriptor = self.owner.describe(
            self.owned,
            writable=writable,
            ranges=ranges,
            epoch=epoch,
            generation=generation,
            expires_in_s=expires_in_s,
            on_done=on_done or (lambda completion: None),
        )
        if isinstance(self.owner, ShmTransport):
            self._link_fds[descriptor.capability] = self.owner.link(descriptor)
        return descriptor

    def attach(
        self,
        descriptor: RegionDescriptor | None = None,
        *,
        writable: bool = True,
        asked_at_s: float | None = None,
        populate: bool = False,
        link_of: RegionDescriptor | None = None,
    ) -> RemoteRegion:
        """Attaches what was described by this rig; `link_of`: with the link of another grant."""
        descriptor = descriptor or self.describe()
        # An end is the peer's alone: whoever attaches again does without.
        link_fd = self._link_fds.pop((link_of or descriptor).capability, None)
        try:
            return self.reader.attach(
                descriptor,
                fd=self.fd,
                link_fd=link_fd,
                writable=writable,
                asked_at_s=asked_at_s,
                populate=populate,
            )
        finally:
            if link_fd is not None:
                os.close(link_fd)

    def close(self) -> None:
        """Ends all of it; idempotent."""
        if self.arena.closed:
            return
        self.reader.close()
        self.owner.close()
        self.local.close()
        self.owned.close()
        for link_fd in self._link_fds.values():
            os.close(link_fd)
        if self.lending is not None:
            self.lending.close()
        os.close(self.fd)
        self.arena.close()


class Stuck:
    """A `landed` that holds its transfer after the first piece until `go`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()

    def __call__(self, offset: int, nbytes: int) -> None:
        self.reached.set()
        assert self.go.wait(WAIT_S)


async def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once it is so; a worker thread makes it so, and tells nobody."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
