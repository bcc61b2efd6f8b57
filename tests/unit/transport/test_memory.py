"""Registered memory: what is accepted, what is refused, and who waits for whom."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from snowskin.transport.errors import (
    BadDescriptor,
    LandingQuarantined,
    TransportClosed,
    TransportError,
    TransportUnavailable,
)
from snowskin.transport.mapping import map_memfd
from snowskin.transport.memory import Memfd, region_of
from snowskin.transport.pages import Population, populate
from snowskin.transport.registry import TRANSPORTS, open_transport
from snowskin.transport.shm import ShmTransport
from snowskin.transport.ucp.binding import why_unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = mmap.PAGESIZE


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * PAGE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_tensor_shares_its_bytes(dtype: torch.dtype) -> None:
    tensor = torch.zeros((4, 5), dtype=dtype)
    with region_of(tensor) as region:
        assert region.nbytes == tensor.numel() * tensor.element_size()
        region.buffer[:] = 255
        assert bool((tensor != 0).all())


def test_tensor_that_needs_gradients_is_registered_too() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    with region_of(tensor) as region:
        assert region.nbytes == 12


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros((3, 4), dtype=np.float16),
        bytearray(24),
        mmap.mmap(-1, 24),
        memoryview(bytearray(24)),
    ],
    ids=["numpy", "bytearray", "mmap", "memoryview"],
)
def test_buffers_share_their_bytes(memory: object) -> None:
    with region_of(memory) as region:
        assert (region.nbytes, region.writable, region.shared) == (24, True, False)
        region.buffer[3] = 7
        assert bytes(memoryview(memory).cast("B"))[3] == 7  # type: ignore[arg-type]


def test_read_only_memory_stays_read_only() -> None:
    array = np.zeros(4, dtype=np.uint8)
    array.flags.writeable = False
    assert not region_of(array).writable
    assert not region_of(b"abc").writable
    assert not region_of(bytearray(3), writable=False).writable


@pytest.mark.parametrize(
    ("memory", "error"),
    [
        (np.zeros((4, 4))[:, 1], TransportError),
        (torch.zeros(4, 4)[:, 1], TransportError),
        (torch.zeros(4, device="meta"), TransportUnavailable),
        (np.zeros(0), TransportError),
        ("text", TransportError),
        (7, TransportError),
    ],
    ids=["strided numpy", "strided tensor", "no cpu tensor", "empty", "str", "int"],
)
def test_memory_that_cannot_be_registered_is_refused(
    memory: object, error: type[TransportError]
) -> None:
    with pytest.raises(error):
        region_of(memory)


def test_memfd_that_could_shrink_is_refused(memfd: int) -> None:
    with pytest.raises(BadDescriptor, match="sealed against shrinking"):
        region_of(Memfd(fd=memfd))
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(BadDescriptor, match=f"{2 * PAGE} bytes, {PAGE} were described"):
        map_memfd(memfd, PAGE, writable=True)
    with region_of(Memfd(fd=memfd)) as region:
        assert (region.nbytes, region.shared) == (2 * PAGE, True)


def test_file_that_is_no_memfd_is_refused() -> None:
    fd = os.open(__file__, os.O_RDONLY)
    try:
        with pytest.raises(BadDescriptor, match="not a memfd"):
            map_memfd(fd, os.fstat(fd).st_size, writable=False)
    finally:
        os.close(fd)


def test_read_only_descriptor_cannot_be_mapped_for_writing(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    reader = os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)
    try:
        with pytest.raises(TransportError, match="for writing"):
            map_memfd(reader, 2 * PAGE, writable=True)
        assert not map_memfd(reader, 2 * PAGE, writable=False).array().flags.writeable
    finally:
        os.close(reader)


def test_close_waits_for_the_piece_that_is_landing() -> None:
    region = region_of(bytearray(10))
    region.begin_landing()
    closing, closed = threading.Event(), threading.Event()

    def close() -> None:
        closing.set()
        region.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert closing.wait(5)
    while not region.closed:
        pass
    assert not closed.is_set()
    with pytest.raises(TransportClosed):
        region.begin_landing()
    region.end_landing()
    thread.join(5)
    assert closed.is_set()


def test_quarantine_keeps_out_what_overlaps_and_ends_when_lifted() -> None:
    region = region_of(bytearray(100))
    region.quarantine("a", [(10, 10), (40, 5)])
    assert region.quarantined_nbytes == 15
    region.check_not_quarantined([(0, 10), (20, 20), (45, 55)])
    for overlapping in ((0, 11), (19, 1), (0, 100), (44, 1)):
        with pytest.raises(LandingQuarantined):
            region.check_not_quarantined([overlapping])
    region.lift_quarantine("a")
    region.lift_quarantine("a")
    region.check_not_quarantined([(0, 100)])
    region.close()
    region.quarantine("b", [(0, 10)])
    assert region.quarantined_nbytes == 0, "nothing lands in a closed region"


def test_population_faults_pages_in_and_stops(memfd: int) -> None:
    fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with region_of(Memfd(fd=memfd)) as region:
        population = Population(region.buffer, writable=True)
        assert population.wait(5)
        population.stop()
        populate(region.buffer[1:10], writable=False)  # less than a page: nothing to do


def test_private_memory_cannot_be_described_over_shm() -> None:
    transport = ShmTransport()
    region = transport.register(bytearray(10))
    with pytest.raises(TransportUnavailable, match="Memfd"):
        transport.describe(region)
    transport.close()


def test_registry_opens_what_it_knows_and_says_what_is_missing() -> None:
    for scheme in TRANSPORTS:
        if scheme == "ucx" and why_unavailable() is not None:
            with pytest.raises(TransportUnavailable, match=r"snowskin\[ucx\]"):
                open_transport(scheme)
            continue
        transport = open_transport(scheme)
        assert transport.scheme == scheme
        transport.close()
    with pytest.raises(TransportUnavailable, match="loopback, shm, tcp, ucx"):
        open_transport("smoke-signals")
