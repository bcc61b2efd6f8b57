"""What the kernel does with pages that a TCP socket refers to: the one thing that lending believes of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from snowskin.transport.lending import Lending
from snowskin.transport.mapping import ALIGN_NBYTES, Mapping
from snowskin.transport.pages import collapse, keep_small, page_use

if TYPE_CHECKING:
    from collections.abc import Iterator

    from snowskin.transport.memory import Bytes

HUGE = ALIGN_NBYTES
NBYTES = 4 * HUGE
CANARY = 0xEE
OLD = (np.arange(NBYTES, dtype=np.uint32) // 512 % 200).astype(np.uint8)  # no canary in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A reader that does not read, and what it was sent of a memfd without a copy."""

    lending: Lending
    pool: Bytes
    reader: socket.socket
    nbytes: int

    def reclaim(self) -> bool:
        """For an extent of all that was sent."""
        return self.lending.reclaim(0, self.nbytes, lambda offset, nbytes: True)

    def read(self) -> Bytes:
        """All of it, now that somebody else writes into the pool."""
        got = bytearray(self.nbytes)
        view = memoryview(got)
        while view:
            view = view[self.reader.recv_into(view) :]
        return np.frombuffer(got, dtype=np.uint8)


@contextlib.contextmanager
def sent(page_nbytes: int) -> Iterator[Sent]:
    """As much as the two sockets' buffers take; lies in `page_nbytes` pages."""
    with contextlib.ExitStack() as stack:
        fd = os.memfd_create("snowskin-sent", os.MFD_CLOEXEC)
        stack.callback(os.close, fd)
        os.posix_fallocate(fd, 0, NBYTES)
        mapping = Mapping(fd, NBYTES, writable=True)
        if page_nbytes == mmap.PAGESIZE:
            keep_small(mapping.address, NBYTES)
            use = page_use(mapping.address)
            if use is not None and use.huge_nbytes:
                pytest.skip("this host makes large pages of every shared memory")
        elif reason := collapse(mapping.address, NBYTES):
            pytest.skip(f"this host makes no huge pages (MADV_COLLAPSE): {reason}")
        pool = mapping.array()
        pool[:] = OLD
        lending = Lending(fd, NBYTES, unit_nbytes=page_nbytes)
        stack.callback(lending.close)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        reader = stack.enter_context(socket.create_connection(server.getsockname(), timeout=5))
        owner = stack.enter_context(server.accept()[0])
        owner.setblocking(False)
        loan = lending.lend([(0, NBYTES)])
        nbytes = 0
        with contextlib.suppress(BlockingIOError):
            while nbytes < NBYTES:
                nbytes += os.sendfile(owner.fileno(), lending.fd, nbytes, NBYTES - nbytes)
        assert nbytes > 64 << 10
        lending.forsake(loan)
        yield Sent(lending=lending, pool=pool, reader=reader, nbytes=nbytes)


@pytest.mark.parametrize("page_nbytes", [mmap.PAGESIZE, HUGE])
def test_reader_gets_what_it_was_granted_and_nothing_that_came_later(page_nbytes: int) -> None:
    with sent(page_nbytes) as found:
        assert found.reclaim()
        assert not found.lending.is_refused
        found.pool[: found.nbytes] = CANARY
        got = found.read()
        assert np.array_equal(got, OLD[: found.nbytes])
        assert (found.pool[: found.nbytes] == CANARY).all()


@pytest.mark.parametrize("page_nbytes", [mmap.PAGESIZE, HUGE])
def test_without_other_pages_the_reader_would_see_what_came_later(page_nbytes: int) -> None:
    """So the test above can fail."""
    with sent(page_nbytes) as found:
        found.pool[: found.nbytes] = CANARY
        assert (found.read() == CANARY).mean() > 0.5


def test_part_of_a_huge_page_is_not_given_away_where_it_cannot_be_replaced() -> None:
    """A unit smaller than the folio, which no arena makes: the look behind the hole finds it."""
    with sent(HUGE) as found:
        lending = Lending(found.lending.fd, NBYTES, unit_nbytes=mmap.PAGESIZE)
        lending.forsake(lending.lend([(0, 8 * mmap.PAGESIZE)]))
        assert not lending.reclaim(0, 8 * mmap.PAGESIZE, lambda offset, nbytes: True)
        assert lending.is_refused
        assert lending.lend([(HUGE, HUGE)]).ranges == ()
        lending.close()


def test_huge_pages_are_huge_again_afterwards() -> None:
    with sent(HUGE) as found:
        assert found.reclaim()
        assert not found.pool[: found.nbytes].any()
        found.pool[:] = CANARY
        use = page_use(found.pool.ctypes.data)
        assert use is not None
        if use.huge_nbytes < NBYTES and (reason := collapse(found.pool.ctypes.data, NBYTES)):
            pytest.skip(f"the kernel has no huge page left: {reason}")
        assert use.huge_nbytes == NBYTES
